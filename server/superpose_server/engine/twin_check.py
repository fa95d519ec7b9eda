"""The self-check of meaning: a base's small random twin here against transformers' own pass.

In float32, on windows and switch-over lengths of a few tokens: rows of different lengths whose
prompts come in pieces, tokens decoded one at a time, and a correction.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.layout import Layout
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.one_line import with_kind
from superpose_server.engine.probe import distance, percent, random_ids, reference, refusal
from superpose_server.engine.runner import Runner
from superpose_server.errors import SelfCheckError
from superpose_server.model.batch import Span
from superpose_server.model.capacity import positions_of
from superpose_server.model.kernels.build import CompilerError
from superpose_server.model.memory import is_out_of_memory
from superpose_server.model.miniature import MiniatureError, make_miniature
from superpose_server.model.model import Model
from superpose_server.weights.resident import ResidentWeights

# Tokens of prompt and answer of each row: longer than a twin's windows; the second becomes longer
# than its switch-over length while it is decoded; the third is far longer than either.
_ROWS = ((21, 4), (9, 6), (80, 4))
_PIECE = 8
_LENGTH = 96
# Tokens of a twin that are no special ones.
_WORDS = range(20, 180)
_RANK = 2
# Norm of a module's delta over that of its parameter.
_DELTA = 0.3
# As a share of the logits' spread; float32 sums in another order stay below 1e-4.
_TOLERANCE = 1e-3


@torch.inference_mode()
def check_meaning(
    model_class: type[nn.Module], config: Any, device: torch.device, *, kernels: bool
) -> None:
    """Check that rows of a class and configuration mean what they mean in transformers.

    Args:
        model_class: A causal language model of transformers.
        config: The base's.
        device: Where it will run.
        kernels: As in `Model`.

    Raises:
        SelfCheckError: They do not, or no twin can be made.
    """
    try:
        twin = make_miniature(model_class, config)
    except MiniatureError as error:
        raise SelfCheckError(f"it cannot be checked: {error}") from error
    try:
        _compare(twin.to(device), config, device, kernels)
    except (SelfCheckError, CompilerError):
        raise
    except Exception as error:  # From anywhere in the class's own code.
        if is_out_of_memory(error):
            raise
        raise refusal(config, f"it cannot be run: {with_kind(error)}") from error


def _compare(twin: Any, config: Any, device: torch.device, kernels: bool) -> None:
    plain = copy.deepcopy(twin)
    positions = positions_of(twin.config.get_text_config(decoder=True))
    model = Model(
        twin,
        base_digest="twin",
        device=device,
        max_batch=len(_ROWS),
        max_length=min(_LENGTH, positions or _LENGTH),
        kernels=kernels,
        graphs=False,
    )
    adapter = _adapter(model.layout, plain)
    mixes = (
        BoundMix(model.base_digest),
        BoundMix.of(model.base_digest, [BoundEntry("twin", adapter, 1.0)]),
        BoundMix(model.base_digest),
    )
    rows = _rows(model.context_length)
    # Of a long text some see later tokens that they do not see in a short one.
    for text in (rows[1].ids, rows[2].ids):
        _refuse_sight_of_later_tokens(plain, text, model.switch)
    weights = ResidentWeights(model.module, model.layout, model.base_digest, None)
    found = _serve(Runner(model, weights), rows, mixes)
    summed = _with_delta(plain, adapter, model.layout)
    for what, module, row, logits in zip(
        ("a row", "a corrected row", "a long row"),
        (plain, summed, plain),
        rows,
        found,
        strict=True,
    ):
        off = distance(logits, _one_by_one(module, row))
        for part, tokens in (("prompt", slice(row.prompt)), ("answer", slice(row.prompt, None))):
            if not float(off[tokens].max()) <= _TOLERANCE:
                raise refusal(
                    config,
                    f"{what} of a small random model of its kind has another {part} here than in "
                    f"transformers: logits are off by {percent(float(off[tokens].max()))} of their "
                    "spread",
                )


@dataclass(frozen=True)
class _Row:
    """A text, of which the first `prompt` tokens are there at once."""

    ids: tuple[int, ...]
    prompt: int


def _rows(room: int) -> list[_Row]:
    rows = []
    for seed, (prompt, answer) in enumerate(_ROWS):
        count = min(prompt + answer, room)
        rows.append(_Row(random_ids(count, _WORDS, seed), max(1, count - answer)))
    return rows


def _serve(runner: Runner, rows: Sequence[_Row], mixes: Sequence[BoundMix]) -> list[Tensor]:
    """Run prompts in pieces and then one token a pass, as the engine does.

    Returns:
        For each row (tokens, vocabulary), what was given after each token when it first ran; what
        was given for prompts are those of whole prompts.
    """
    found: list[list[Tensor]] = [[] for _ in rows]
    computed = [0 for _ in rows]
    known = [row.prompt for row in rows]
    switch = runner.model.switch
    while any(count < len(row.ids) for count, row in zip(computed, rows, strict=True)):
        spans: list[Span] = []
        for slot, text in enumerate(row.ids for row in rows):
            decoding = computed[slot] >= known[slot]
            if decoding:
                known[slot] += 1
                if computed[slot] == switch:
                    computed[slot] = 0  # It runs anew, in pieces again.
            ids = text[computed[slot] : min(computed[slot] + _PIECE, known[slot])]
            if computed[slot] < len(text):
                spans.append(Span(slot, ids, computed[slot], whole=known[slot]))
        count = sum(len(span.ids) for span in spans)
        logits = runner.run(spans, range(count), [mixes[span.slot] for span in spans]).clone()
        given = iter(logits)
        for span in spans:
            part = list(islice(given, len(span.ids)))
            # What runs anew has given its logits before.
            found[span.slot] += part[max(0, len(found[span.slot]) - span.position) :]
            computed[span.slot] = span.end
    return [torch.stack(logits) for logits in found]


def _one_by_one(module: nn.Module, row: _Row) -> Tensor:
    """Return what transformers gives after each token, one uncached pass over the text so far."""
    ends = range(row.prompt + 1, len(row.ids) + 1)
    answer = [reference(module, row.ids[:end])[-1:] for end in ends]
    return torch.cat((reference(module, row.ids[: row.prompt]), *answer))


def _refuse_sight_of_later_tokens(
    module: nn.Module, text: tuple[int, ...], switch: int | None
) -> None:
    if switch is not None and len(text) > switch:
        return
    whole = reference(module, text)
    for end in range(_PIECE, len(text), 2 * _PIECE + 1):
        if not float(distance(reference(module, text[:end]), whole[:end]).max()) <= _TOLERANCE:
            raise SelfCheckError("its tokens see later ones, so that it cannot continue a text")


def _adapter(layout: Layout, module: nn.Module) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, shape in layout.items():
        if shape.tied:
            continue
        a = torch.randn(_RANK, shape.in_features, generator=generator)
        b = torch.randn(shape.out_features, _RANK, generator=generator)
        norm = float(module.get_submodule(name).weight.norm())  # type: ignore[operator]
        modules[name] = Factors(a, b * (_DELTA * norm / float((b @ a).norm())), 1.0)
    return Adapter("twin", modules)


def _with_delta(module: nn.Module, adapter: Adapter, layout: Layout) -> nn.Module:
    summed = copy.deepcopy(module)
    for name, factors in adapter.modules.items():
        delta = layout[name].delta(factors.scaling * (factors.b.double() @ factors.a.double()))
        weight: Any = summed.get_submodule(name).weight
        weight.copy_((weight.double() + delta.to(weight.device)).float())
    return summed
