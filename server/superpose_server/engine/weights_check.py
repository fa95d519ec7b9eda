"""The self-check of the real weights: what they give here against what they give in transformers.

They run once, in the mode that will serve, after a few texts were run before anything was packed,
replaced or compiled. Rounding is allowed what a narrow dtype makes of transformers' own pass.

Where a base has experts, rounding can turn the choice of a router, after which all later tokens of
that text are far off, here or in transformers. So a base fails that is far off in every text: a
fault is in all of them, and a turned router is hardly ever in each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superpose_adapters.mix import BoundMix
from superpose_adapters.one_line import with_kind
from superpose_server.engine.probe import distance, percent, random_ids, references, refusal
from superpose_server.engine.runner import Runner
from superpose_server.errors import SelfCheckError
from superpose_server.model.attention import use_own_attention
from superpose_server.model.batch import Span
from superpose_server.model.capacity import positions_of
from superpose_server.model.memory import give_back, is_out_of_memory
from superpose_server.model.widened import widened

_TEXTS = 5
# Tokens of each text's prompt, in pieces, and of its answer, one a pass.
_PIECES, _ANSWER = (7, 9), 4
_LENGTH = sum(_PIECES) + _ANSWER
_SLOT = 0
# How far logits may be from what is right, as a share of their spread: float32 sums in another
# order, and times what a narrower dtype does to transformers' own pass.
_TOLERANCE = 1e-3
_TIMES_OWN_ERROR = 4.0
# What a narrower dtype does where that cannot be measured, in steps between its numbers: sound
# bases of up to 24 layers were off by 0.5 to 3 of them, in most cases by 1.
_ASSUMED_STEPS = 4
# Beyond this a dtype changes what a base says, here as in transformers.
_NOTABLE = 0.25
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """What an untouched base says to some texts.

    Attributes:
        texts: Their tokens, as many of each.
        logits: After each token, float32 (texts, tokens, vocabulary), computed in float32.
        own_error: How far those in its own dtype are from them; see `distance`.
    """

    texts: tuple[tuple[int, ...], ...]
    logits: Tensor
    own_error: float


@torch.inference_mode()
def expect(module: Any, length: int | None = None) -> Expected:
    """Run a few texts through what `load_checkpoint` returns, before it is served.

    Beside the weights it takes room for the parameters of one layer, or of the embedding if that is
    larger, in float32. The module is left as it was.

    Args:
        module: The base, on its device.
        length: Tokens that a row may have; None: as many as the base allows.

    Raises:
        SelfCheckError: Transformers' own pass fails, or its output is not finite.
    """
    use_own_attention(module)
    config = module.config.get_text_config(decoder=True)
    tokens = min(_LENGTH, length or _LENGTH, positions_of(config) or _LENGTH)
    texts = tuple(random_ids(tokens, range(config.vocab_size), seed) for seed in range(_TEXTS))
    try:
        with _buffers_kept(module):
            logits = references(module, texts)
    except Exception as error:  # From anywhere in the class's own code.
        if is_out_of_memory(error):
            raise
        raise refusal(
            module.config, f"it cannot be run, in transformers' own pass either: {with_kind(error)}"
        ) from error
    dtypes = {parameter.dtype for parameter in module.parameters()}
    dtype = next(module.parameters()).dtype
    if not bool(logits.isfinite().all()):
        raise SelfCheckError(
            f"its output is not finite in {_name(dtype)}, in transformers' own pass either: use "
            "another --dtype, or copy the checkpoint again"
        )
    if dtypes == {torch.float32}:
        return Expected(texts, logits, 0.0)
    exact = _in_float32(module, texts)
    if exact is None:
        return Expected(texts, logits, _ASSUMED_STEPS * torch.finfo(dtype).eps)
    own_error = float(distance(logits, exact).median())
    if own_error > _NOTABLE:
        _log.warning(
            "in %s the base's logits are off by %s of their spread from those in float32, in "
            "transformers as well: a --dtype that is less narrow serves it better",
            _name(dtype),
            percent(own_error),
        )
    return Expected(texts, exact, own_error)


@torch.inference_mode()
def check_weights(runner: Runner, expected: Expected) -> None:
    """Run the texts as rows will run, one after the other, on a model that holds the base.

    Raises:
        SelfCheckError: The outcome is another one in each of them.
    """
    allowed = _TOLERANCE + _TIMES_OWN_ERROR * expected.own_error
    tried = []
    for ids, exact in zip(expected.texts, expected.logits, strict=True):
        runner.model.cache.spoil(_SLOT)
        tried.append(_try(runner, ids, exact))
        # Whoever comes next finds the slot as it was.
        runner.model.cache.distrust(_SLOT)
        runner.model.cache.claim(_SLOT)
        _log.debug("weights checked off=%s allowed=%g", tried[-1], allowed)
        if all(off <= allowed for off in tried[-1].values()):
            return
    # The text that comes nearest; what is not a number is never near.
    nearest = min(tried, key=lambda offs: max(_order(off) for off in offs.values()))
    part, off = max(nearest.items(), key=lambda item: _order(item[1]))
    raise refusal(
        runner.model.module.config,
        f"its weights give another {part} here than in transformers: logits are off by "
        f"{percent(off)} of their spread, where rounding explains {percent(allowed)}",
    )


def _order(off: float) -> float:
    return off if off == off else float("inf")


def _try(runner: Runner, ids: tuple[int, ...], exact: Tensor) -> dict[str, float]:
    """Return how far the logits of most tokens are off, in the prompt and in the answer."""
    base = BoundMix(runner.model.base_digest)
    found: dict[str, list[Tensor]] = {}
    begin = 0
    for count in (*_PIECES, *(1,) * _ANSWER):
        piece = ids[begin : begin + count]
        if not piece:
            break
        end = begin + len(piece)
        span = Span(_SLOT, piece, begin, whole=len(ids))
        logits = runner.run([span], range(len(piece)), [base])
        part = "prompt" if count > 1 else "answer"
        # At once, as the logits may be a buffer of the next pass.
        found.setdefault(part, []).append(distance(logits, exact[begin:end]))
        begin = end
    return {part: float(torch.cat(offs).median()) for part, offs in found.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_float32(module: nn.Module, texts: tuple[tuple[int, ...], ...]) -> Tensor | None:
    """Return what the weights give in float32; None, and a warning, if it cannot be computed."""
    try:
        with _buffers_kept(module), widened(module):
            return references(module, texts)
    except Exception as error:  # A class may cast, or read a parameter, where none else does.
        reason = with_kind(error)
    finally:
        # The wide parameters' room is the cache's, whose size goes by what is free.
        give_back()
        torch.cuda.empty_cache()
    _log.warning(
        "what rounding does to the base's logits cannot be measured and is assumed (%s)", reason
    )
    return None


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo that some classes choose frequencies anew for a text, in place or not, and keep them."""
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            part._buffers[name] = buffer.copy_(value)
