"""Which mix is in the weights under `--residency auto`: the one that most rows share, if it pays.

Nobody knows what the next requests will ask for. So the policy is that of the ski rental problem
(Karlin et al., Competitive snoopy caching, 1988): every mix has a debt, what correcting has cost
beyond what it would have cost with that mix resident; when a debt exceeds the price of a fold, that
mix is folded and all debts are forgotten. On traffic of a few mixes the total stays within about
three times the best decision in hindsight, and traffic that swings evenly moves nothing. Only speed
is decided here: rows of every mix run in every step either way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import torch

from superpose_adapters.mix import BoundMix

# Weight that a measurement keeps when the next one comes: the costs follow the last few hundred.
_MEMORY = 0.99
# Pulls a cost that was never seen apart from the others towards zero, in seconds squared.
_RIDGE = 1e-3
_CANDIDATES = 64
# Mixes that could not be folded and are not tried again until so many others could not.
_REFUSED = 1024


class StepCost:
    """A running fit of a step's seconds = a + b x rows + c x corrected rows + d x prompt tokens.

    Steps with prompts count too, or nothing would be known of a server that always has one.
    """

    def __init__(self) -> None:
        """Know nothing: a correction seems to cost nothing until steps say otherwise."""
        self._moments = torch.zeros(4, 4, dtype=torch.float64)
        self._products = torch.zeros(4, dtype=torch.float64)

    def observe(self, rows: int, corrected: int, seconds: float, prompt_tokens: int = 0) -> None:
        """Note a step of so many decoding rows, of which some were corrected."""
        x = torch.tensor([1.0, rows, corrected, prompt_tokens], dtype=torch.float64)
        self._moments = _MEMORY * self._moments + torch.outer(x, x)
        self._products = _MEMORY * self._products + seconds * x

    @property
    def seconds_a_corrected_row(self) -> float:
        """What one corrected row adds to a step, at least 0."""
        ridge = _RIDGE * torch.eye(4, dtype=torch.float64)
        fit = torch.linalg.solve(self._moments + ridge, self._products)
        return max(0.0, float(fit[2]))


class Residency:
    """Chooses what to fold; belongs to the engine thread."""

    def __init__(self) -> None:
        """Begin without measurements: the first fold comes early, since only it tells its price."""
        self.cost = StepCost()
        self._fold_seconds = 0.0
        self._regrets: dict[str, float] = {}
        self._refused: deque[str] = deque(maxlen=_REFUSED)

    def folded(self, seconds: float) -> None:
        """Note what a fold took, its preparation included."""
        self._fold_seconds = max(seconds, 0.5 * self._fold_seconds)
        self._regrets = {}

    def refuse(self, mix: BoundMix) -> None:
        """Do not choose `mix` again soon: it cannot be folded."""
        self._refused.append(mix.digest)

    def choose(self, rows: Sequence[BoundMix], resident: BoundMix) -> BoundMix | None:
        """Return the mix to fold before the next step, if any; called once after each step.

        Args:
            rows: The mixes of the rows that ran.
            resident: What they ran on.
        """
        counts = Counter(mix.digest for mix in rows)
        here = counts[resident.digest]
        cost = self.cost.seconds_a_corrected_row
        known = self._regrets | {mix.digest: self._regrets.get(mix.digest, 0.0) for mix in rows}
        regrets = {
            digest: regret + (counts[digest] - here) * cost
            for digest, regret in known.items()
            if digest != resident.digest and digest not in self._refused
        }
        # Those that a fold would have served best; the rest could not win soon anyway.
        likely = sorted(regrets, key=lambda digest: regrets[digest])[-_CANDIDATES:]
        self._regrets = {digest: regrets[digest] for digest in likely if regrets[digest] > 0}
        for digest in reversed(likely):
            if regrets[digest] <= self._fold_seconds:
                break
            if counts[digest]:
                return next(mix for mix in rows if mix.digest == digest)
        return None
