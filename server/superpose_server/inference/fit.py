"""Fitting the weights of a mix: which rows it is fitted on, what it loses on others, how surely.

`weight_search` says where to look; each of its rounds is one batch of mixes that are scored
together. Some rows are held out, and tell whether what was found holds beyond the rows that it was
found on: what the mixes lose that people try first is measured on the same ones.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superpose_adapters.mix_syntax import format_mix, format_weight
from superpose_adapters.qa import split_key
from superpose_adapters.weight_search import Point, Space, best_of, search
from superpose_server.control.default_mix import MixState
from superpose_server.engine.score import ScoreRow
from superpose_server.errors import InvalidArgument, OutputNotFinite
from superpose_server.inference.request import FitRequest, QuestionAnswer, ScoreItem
from superpose_server.inference.result import (
    Estimate,
    FitCandidate,
    FitProgress,
    FitResult,
    Scores,
)

# Held-out groups below which their figures are said to be weak.
_FEW = 30
_RESAMPLES = 1000
_OUTER = (2.5, 97.5)  # per cent

Scorer = Callable[[Sequence[ScoreRow], Sequence[MixState]], Awaitable[tuple[Scores, ...]]]


@dataclass(frozen=True)
class Sample:
    """Rows that are fitted on, and rows that are held out.

    Attributes:
        fitted: Those that are fitted on.
        held_out: Those that are not, by their places among what was asked; ascending.
        groups: Of each of these, the number that it shares with its twins.
    """

    fitted: list[ScoreRow]
    held_out: dict[int, ScoreRow]
    groups: list[int]

    @classmethod
    def of(
        cls, items: Sequence[ScoreItem], rows: Sequence[ScoreRow], sources: Sequence[int] = ()
    ) -> Sample:
        """Hold about a third of the rows of each source out, chosen by a hash of what twins share.

        Args:
            items: What was asked.
            rows: What is scored of each; those without a token that counts are left out.
            sources: Where each comes from; empty: all from one.

        Raises:
            InvalidArgument: There are no two rows with such a token that are no twins.
        """
        counting = {place: row for place, row in enumerate(rows) if row.length}
        keys = {place: _key(items[place]) for place in counting}
        source_of = {place: sources[place] if sources else 0 for place in counting}
        # Of each key, how many rows of each source.
        sizes: dict[str, Counter[int]] = {}
        for place, key in keys.items():
            sizes.setdefault(key, Counter())[source_of[place]] += 1
        if len(sizes) < 2:
            raise InvalidArgument(
                f"items hold {len(sizes)} different rows with a token that counts: send two or "
                "more, of which one can be held out",
                "TOO_FEW_ROWS",
                field="items",
            )
        order = sorted(sizes, key=lambda key: hashlib.sha256(key.encode()).digest())
        groups: dict[str, int] = {}
        left = _thirds(Counter(source_of.values()))
        for key in order:
            if sizes[key] <= left:
                groups[key] = len(groups)
                left -= sizes[key]
        if not groups:
            groups = {min(order, key=lambda key: sizes[key].total()): 0}
        held_out = {place: row for place, row in counting.items() if keys[place] in groups}
        return cls(
            [row for place, row in counting.items() if place not in held_out],
            held_out,
            [groups[keys[place]] for place in held_out],
        )


def _thirds(counts: Counter[int]) -> Counter[int]:
    """Return a third of each count, rounded so that they add up to a third of all."""
    thirds = Counter({source: count // 3 for source, count in counts.items()})
    missing = counts.total() // 3 - thirds.total()
    # Where most was cut off.
    for source in sorted(counts, key=lambda source: -(counts[source] % 3))[:missing]:
        thirds[source] += 1
    return thirds


def _key(item: ScoreItem) -> str:
    if isinstance(item, QuestionAnswer):
        return split_key(item.question)
    return split_key(item) if isinstance(item, str) else repr(list(item))


async def fit(
    request: FitRequest,
    sample: Sample,
    mix_of: Callable[[Point], MixState],
    score: Scorer,
    most_rows: int,
) -> AsyncGenerator[FitProgress | FitResult]:
    """Search, and yield progress after each round and at last the result.

    Args:
        request: What is asked for.
        sample: Its rows.
        mix_of: Makes the mix of a weight for each domain of the request.
        score: Scores rows under each of some mixes.
        most_rows: Rows times mixes to be scored by one call of it.

    Raises:
        FailedPrecondition: The model's output is not finite under a mix that was tried.
    """
    space = Space(len(request.domains), request.low, request.high, request.penalty)

    async def scored(rows: list[ScoreRow], points: Sequence[Point]) -> list[Scores]:
        at_once = max(1, most_rows // len(rows))
        found: list[Scores] = []
        for start in range(0, len(points), at_once):
            found += await part(rows, points[start : start + at_once])
        return found

    async def part(rows: list[ScoreRow], points: Sequence[Point]) -> tuple[Scores, ...]:
        try:
            return await score(rows, [mix_of(point) for point in points])
        except OutputNotFinite as error:
            point = points[(error.row or 0) // len(rows)]
            mix = format_mix(dict(zip(request.domains, point, strict=True)))
            raise OutputNotFinite(f"{mix}, which is within low and high") from error

    losses: dict[Point, float] = {}
    rounds = search(space, request.most_evaluations, request.seed)
    points = next(rounds)
    while points:
        found = [each.loss.mean for each in await scored(sample.fitted, points)]
        losses.update(zip(points, found, strict=True))
        best = best_of(losses, space)
        yield FitProgress(best.evaluations, request.most_evaluations, best.point, best.loss)
        # Beside the event loop, which answers others meanwhile.
        points = await asyncio.to_thread(_next_round, rounds, found)
    tried = _tried_first(best.point)
    fitted = await scored(sample.fitted, tried)
    held_out = await scored([*sample.held_out.values()], tried)
    yield FitResult(
        weights=best.point,
        candidates=_candidates(sample.groups, fitted, held_out, request.seed),
        fitted_rows=len(sample.fitted),
        fitted_tokens=fitted[0].loss.tokens,
        held_out=tuple(sample.held_out),
        held_out_tokens=held_out[0].loss.tokens,
        evaluations=best.evaluations,
        warnings=tuple(_warnings(request, sample, best.point)),
    )


def _next_round(rounds: Generator[list[Point], Sequence[float]], found: list[float]) -> list[Point]:
    try:
        return rounds.send(found)
    except StopIteration:
        return []


def _tried_first(best: Point) -> list[Point]:
    """Return the fitted weights, and those that people try first: all, half, each alone, none."""
    count = len(best)
    levels = [np.full((1, count), level) for level in (1.0, 0.5, 0.0)]
    corners = np.concatenate([*levels[:2], np.eye(count), levels[2]])
    return list(dict.fromkeys([best, *(tuple(map(float, corner)) for corner in corners)]))


def _candidates(
    groups: Sequence[int], fitted: Sequence[Scores], held_out: Sequence[Scores], seed: int
) -> tuple[FitCandidate, ...]:
    nats = np.asarray([[item.loss.nats for item in scores.items] for scores in held_out])
    tokens = np.asarray([item.loss.tokens for item in held_out[0].items], dtype=np.float64)
    means = _resampled(nats, tokens, np.asarray(groups), seed)
    first = held_out[0].loss.mean
    return tuple(
        FitCandidate(
            on_fitted.mix,
            on_fitted.loss.mean,
            _estimate(on_held_out.loss.mean, means[:, i]),
            _estimate(on_held_out.loss.mean - first, means[:, i] - means[:, 0]),
            tuple(item.loss for item in on_held_out.items),
        )
        for i, (on_fitted, on_held_out) in enumerate(zip(fitted, held_out, strict=True))
    )


def _resampled(
    nats: NDArray[np.float64], tokens: NDArray[np.float64], groups: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """Return mean losses over groups of rows that are drawn anew, the same for all mixes.

    Args:
        nats: (mixes, rows).
        tokens: (rows,).
        groups: (rows,), the group of each, counted from 0; a group is drawn whole.
        seed: Of the draws.

    Returns:
        (draws, mixes), no draws where there is one group only.
    """
    count = int(groups.max()) + 1
    if count < 2:
        return np.empty((0, len(nats)))
    member = groups[:, None] == np.arange(count)  # (rows, groups)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, _RESAMPLES)
    means: NDArray[np.float64] = (draws @ (nats @ member).T) / (draws @ (tokens @ member))[:, None]
    return means


def _estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    if not len(draws):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.percentile(draws, _OUTER)
    return Estimate(value, float(low), float(high))


def _warnings(request: FitRequest, sample: Sample, best: Point) -> list[str]:
    warnings = []
    groups = len(set(sample.groups))
    if groups < _FEW:
        rows = "1 row is" if groups == 1 else f"{groups} different rows are"
        warnings.append(
            f"{rows} held out, which tells little of other rows: send {3 * _FEW} or more in all"
        )
    for domain, weight in zip(request.domains, best, strict=True):
        if weight in (request.low, request.high) and weight != 0:
            warnings.append(
                f"{domain} stands at its bound {format_weight(weight)}: what is beyond may be "
                "better"
            )
    return warnings
