"""The search for weights that lose least: models of the loss, quadratic and local, no derivatives.

    minimise  loss(w) + penalty * sum(|w|)    over w, each of them within [low, high]

The loss of a mix has few weights, no noise, and is dear: a pass over all rows. Near any point it is
almost quadratic, since the deltas enter the parameters exactly as their weights say. For such
functions models in a trust region need few values (A. R. Conn, K. Scheinberg and L. N. Vicente,
"Introduction to Derivative-Free Optimization", 2009), which evolution strategies spend on noise
and on many valleys. Libraries of the kind want SciPy, and ask for one value at a time; here a
round asks for several, which may share passes.

That weights of adapters are worth a search without derivatives, with such a penalty, is LoRAHub's
idea (arXiv 2307.13269), which sums A's and B's apart. `adapterctl fit` searches exact sums;
`superpose-merge --method lorahub` does as the paper.

Nothing here knows what is weighed, nor how a loss is found.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, ...]
Vector = NDArray[np.float64]

# Weights are multiples of it: finer ones change no loss, and these are what people read.
_STEP = 1e-3
# The search ends where the best point is known to within this.
_SMALLEST_RADIUS = 0.01
_FIRST_RADIUS = 0.5
# Points that are drawn for each place where least is known.
_DRAWN = 32
_SWEEPS = 20


@dataclass(frozen=True)
class Best:
    """The best point so far, its loss without the penalty, and how many points were asked for."""

    point: Point
    loss: float
    evaluations: int


@dataclass(frozen=True)
class Space:
    """Where to search, and for what.

    Attributes:
        dimensions: Number of weights.
        low: Least value of each.
        high: Greatest value of each.
        penalty: Of each unit of a weight, in the loss's own unit.
    """

    dimensions: int
    low: float = -1.0
    high: float = 2.0
    penalty: float = 0.01

    def clip(self, point: Vector) -> Point:
        """Return the nearest point of the search."""
        stepped = np.round(np.round(point / _STEP) * _STEP, 3)
        # Without the sign of a negative 0.
        return tuple(float(value) + 0.0 for value in np.clip(stepped, self.low, self.high))

    def fine(self, point: Point | Vector) -> float:
        """Return the penalty of a point."""
        return self.penalty * float(np.abs(point).sum())


def search(space: Space, budget: int, seed: int = 0) -> Generator[list[Point], Sequence[float]]:
    """Look for the best point; yields points to be sent the loss of each, one round after another.

    The first round has the corners that people try: nothing, each weight alone at 1, all at 1, at
    1/2, and at 1/dimensions. Each further one has the minimiser of a model that is fitted to what
    lies near the best point, and points where least is known. No point is asked for twice. What
    is not finite is worse than anything. `best_of` tells the best of what was found.

    Args:
        space: Where to search.
        budget: Points to ask for, at most; at least 1.
        seed: Of the points where least is known. Same seed and losses, same points.
    """
    random = np.random.default_rng(seed)
    losses: dict[Point, float] = {}
    radius = min(_FIRST_RADIUS, (space.high - space.low) / 2)
    asked = _corners(space)[:budget]
    losses.update(zip(asked, (yield asked), strict=True))
    while radius >= _SMALLEST_RADIUS and len(losses) < budget:
        centre = best_of(losses, space)
        model = _Model.of(losses, centre.point, radius)
        proposed = model.minimiser(space, radius)
        round_ = [] if proposed in losses else [proposed]
        wanted = min(space.dimensions + 1, budget - len(losses)) - len(round_)
        round_ += _unknown(space, centre.point, radius, [*losses, *round_], wanted, random)
        if not round_:
            radius /= 2
            continue
        losses.update(zip(round_, (yield round_), strict=True))
        reached = float(np.abs(np.subtract(proposed, centre.point)).max())
        expected = model.gain(np.asarray(proposed), space)
        gain = _objective(losses, centre.point, space) - _objective(losses, proposed, space)
        if expected > 0 and gain >= 0.5 * expected and reached > 0.9 * radius:
            radius = min(2 * radius, (space.high - space.low) / 2)
        elif not expected > 0 or gain < 0.5 * expected or reached < 0.5 * radius:
            radius /= 2


def best_of(losses: dict[Point, float], space: Space) -> Best:
    """Return the best of the points that have a loss; of equals that of the smallest weights."""
    point = min(
        losses,
        key=lambda each: (_objective(losses, each, space), float(np.abs(each).sum()), each),
    )
    return Best(point, losses[point], len(losses))


def _objective(losses: dict[Point, float], point: Point, space: Space) -> float:
    loss = losses[point]
    return loss + space.fine(point) if math.isfinite(loss) else math.inf


def _corners(space: Space) -> list[Point]:
    count = space.dimensions
    levels = (0.0, 1 / count, 0.5, 1.0)
    points = [np.full(count, level) for level in levels] + list(np.eye(count))
    return list(dict.fromkeys(map(space.clip, points)))


def _unknown(
    space: Space,
    centre: Point,
    radius: float,
    known: Sequence[Point],
    count: int,
    random: np.random.Generator,
) -> list[Point]:
    """Return at most `count` new points near `centre`, each far from all that are known."""
    lowest = np.maximum(np.asarray(centre) - radius, space.low)
    highest = np.minimum(np.asarray(centre) + radius, space.high)
    found: list[Point] = []
    for _ in range(count):
        drawn = random.uniform(lowest, highest, (_DRAWN, space.dimensions))
        near = np.asarray([*known, *found])
        distances = np.abs(drawn[:, None, :] - near[None]).max(-1).min(-1)
        point = space.clip(drawn[int(distances.argmax())])
        if point not in known and point not in found:
            found.append(point)
    return found


@dataclass(frozen=True)
class _Model:
    """The quadratic  slope . d + d . curvature . d / 2  of d = w - centre: loss over that there."""

    centre: Vector
    slope: Vector
    curvature: Vector

    @classmethod
    def of(cls, losses: dict[Point, float], centre: Point, radius: float) -> _Model:
        """Fit it to the points near `centre`, the nearest counting most.

        Where there are fewer than it has coefficients, of all that fit it has the least curvature.
        """
        at = np.asarray(centre)
        count = len(at)
        first, second = np.triu_indices(count)
        finite = [point for point in losses if math.isfinite(losses[point]) and point != centre]
        if not finite:
            return cls(at, np.zeros(count), np.zeros((count, count)))
        # In units of the radius.
        steps = (np.asarray(finite) - at) / radius
        distances = np.abs(steps).max(1)
        coefficients = count + len(first)
        nearest = np.argsort(distances, kind="stable")[: 2 * coefficients]
        steps, distances = steps[nearest], distances[nearest]
        rises = np.asarray([losses[finite[i]] for i in nearest]) - losses[centre]
        products = steps[:, first] * steps[:, second] * np.where(first == second, 0.5, 1.0)
        weights = 1 / (1 + distances**2) ** 1.5
        rows = np.concatenate([steps, products], 1) * weights[:, None]
        # Next to nothing, and next to nothing's hundredth of it for the slope.
        shrink = np.diag(np.concatenate([np.full(count, 1e-6), np.full(len(first), 1e-4)]))
        solved = np.linalg.lstsq(
            np.concatenate([rows, shrink]),
            np.concatenate([rises * weights, np.zeros(coefficients)]),
            rcond=None,
        )[0]
        curvature = np.zeros((count, count))
        curvature[first, second] = curvature[second, first] = solved[count:]
        return cls(at, solved[:count] / radius, curvature / radius**2)

    def rise(self, point: Vector) -> float:
        """Return how much more is lost at a point than at the centre."""
        step = point - self.centre
        return float(self.slope @ step + step @ self.curvature @ step / 2)

    def gain(self, point: Vector, space: Space) -> float:
        """Return how much better a point is than the centre, the penalty included."""
        return space.fine(self.centre) - space.fine(point) - self.rise(point)

    def minimiser(self, space: Space, radius: float) -> Point:
        """Return the best point within the radius and the bounds: one weight at a time, exactly.

        The penalty has a corner at 0, where it leaves a weight that is worth little.
        """
        lowest = np.maximum(self.centre - radius, space.low)
        highest = np.minimum(self.centre + radius, space.high)
        found = []
        # The model may have several valleys.
        for start in (self.centre, lowest, highest):
            point = start.copy()
            for _ in range(_SWEEPS):
                before = point.copy()
                for i in range(len(point)):
                    point[i] = self._along(i, point, lowest[i], highest[i], space.penalty)
                if np.abs(point - before).max() < _STEP / 10:
                    break
            found.append(point)
        return space.clip(max(found, key=lambda each: self.gain(each, space)))

    def _along(self, i: int, point: Vector, low: float, high: float, penalty: float) -> float:
        """Return the best value of weight `i`, the others as they are."""
        step = point - self.centre
        step[i] = 0.0
        slope = float(self.slope[i] + self.curvature[i] @ step)
        bend, middle = float(self.curvature[i, i]), float(self.centre[i])
        tried = [low, high, 0.0]
        if bend > 0:
            tried += [middle - (slope + penalty) / bend, middle - (slope - penalty) / bend]

        def cost(value: float) -> float:
            moved = value - middle
            return slope * moved + bend * moved * moved / 2 + penalty * abs(value)

        # What stands already stays, unless another is better.
        inside = [float(point[i]), *(value for value in tried if low <= value <= high)]
        return min(inside, key=cost)
