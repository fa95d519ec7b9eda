"""Batches, labels and the loss of encoded rows, for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from superpose_adapters.scoring import (
    EncodedText,
    Loss,
    Scope,
    loss_of,
    token_log_probabilities,
)
from superpose_train.data import Rows

IGNORED_LABEL = -100

Figures = dict[str, dict[str, float]]
"""{part: {"loss": nats a token, "perplexity", "tokens"}} of the validation and the test rows."""


class NotFinite(ValueError):
    """A loss is NaN or infinite: this setting does not train. The message names loss and step."""


def pad_right(rows: Sequence[EncodedText], pad: int, scope: Scope = "all") -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (batch, longest).

    A label is the token's own id; padding and tokens outside the scope carry none. Whoever takes
    the loss shifts them, so position i predicts label i + 1.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, row in enumerate(rows):
        end = len(row.ids)
        ids[index, :end] = torch.tensor(row.ids)
        mask[index, :end] = 1
        first = row.first_scored(scope)
        labels[index, first:end] = ids[index, first:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def evaluate_loss(
    model: Any, rows: Sequence[EncodedText], pad: int, batch_size: int, scope: Scope = "all"
) -> Loss:
    """Return the token-weighted loss of rows, computed in the model's dtype without autocast."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = Loss()
    # Rows of like length share a batch, so little of it is padding.
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        inputs = {key: value.to(device) for key, value in pad_right(batch, pad).items()}
        ids = inputs["input_ids"]
        logits = model(
            input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        for row, log_probabilities in zip(
            batch, token_log_probabilities(logits, ids).cpu(), strict=True
        ):
            total += loss_of(log_probabilities, row, scope)
    model.train(training)
    return total


def check_finite(value: float, what: str, step: int) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        NotFinite: naming the loss and the step.
    """
    if not math.isfinite(value):
        raise NotFinite(f"{what} is not finite at step {step}; lower --learning-rate")


def figures_by_part(
    measure: Callable[[Sequence[EncodedText]], Loss], rows: Rows, step: int
) -> Figures:
    """Return the losses of the validation and the test rows, as the record has them.

    Raises:
        NotFinite: one of them is not.
    """
    figures: Figures = {}
    for part, texts in (("validation", rows.validation), ("test", rows.test)):
        loss = measure(texts)
        check_finite(loss.mean, "loss", step)
        figures[part] = {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens}
    return figures
