"""Scoring given texts, each under a mix of its own, a slice at a time.

Texts run in the cache's scratch slot, several short ones behind each other, a long one in pieces:
no slice is longer than what running rows may be kept waiting for.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from superpose_adapters.mix import BoundMix
from superpose_server.engine.logprobs import TopLogprobs, logprobs_of
from superpose_server.engine.runner import Runner
from superpose_server.errors import OutputNotFinite
from superpose_server.model.batch import Span


@dataclass(frozen=True)
class ScoreRow:
    """Token ids to score, from the token at index `first` on; `first` is at least 1.

    Where there is no such token there is nothing to score. `top` asks for so many of the likeliest
    tokens in each scored place.
    """

    ids: tuple[int, ...]
    first: int = 1
    top: int = 0

    @property
    def length(self) -> int:
        """Tokens to run: none where nothing is scored."""
        return len(self.ids) if self.first < len(self.ids) else 0


@dataclass(frozen=True)
class RowScore:
    """Log-probabilities of a row's scored tokens, and the likeliest ones in their places."""

    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class _Piece:
    """Tokens begin..end-1 of row `index`, which starts at `start` in the slot."""

    index: int
    start: int
    begin: int
    end: int


def score_slices(
    runner: Runner,
    rows: Sequence[ScoreRow],
    mixes: Sequence[BoundMix],
    slice_tokens: int,
) -> Generator[bool, None, list[RowScore]]:
    """Return the score of each row under the mix in its place, empty where nothing is scored.

    Rows follow each other into slices whatever their mixes are, so that mixes share passes. Those
    of one mix are best given together: a pass of the resident mix alone needs no correction.
    Yields after each slice of at most `slice_tokens` tokens: False in the middle of a text, whose
    keys and values another job must not overwrite.

    Raises:
        OutputNotFinite: The model's output is not finite under the mix of `row`.
        ValueError: There is not one mix for each row.
    """
    if len(mixes) != len(rows):
        raise ValueError(f"{len(rows)} rows with {len(mixes)} mixes: give each its own")
    model = runner.model
    results = [RowScore() for _ in rows]
    model.cache.claim(model.scratch_slot)
    try:
        for pieces in _slices([row.length for row in rows], slice_tokens, model.context_length):
            _score_slice(runner, rows, pieces, mixes, results)
            yield pieces[-1].end == len(rows[pieces[-1].index].ids)
    except BaseException:
        # Where it breaks off, nothing has told whether what lies there is finite.
        model.cache.distrust(model.scratch_slot)
        raise
    return results


def _score_slice(
    runner: Runner,
    rows: Sequence[ScoreRow],
    pieces: list[_Piece],
    mixes: Sequence[BoundMix],
    results: list[RowScore],
) -> None:
    """Add to the `results` of rows what `pieces` of them predict."""
    model = runner.model
    spans = [
        Span(
            *(model.scratch_slot, rows[p.index].ids[p.begin : p.end], p.start + p.begin, p.start),
            whole=len(rows[p.index].ids),
        )
        for p in pieces
    ]
    wanted: list[int] = []
    targets: list[int] = []  # What the logits at `wanted` predict.
    counts: list[int] = []
    offset = 0
    for piece in pieces:
        row = rows[piece.index]
        predicted = range(max(piece.begin + 1, row.first), min(piece.end + 1, len(row.ids)))
        wanted += [offset + i - 1 - piece.begin for i in predicted]
        targets += [row.ids[i] for i in predicted]
        counts.append(len(predicted))
        offset += piece.end - piece.begin
    with torch.inference_mode():
        # (wanted, vocabulary)
        logits = runner.run(spans, wanted, [mixes[piece.index] for piece in pieces])
        following = torch.tensor(targets, dtype=torch.int64, device=model.device)
        most = max(rows[piece.index].top for piece in pieces)
        logprobs, tops = logprobs_of(logits, following, most)
    at = 0
    for piece, count in zip(pieces, counts, strict=True):
        result, top = results[piece.index], rows[piece.index].top
        found = logprobs[at : at + count]
        if not all(map(math.isfinite, found)):
            raise OutputNotFinite(row=piece.index)
        result.logprobs.extend(found)
        if top:
            result.top_logprobs.extend(likeliest.first(top) for likeliest in tops[at : at + count])
        at += count


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
