"""Scoring given texts under a mix, a slice at a time.

Texts run in the cache's scratch slot, several short ones behind each other, a long one in pieces:
no slice is longer than what running rows may be kept waiting for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from superpose_adapters.mix import BoundMix
from superpose_server.errors import FailedPrecondition
from superpose_server.model.batch import Span
from superpose_server.model.model import Model
from superpose_server.weights.corrections import Corrections
from superpose_server.weights.resident import ResidentWeights


@dataclass(frozen=True)
class ScoreRow:
    """Token ids to score, from the token at index `first` on; `first` is at least 1."""

    ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True)
class _Piece:
    """Tokens begin..end-1 of row `index`, which starts at `start` in the slot."""

    index: int
    start: int
    begin: int
    end: int


def score_slices(
    model: Model,
    corrections: Corrections,
    weights: ResidentWeights,
    rows: list[ScoreRow],
    mix: BoundMix,
    slice_tokens: int,
) -> Generator[bool, None, list[list[float]]]:
    """Return the log-probabilities of each row's scored tokens.

    Yields after each slice of at most `slice_tokens` tokens: False in the middle of a text, whose
    keys and values another job must not overwrite.

    Raises:
        FailedPrecondition: The model's output is not finite under this mix.
    """
    results: list[list[float]] = [[] for _ in rows]
    for pieces in _slices([len(row.ids) for row in rows], slice_tokens, model.context_length):
        spans = [
            Span(model.scratch_slot, rows[p.index].ids[p.begin : p.end], p.start + p.begin, p.start)
            for p in pieces
        ]
        wanted: list[int] = []
        targets: list[tuple[int, int]] = []  # (row, token that the logits at `wanted` predict)
        offset = 0
        for piece in pieces:
            row = rows[piece.index]
            for i in range(piece.begin, min(piece.end, len(row.ids) - 1)):
                if i + 1 >= row.first:
                    wanted.append(offset + i - piece.begin)
                    targets.append((piece.index, row.ids[i + 1]))
            offset += piece.end - piece.begin
        plan = corrections.plan([mix] * len(spans), weights.resident.mix)
        with torch.inference_mode(), corrections.applied(plan, spans, wanted):
            logits = model.run(spans, wanted, hooked=plan is not None)  # (wanted, vocabulary)
            following = torch.tensor([token for _, token in targets], device=model.device)
            chosen = logits.gather(1, following.long()[:, None])[:, 0]
            logprobs = (chosen - logits.logsumexp(-1)).cpu()
        if not bool(torch.isfinite(logprobs).all()):
            model.cache.clear(model.scratch_slot)
            raise FailedPrecondition(
                "the model's output is not finite under this mix: use smaller weights",
                "OUTPUT_NOT_FINITE",
            )
        for (index, _), value in zip(targets, logprobs.tolist(), strict=True):
            results[index].append(value)
        yield pieces[-1].end == len(rows[pieces[-1].index].ids)
    return results


def _slices(lengths: list[int], slice_tokens: int, room: int) -> Generator[list[_Piece]]:
    """Cut rows of `lengths` tokens into slices that follow each other in a slot of `room`."""
    pieces: list[_Piece] = []
    left = slice_tokens
    start = 0
    for index, length in enumerate(lengths):
        if start + length > room:
            # The slot begins anew, in a slice of its own: earlier rows are still read in this one.
            if pieces:
                yield pieces
            pieces, left, start = [], slice_tokens, 0
        begin = 0
        while begin < length:
            end = min(length, begin + left)
            pieces.append(_Piece(index, start, begin, end))
            left -= end - begin
            begin = end
            if not left:
                yield pieces
                pieces, left = [], slice_tokens
        start += length
    if pieces:
        yield pieces
