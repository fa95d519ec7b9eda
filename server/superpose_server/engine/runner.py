"""The runner: the one way to run tokens under mixes.

Which mix is resident is a matter of speed here, not of meaning: rows whose mix is another one are
corrected. How a pass is run, compiled, captured or with hooks, is decided here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from superpose_adapters.mix import BoundMix
from superpose_server.engine.captured import CapturedSteps
from superpose_server.model.batch import Span
from superpose_server.model.cache import TokenStore
from superpose_server.model.graphs import CaptureError, GpuCapture, Step
from superpose_server.model.model import Model
from superpose_server.model.passes import Way
from superpose_server.weights.corrections import Corrections
from superpose_server.weights.resident import Findings, ResidentWeights, Verification

_log = logging.getLogger(__name__)


class Runner:
    """Runs spans of tokens, each under a mix of its own; belongs to the engine thread."""

    def __init__(
        self,
        model: Model,
        weights: ResidentWeights,
        *,
        capture: Callable[[], Callable[[Step], Step]] = GpuCapture,
    ) -> None:
        """Run on `model`, whose parameters are `weights`.

        Args:
            model: The model. If it is capturable, its decode steps are captured now; if that
                fails, they run as they are, and the log says why.
            weights: Tells which mix is resident.
            capture: Makes what turns a step into its replay.
        """
        self.model = model
        self._weights = weights
        self._captured = CapturedSteps(model) if model.capturable else None
        self._corrections = self._make_corrections()
        if self._captured is not None:
            try:
                self._captured.capture(self._corrections, capture())
            except CaptureError as error:
                _log.warning(
                    "decode steps of this base cannot be captured and run uncaptured, which takes "
                    "longer: %s",
                    error,
                )
                self._captured = None
                self._corrections = self._make_corrections()

    def _make_corrections(self) -> Corrections:
        model = self.model
        return Corrections(
            {name: model.module.get_submodule(name) for name in model.layout},
            model.device,
            heads=model.heads,
            terms=model.terms,
            pool=None if self._captured is None else self._captured.pool,
        )

    @torch.inference_mode()
    def run(
        self, spans: Sequence[Span], wanted: Sequence[int], mixes: Sequence[BoundMix]
    ) -> Tensor:
        """Run `spans`, write their keys and values, and return some logits.

        On packed parameters all tokens share one pass, and a row's logits are the same bits
        whoever shares it. Elsewhere decoding rows run apart from prompts, since a step of theirs
        may be captured; and each row alone, where the base allows no other way.

        Args:
            spans: Tokens of different rows, whose earlier tokens the cache holds.
            wanted: Indices of tokens, counted through all spans, ascending.
            mixes: The mix of each span.

        Returns:
            float32 (len(wanted), vocabulary); on a GPU it may hold until the next call only.
        """
        parts = self._parts(spans)
        if len(parts) == 1:
            return self._pass(spans, wanted, mixes)
        ends = list(accumulate((len(span.ids) for span in spans), initial=0))
        found: list[Tensor] = []
        order: list[int] = []
        for part in parts:
            tokens = [token for i in part for token in range(ends[i], ends[i + 1])]
            at = {token: place for place, token in enumerate(tokens)}
            asked = [place for place, token in enumerate(wanted) if token in at]
            logits = self._pass(
                [spans[i] for i in part],
                [at[wanted[place]] for place in asked],
                [mixes[i] for i in part],
            )
            found.append(logits)
            order += asked
        logits = torch.cat(found)
        if order == list(range(len(order))):
            return logits
        places = torch.tensor(order, device=self.model.device).argsort()
        return logits[places]

    def _parts(self, spans: Sequence[Span]) -> list[list[int]]:
        """Return which spans, by index, share a pass."""
        everything = list(range(len(spans)))
        if self.model.way is not Way.SHARED:
            return [[i] for i in everything]
        decoding = [i for i in everything if spans[i].decodes]
        if self.model.packed or len(decoding) in (0, len(spans)):
            return [everything]
        # The captured one last: what it returns is its buffer.
        return [[i for i in everything if not spans[i].decodes], decoding]

    def corrected(self, mixes: Sequence[BoundMix]) -> int:
        """Return how many rows of these mixes would be corrected now."""
        return self._corrections.count(mixes, self._weights.resident.mix)

    def forget(self, in_use: Sequence[BoundMix] = ()) -> None:
        """Let go of adapters that are in none of `in_use`; see `Corrections.forget`."""
        self._corrections.forget(in_use)

    def check(self) -> Generator[bool, None, Findings]:
        """Check the weights, and what is kept to correct by; see `ResidentWeights.check`."""
        before = self._weights.times_damaged
        copies = yield from self._check_copies()
        return self._conclude((yield from self._weights.check()), copies, before)

    def verify(self) -> Generator[bool, None, Verification]:
        """The same, with a hash of the weights; see `ResidentWeights.verify`."""
        before = self._weights.times_damaged
        copies = yield from self._check_copies()
        found = yield from self._weights.verify()
        return replace(found, findings=self._conclude(found.findings, copies, before))

    def mend(self) -> Generator[bool, None, Findings]:
        """Make anew whatever can be, and check it.

        Raises:
            DataLoss: The weights are no mix at all.
        """
        self._corrections.clear()
        self._weights.mend()
        return (yield from self.check())

    def _check_copies(self) -> Generator[bool, None, tuple[str, ...]]:
        damaged = yield from self._corrections.check(self._weights.adapters)
        if damaged:
            self._weights.note_damage()
        return damaged

    def _conclude(self, found: Findings, copies: tuple[str, ...], before: int) -> Findings:
        # Two checks take turns: one may have passed what broke behind it, and the other found it.
        if self._weights.times_damaged == before:
            self._weights.intact = True
        adapters = tuple(dict.fromkeys((*found.damaged_adapters, *copies)))
        return replace(found, damaged_adapters=adapters)

    def _pass(
        self, spans: Sequence[Span], wanted: Sequence[int], mixes: Sequence[BoundMix]
    ) -> Tensor:
        correction = self._corrections.plan(mixes, self._weights.resident.mix)
        if self._captured is not None and self._captured.can_run(spans, wanted, correction):
            return self._captured.run(spans, correction)
        if isinstance(self.model.cache, TokenStore):
            [span], wanted = spans, list(wanted)
            whole = self.model.cache.whole(span)
            spans, earlier = [whole], len(whole.ids) - len(span.ids)
            wanted = [earlier + token for token in wanted]
        batch = self.model.batch(spans)
        keep = torch.tensor(wanted, dtype=torch.int64, device=self.model.device)
        if self.model.packed:
            # A compiled graph is for two or more of each, and one graph for all gives a row the
            # same bits alone as in a batch. What is written twice is the same twice.
            batch, keep = batch.at_least(2), _at_least(2, keep)
        with self._corrections.applied(correction, batch, keep):
            return self.model.run(batch, keep)[: len(wanted)]


def _at_least(count: int, indices: Tensor) -> Tensor:
    missing = max(0, count - len(indices))
    return torch.cat((indices, indices.new_zeros(missing))) if missing else indices
