"""Contestants in turns: everything that is compared runs interleaved, round after round.

Shared machines drift: what ran first an hour ago says nothing about what runs now. So a ratio is
taken within each round, and the median of those ratios is what counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.spread import Spread

Measure = Callable[[], float]


@dataclass
class Rounds:
    """What was measured: {contestant: one value a round}."""

    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of whole rounds."""
        return min((len(values) for values in self.values.values()), default=0)

    def spread(self, name: str) -> Spread:
        """Return median and quartiles of one contestant."""
        return Spread.of(self.values[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """Return median and quartiles of `name` over `baseline`, taken round by round."""
        pairs = zip(self.values[name], self.values[baseline], strict=True)
        return Spread.of([value / base for value, base in pairs])


def run_rounds(
    contestants: Mapping[str, Measure],
    *,
    seconds: float,
    warm_up: int = 1,
    least: int = 3,
    most: int = 100,
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[[str], None] = lambda text: None,
) -> Rounds:
    """Measure all contestants in turns until `seconds` are over.

    Args:
        contestants: Each returns its own value, so that it can set itself up untimed.
        seconds: Budget; no round begins that would probably end after it.
        warm_up: Rounds whose values are thrown away.
        least: Rounds that are run even if the budget is too small.
        most: Rounds that are enough.
        clock: Seconds that pass.
        tell: Is told what runs.
    """
    names = list(contestants)
    rounds = Rounds({name: [] for name in names})
    started = clock()
    for number in range(-warm_up, most):
        began = clock()
        # Another one begins each time, so that nobody always runs after the same neighbour.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            tell(f"warm-up, {name}" if number < 0 else f"round {number + 1}, {name}")
            value = contestants[name]()
            if number >= 0:
                rounds.values[name].append(value)
        now = clock()
        if number + 1 >= least and now + (now - began) > started + seconds:
            break
    return rounds
