"""The one way to a method that learns from rows: by its word, the base, the parts and the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from superpose_adapters.bundled import resolve_base
from superpose_adapters.merge.lorahub import LoraHub
from superpose_adapters.merge.merge import Part, in_order
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.methods import DATA_METHODS, read_method
from superpose_adapters.merge.regmean import RegMean
from superpose_adapters.merge.soups import Soups
from superpose_adapters.qa import Row
from superpose_adapters.scoring import EncodedText, Scope
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.data import encode
from superpose_train.merging.adapted_base import AdaptedBase
from superpose_train.merging.hub_search import search_weights
from superpose_train.merging.moments import learn_moments
from superpose_train.merging.soup_weights import learn_weights
from superpose_train.model import check_context, load_base
from superpose_train.options import Options

# By method: (method, base, parts, encoded rows) -> the method with what it has learned.
_LEARNERS: Mapping[type[Method], Callable[..., Method]] = {
    RegMean: learn_moments,
    Soups: learn_weights,
    LoraHub: search_weights,
}


@dataclass(frozen=True)
class Reading:
    """How rows become tokens, and which of these count; the defaults are `superpose-train`'s.

    Attributes:
        max_length: Tokens a row, cut on the right.
        template: Text of a row.
        special_tokens: Whether what the base's tokenizer puts before a text stands there.
        loss_scope: Tokens whose loss counts.
    """

    max_length: int = Options.max_length
    template: str = Options.template
    special_tokens: bool = Options.special_tokens
    loss_scope: Scope = Options.loss_scope


_AS_TRAINED = Reading()


def data_method(
    name: str,
    options: Mapping[str, object],
    base: str,
    parts: Sequence[Part],
    rows: Mapping[str, Sequence[Row]],
    reading: Reading = _AS_TRAINED,
) -> Method:
    """Return the method of this name, with what it has learned, for `merge` of the same parts.

    The same input gives the same method. All rows are learned from; what comes of it is to be
    judged on others.

    Args:
        name: One of `DATA_METHODS`.
        options: Its options, JSON values.
        base: As `superpose-train --base` has it: a bundle's word, a folder, or a Hub id.
        parts: Of that base.
        rows: By name. RegMean wants rows of each part's domain under its name, and none else; the
            others learn from all of them together, whatever they are called.
        reading: How rows are read.

    Raises:
        MethodError: No such method or option.
        ValueError: No such base, rows that cannot be read or are missing, adapters that the method
            cannot merge, or a loss that is not finite.
    """
    method = read_method(name, options, DATA_METHODS)
    _check_rows(method, parts, rows)
    model, tokenizer = load_base(base, resolve_base(base))
    check_context(model, reading.max_length)
    encoder = TextEncoder(tokenizer, vocabulary_of(model), special_tokens=reading.special_tokens)
    texts = {of: _encoded(encoder, each, of, reading) for of, each in rows.items()}
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ordered = in_order(parts)
    adapted = AdaptedBase(model, tokenizer.eos_token_id, reading.loss_scope, ordered)
    return _LEARNERS[type(method)](method, adapted, ordered, texts)


def _check_rows(method: Method, parts: Sequence[Part], rows: Mapping[str, Sequence[Row]]) -> None:
    if not any(rows.values()):
        raise ValueError(f"{method.name} learns from rows: give it some")
    if not isinstance(method, RegMean):
        return
    domains = {part.domain for part in parts}
    for domain in sorted(domains - {name for name, each in rows.items() if each}):
        raise ValueError(f"regmean needs rows of {domain}: give every domain rows of its own")
    for name in sorted(set(rows) - domains):
        raise ValueError(f"rows of {name}, which is not merged: regmean takes rows of the parts")


def _encoded(
    encoder: TextEncoder, rows: Sequence[Row], name: str, reading: Reading
) -> list[EncodedText]:
    """Return the rows with a token that counts.

    Raises:
        ValueError: There are none.
    """
    texts = [encode(encoder, row, name, reading.max_length, reading.template) for row in rows]
    counting = [text for text in texts if text.first_scored(reading.loss_scope) < len(text.ids)]
    if not counting:
        raise ValueError(
            f"{name}: no answer begins within {reading.max_length} tokens: raise the length"
        )
    return counting
