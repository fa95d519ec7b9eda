"""A frozen base under deltas that are given as factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from superpose_adapters.merge.merge import Part
from superpose_adapters.merge.term import Pair
from superpose_adapters.scoring import EncodedText, Loss, Scope, token_log_probabilities
from superpose_train.loss import IGNORED_LABEL, evaluate_loss, pad_right
from superpose_train.schedule import EVALUATION_BATCH
from superpose_train.stacked.factors import Corrector, Shape


class AdaptedBase:
    """A frozen base, the modules of some adapters under deltas that change from pass to pass.

    Deltas are never folded: a pass corrects, so that gradients reach the factors.

    Attributes:
        model: A transformers model in float32. Without deltas it is the base.
        modules: {name: (in, out)} of the modules that any of the adapters adapts, sorted.
    """

    def __init__(self, model: Any, pad: int, scope: Scope, parts: Sequence[Part]) -> None:
        """Freeze and hook a model; `pad` is any token id, `scope` says which tokens count."""
        self.model = model.requires_grad_(False).eval()
        shapes = {
            name: (factors.a.shape[1], factors.b.shape[0])
            for part in parts
            for name, factors in part.adapter.modules.items()
        }
        self.modules = dict(sorted(shapes.items()))
        self._pad = pad
        self._scope: Scope = scope
        self._device = next(model.parameters()).device
        rank = max(part.adapter.rank for part in parts)
        self._corrector = Corrector(
            model, Shape(tuple((name, *shape) for name, shape in self.modules.items()), rank)
        )

    @contextmanager
    def under(self, pairs: Mapping[str, Pair]) -> Iterator[None]:
        """Have passes within run under these deltas, b @ a; modules that are left out have none."""
        factors = {}
        for name, (inputs, outputs) in self.modules.items():
            a, b = pairs.get(name) or (torch.empty(0, inputs), torch.empty(outputs, 0))
            factors[name] = (self._on_device(a), self._on_device(b))
        with self._corrector.using(factors, torch.ones(1, 1, 1, device=self._device)):
            yield

    def _on_device(self, factor: Tensor) -> Tensor:
        return factor.to(self._device, torch.float32).unsqueeze(0)

    def padded(self, rows: Sequence[EncodedText]) -> dict[str, Tensor]:
        """Return a batch of rows as `pad_right` has it, where the model computes."""
        batch = pad_right(rows, self._pad, self._scope)
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run a padded batch; return (rows, longest, vocabulary)."""
        logits: Tensor = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ).logits
        return logits

    def mean_loss(self, rows: Sequence[EncodedText]) -> Tensor:
        """Return nats a token of one batch of rows, a scalar with its gradient."""
        batch = self.padded(rows)
        log_probabilities = token_log_probabilities(self.logits(batch), batch["input_ids"])
        return -log_probabilities[batch["labels"][:, 1:] != IGNORED_LABEL].mean()

    def loss(self, rows: Sequence[EncodedText]) -> Loss:
        """Return the loss of any number of rows."""
        return evaluate_loss(self.model, rows, self._pad, EVALUATION_BATCH, self._scope)
