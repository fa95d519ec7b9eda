"""What a door gets for its requests, in plain types; for text see `generation`."""

from __future__ import annotations

from dataclasses import dataclass

from superpose_adapters.geometry import Analysis
from superpose_adapters.scoring import Loss
from superpose_server.control.default_mix import MixState
from superpose_server.engine.logprobs import TopLogprobs
from superpose_server.weights.resident import Verification


@dataclass(frozen=True)
class ItemScore:
    """Log-probabilities of an item's scored tokens, natural logarithm.

    Attributes:
        logprobs: Of each.
        top_logprobs: The likeliest tokens in the place of each, if asked for.
    """

    logprobs: tuple[float, ...]
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def loss(self) -> Loss:
        """The loss over these tokens."""
        return Loss(-sum(self.logprobs), len(self.logprobs))


@dataclass(frozen=True)
class Scores:
    """The score of each item, and the mix that they were made with."""

    items: tuple[ItemScore, ...]
    mix: MixState

    @property
    def loss(self) -> Loss:
        """The loss over all items."""
        return sum((item.loss for item in self.items), Loss())


@dataclass(frozen=True)
class MixAnalysis:
    """How the domains of a mix interfere, and what a fold (a merge) of it would lose.

    Attributes:
        mix: The mix.
        geometry: Norms, cosines, interference and warnings.
        fold_error: Measured norm(W(mix) - W0 - delta) / norm(delta); 0 is best.
        folded: False if the mix is served by correction (as unmerged LoRA) instead.
        longest_stall_seconds: What this kept the engine from its next step, at most.
    """

    mix: MixState
    geometry: Analysis
    fold_error: float
    folded: bool
    longest_stall_seconds: float


@dataclass(frozen=True)
class VerifiedWeights:
    """What was found of the weights while `mix` was resident.

    Attributes:
        mix: The resident mix, and the generation of the default mix.
        found: What differs.
        longest_stall_seconds: What this kept the engine from its next step, at most.
    """

    mix: MixState
    found: Verification
    longest_stall_seconds: float
