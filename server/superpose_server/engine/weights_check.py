"""The self-check of the real weights: what they give here against what they give in transformers.

They run once, in the mode that will serve, after a probe was run before anything was packed,
replaced or compiled. Rounding is allowed what a narrow dtype makes of transformers' own pass.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superpose_adapters.mix import BoundMix
from superpose_server.engine.runner import Runner
from superpose_server.errors import SelfCheckError
from superpose_server.model.batch import Span
from superpose_server.model.capacity import positions_of

# Tokens of a prompt, in pieces, and of an answer, one a pass.
_PIECES, _ANSWER = (11, 13), 4
_PROBE = sum(_PIECES) + _ANSWER
# How far logits may be from what is right, as a share of their spread: float32 sums in another
# order, and times what a narrower dtype does to transformers' own pass.
_TOLERANCE = 1e-3
_TIMES_OWN_ERROR = 4.0
# What a reader will want to know of a configuration, if it is set.
_UNUSUAL = re.compile("window|softcap|capping|sink|chunk|alibi|multiplier|rope_type|scal")
_USUAL: tuple[object, ...] = (None, False, 0, 1, 1.0, "default", {}, [])

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """What an untouched base says to a probe.

    Attributes:
        ids: The probe.
        logits: After each token, float32 (tokens, vocabulary), computed in float32.
        own_error: How far those in its own dtype are from them; see `distance`.
    """

    ids: tuple[int, ...]
    logits: Tensor
    own_error: float


@torch.inference_mode()
def expect(module: Any, length: int | None = None) -> Expected:
    """Run a probe through what `load_checkpoint` returns, before it is served.

    Beside the weights it takes room for one module's parameters in float32 at a time.

    Args:
        module: The base, on its device.
        length: Tokens that a row may have; None: as many as the base allows.

    Raises:
        SelfCheckError: Its output is not finite even in transformers' own pass.
    """
    config = module.config.get_text_config(decoder=True)
    most = length or positions_of(config) or _PROBE
    ids = random_ids(min(_PROBE, most), range(config.vocab_size))
    logits = reference(module, ids)
    dtype = next(module.parameters()).dtype
    if not bool(logits.isfinite().all()):
        raise SelfCheckError(
            f"its output is not finite in {str(dtype).removeprefix('torch.')}, in transformers' "
            "own pass either: use another --dtype, or copy the checkpoint again"
        )
    if dtype == torch.float32:
        return Expected(ids, logits, 0.0)
    with _in_float32(module):
        exact = reference(module, ids)
    return Expected(ids, exact, float(distance(logits, exact).median()))


def check_weights(runner: Runner, expected: Expected) -> None:
    """Run the probe as rows will run, on a model that holds the base.

    Raises:
        SelfCheckError: The outcome is another one.
    """
    ids = expected.ids
    base = BoundMix(runner.model.base_digest)
    found: dict[str, list[Tensor]] = {"prompt": [], "answer": []}
    begin = 0
    for count in (*_PIECES, *(1,) * _ANSWER):
        piece = ids[begin : begin + count]
        if piece:
            logits = runner.run([Span(0, piece, begin)], range(len(piece)), [base])
            part = "prompt" if count > 1 else "answer"
            found[part].append(distance(logits, expected.logits[begin : begin + len(piece)]))
            begin += len(piece)
    allowed = _TOLERANCE + _TIMES_OWN_ERROR * expected.own_error
    for part, distances in found.items():
        # A router that rounding turns is far off at single tokens, which is no fault.
        off = float(torch.cat(distances).median()) if distances else 0.0
        if not off <= allowed:
            raise refusal(
                runner.model.module.config,
                f"its weights give another {part} here than in transformers: logits are off by "
                f"{percent(off)} of their spread, where rounding explains {percent(allowed)}",
            )
    _log.debug("weights checked allowed=%g own_error=%g", allowed, expected.own_error)


def reference(module: Any, ids: tuple[int, ...]) -> Tensor:
    """Return float32 (tokens, vocabulary), what transformers' own pass gives for one text."""
    device = next(module.parameters()).device
    logits: Tensor = module(input_ids=torch.tensor([ids], device=device)).logits
    return logits[0].float()


def distance(found: Tensor, exact: Tensor) -> Tensor:
    """Return how far logits are off at each token, as a share of their spread there."""
    spread = exact - exact.mean(-1, keepdim=True)
    off: Tensor = (found - exact).norm(dim=-1) / spread.norm(dim=-1)
    return off


def refusal(config: Any, what: str) -> SelfCheckError:
    """Return the error of a check, with what is unusual in a base's configuration."""
    fields = config.get_text_config(decoder=True).to_dict()
    fields.update(fields.get("rope_parameters") or {})
    unusual = [
        f"{name}={value}"
        for name, value in sorted(fields.items())
        if _UNUSUAL.search(name) and value not in _USUAL
    ]
    return SelfCheckError(f"{what} ({', '.join([config.model_type, *unusual])})")


def random_ids(count: int, within: range, seed: int = 0) -> tuple[int, ...]:
    """Return tokens to probe with."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(within.start, within.stop, (count,), generator=generator)
    return tuple(drawn.tolist())


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.2g} %"


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Compute in float32, widening each module's parameters only while it runs."""
    with ExitStack() as until:
        for part in module.modules():
            kept = {n: p.data for n, p in part.named_parameters(recurse=False)}
            if not any(data.is_floating_point() for data in kept.values()):
                continue

            def widen(part: nn.Module, *_: object) -> None:
                for parameter in part.parameters(recurse=False):
                    parameter.data = parameter.data.float()

            def narrow(part: nn.Module, *_: object, kept: dict[str, Tensor] = kept) -> None:
                for name, data in kept.items():
                    part.get_parameter(name).data = data

            until.callback(narrow, part)
            until.callback(part.register_forward_pre_hook(widen).remove)
            until.callback(part.register_forward_hook(narrow).remove)
        yield
