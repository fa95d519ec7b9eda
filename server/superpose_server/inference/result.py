"""What a door gets for its requests, in plain types; for text see `generation`."""

from __future__ import annotations

from dataclasses import dataclass

from superpose_adapters.geometry import Analysis
from superpose_adapters.scoring import Loss
from superpose_server.control.default_mix import MixState
from superpose_server.control.registry import Registered
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
class FitProgress:
    """How far a fit is.

    Attributes:
        evaluations: Mixes that were scored.
        budget: Those that may be.
        weights: The best so far, one for each domain of the request.
        loss: Its mean over the rows that are fitted on, nats a token.
    """

    evaluations: int
    budget: int
    weights: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, NaN where there are too few rows for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FitCandidate:
    """What a mix loses, nats a token.

    Attributes:
        mix: The mix.
        fitted_loss: Mean over the rows that are fitted on.
        held_out_loss: Mean over those that are not.
        excess: Of the held-out loss over that of the fitted mix, of the same rows.
        held_out_items: The loss of each row that is held out.
    """

    mix: MixState
    fitted_loss: float
    held_out_loss: Estimate
    excess: Estimate
    held_out_items: tuple[Loss, ...]


@dataclass(frozen=True)
class FitResult:
    """The fitted weights, one for each domain of the request, and what they rest on.

    Attributes:
        weights: 0 where a domain is best left out.
        candidates: The fitted mix; then all domains at weight 1, all at 1/2, each alone, the base.
        fitted_rows: Rows that it was fitted on.
        fitted_tokens: Tokens that count in them.
        held_out: Places of the rows that were held out, among the items of the request.
        held_out_tokens: Tokens that count in them.
        evaluations: Mixes that the search scored.
        warnings: What to know before one trusts it.
    """

    weights: tuple[float, ...]
    candidates: tuple[FitCandidate, ...]
    fitted_rows: int
    fitted_tokens: int
    held_out: tuple[int, ...]
    held_out_tokens: int
    evaluations: int
    warnings: tuple[str, ...]


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


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was merged, and is stored and served.

    Attributes:
        registered: The adapter under its name.
        mix: The default mix then; its generation has grown if it holds the name.
        deviation: Norm of its difference from the plain sum, over the norm of the sum.
        seconds: How long the merging took, without waiting and storing.
    """

    registered: Registered
    mix: MixState
    deviation: float
    seconds: float
