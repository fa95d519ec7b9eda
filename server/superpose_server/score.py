"""Scoring given texts under a mix, a slice at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from superpose_adapters.mix import BoundMix
from superpose_adapters.scoring import token_log_probabilities
from superpose_server.corrections import Corrections
from superpose_server.errors import FailedPrecondition
from superpose_server.model import Model
from superpose_server.weights import ResidentWeights

# Padded tokens of one slice. Fixed, and not made to depend on the load, so that the same request
# gives the same bits at any time; small, because running rows wait for a slice to end.
_SLICE_TOKENS = 512


@dataclass(frozen=True)
class ScoreRow:
    """Token ids to score, from the token at index `first` on; `first` is at least 1."""

    ids: tuple[int, ...]
    first: int = 1


def score_slices(
    model: Model,
    corrections: Corrections,
    weights: ResidentWeights,
    rows: list[ScoreRow],
    mix: BoundMix,
) -> Generator[None, None, list[list[float]]]:
    """Return the log-probabilities of each row's scored tokens; yields after each slice.

    Raises:
        FailedPrecondition: The model's output is not finite under this mix.
    """
    results: list[list[float]] = [[] for _ in rows]
    try:
        for indices in _slices([len(row.ids) for row in rows]):
            width = len(rows[indices[0]].ids)
            ids = torch.zeros(len(indices), width, dtype=torch.int64)
            for i, index in enumerate(indices):
                ids[i, : len(rows[index].ids)] = torch.tensor(rows[index].ids)
            ids = ids.to(model.device)
            with torch.inference_mode():
                with corrections.applied(corrections.plan([mix], weights.resident.mix)):
                    logits = model.logits(ids)
                logprobs = token_log_probabilities(logits, ids).cpu()  # (rows, width - 1)
            for i, index in enumerate(indices):
                row = rows[index]
                scored = logprobs[i, row.first - 1 : len(row.ids) - 1]
                if not bool(torch.isfinite(scored).all()):
                    raise FailedPrecondition(
                        "the model's output is not finite under this mix: use smaller weights",
                        "OUTPUT_NOT_FINITE",
                    )
                results[index] = scored.tolist()
            yield
    finally:
        corrections.forget()  # It may hold the last reference to an adapter.
    return results


def _slices(lengths: list[int]) -> list[list[int]]:
    """Group row indices, longest first, so that each group's padded size is within bounds."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = groups[-1] if groups else []
        if group and (len(group) + 1) * lengths[group[0]] <= _SLICE_TOKENS:
            group.append(index)
        else:
            groups.append([index])
    return groups
