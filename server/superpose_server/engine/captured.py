"""Captured decode steps with corrections: what they read keeps its address."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from superpose_server.model.batch import Batch, Span
from superpose_server.model.graphs import DecodeGraphs, Step
from superpose_server.model.model import Model
from superpose_server.weights.corrections import Correction, Corrections
from superpose_server.weights.dense_correction import DenseCorrection, FactorStack

# Ranks of all adapters together that captured steps can correct by. GPT-2 Small's modules take
# 0.6 MB a rank.
_CAPTURED_RANKS = 128


class CapturedSteps:
    """Decode steps of a model, captured without corrections and with them.

    Attributes:
        pool: Factors that the corrected ones read.
    """

    def __init__(self, model: Model) -> None:
        """Make room for the factors; `capture` makes the steps."""
        self._model = model
        shapes = {
            name: (shape.in_features, shape.out_features)
            for name, shape in model.layout.items()
            if name not in model.heads
        }
        # float16 has too small a range for factors.
        dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
        self.pool = FactorStack(shapes, _CAPTURED_RANKS, model.device, dtype)
        # Of the row in each slot.
        self._gates = torch.zeros(
            model.max_batch, _CAPTURED_RANKS, dtype=dtype, device=model.device
        )
        self._gated: tuple[Correction | None, list[int]] = (None, [])

    @torch.inference_mode()
    def capture(self, corrections: Corrections, capture: Callable[[Step], Step]) -> None:
        """Capture all steps, corrected by `corrections`, whose pool is this one's."""
        model = self._model
        static = corrections.dense(self.pool, self._gates)

        def corrected(batch: Batch, keep: Tensor) -> Tensor:
            with corrections.applied(static, batch, keep):
                return model.run(batch, keep)

        self._plain, self._corrected = (
            DecodeGraphs(
                forward,
                rows=model.max_batch,
                length=model.context_length,
                scratch_slot=model.scratch_slot,
                device=model.device,
                capture=capture,
            )
            for forward in (model.run, corrected)
        )

    def can_run(
        self, spans: Sequence[Span], wanted: Sequence[int], correction: Correction | None
    ) -> bool:
        """Return whether there is a captured step for this."""
        fits = isinstance(correction, DenseCorrection) and correction.stack is self.pool
        return (correction is None or fits) and self._plain.can_run(spans, wanted)

    def run(self, spans: Sequence[Span], correction: Correction | None) -> Tensor:
        """Run what `can_run`; see `DecodeGraphs.run`."""
        if not isinstance(correction, DenseCorrection):
            return self._plain.run(spans)
        slots = [span.slot for span in spans]
        # Held, so that no other correction gets its identity.
        if self._gated[0] is not correction or self._gated[1] != slots:
            self._gates.zero_()
            self._gates[slots] = correction.gates
            self._gated = (correction, slots)
        return self._corrected.run(spans)
