"""Which mix is in the weights under `--residency auto`: the one that most rows share, if it pays.

Nobody knows what the next requests will ask for. So the policy is that of the ski rental problem
(Karlin et al., Competitive snoopy caching, 1988): keep correcting until what correcting has cost
beyond the best other choice exceeds the price of a fold, then fold. Whatever comes, the total is at
most about twice that of the best decision in hindsight, and traffic that swings back and forth
moves nothing. Only speed is decided here: rows of every mix run in every step either way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from superpose_adapters.mix import BoundMix

# Weight that a measurement keeps when the next one comes: the costs follow the last few hundred.
_MEMORY = 0.99
# Pulls a cost that was never seen apart from the others towards zero, in seconds squared.
_RIDGE = 1e-3


class StepCost:
    """A running fit of seconds = a + b x rows + c x corrected rows over decode steps."""

    def __init__(self) -> None:
        """Know nothing: a correction seems to cost nothing until steps say otherwise."""
        self._moments = torch.zeros(3, 3, dtype=torch.float64)
        self._products = torch.zeros(3, dtype=torch.float64)

    def observe(self, rows: int, corrected: int, seconds: float) -> None:
        """Note a step."""
        x = torch.tensor([1.0, rows, corrected], dtype=torch.float64)
        self._moments = _MEMORY * self._moments + torch.outer(x, x)
        self._products = _MEMORY * self._products + seconds * x

    @property
    def seconds_a_corrected_row(self) -> float:
        """What one corrected row adds to a step, at least 0."""
        ridge = _RIDGE * torch.eye(3, dtype=torch.float64)
        fit = torch.linalg.solve(self._moments + ridge, self._products)
        return max(0.0, float(fit[2]))


class Residency:
    """Chooses what to fold; belongs to the engine thread."""

    def __init__(self) -> None:
        """Begin without measurements and without regret."""
        self.cost = StepCost()
        self._fold_seconds = 0.0
        self._regret = 0.0
        self._candidate = ""
        self._refused: set[str] = set()

    def folded(self, seconds: float) -> None:
        """Note what a fold took, its preparation included."""
        self._fold_seconds = max(seconds, 0.5 * self._fold_seconds)
        self._regret, self._candidate = 0.0, ""

    def refuse(self, mix: BoundMix) -> None:
        """Never choose `mix` again: it cannot be folded."""
        self._refused.add(mix.digest)

    def choose(self, rows: Sequence[BoundMix], resident: BoundMix) -> BoundMix | None:
        """Return the mix to fold before the next step, if any; called once after each step.

        Args:
            rows: The mixes of the rows that ran.
            resident: What they ran on.
        """
        counts = Counter(mix.digest for mix in rows if mix.digest not in self._refused)
        if not counts:
            return None
        digest, most = counts.most_common(1)[0]
        spared = most - counts[resident.digest]
        if spared <= 0:
            # What is resident serves the rows as well as anything: the debt is forgotten slowly,
            # so that a pause between requests of one mix does not restart it.
            self._regret *= _MEMORY
            return None
        if digest != self._candidate:
            self._regret, self._candidate = 0.0, digest
        self._regret += spared * self.cost.seconds_a_corrected_row
        if self._regret <= self._fold_seconds:
            return None
        return next(mix for mix in rows if mix.digest == digest)
