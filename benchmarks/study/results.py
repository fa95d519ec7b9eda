"""Finished work, looked up by what it is about; None where it is not done yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study.floor import random_floor
from benchmarks.study.statistics import (
    WORST_LOSS,
    Interval,
    Losses,
    clustered,
    join,
    percent_contrast,
)
from benchmarks.study.study import AdapterSpec, Pair, Scoring, Study, Terms, total
from benchmarks.study.workspace import Workspace
from superpose_adapters.geometry import module_type, rms
from superpose_adapters.qa import Part


def shares_a(pair: Pair) -> bool:
    """Tell whether two adapters started from one A."""
    first, second = pair
    return (first.init_seed, first.rank, first.block) == (
        second.init_seed,
        second.rank,
        second.block,
    )


@dataclass(frozen=True)
class PairGeometry:
    """How two deltas lie to each other.

    Attributes:
        products: {module: (inner product, norm of one, norm of the other)}.
        sizes: {module: (in, out)}.
        shared_rank: Rank of both, if they started from one A; None if from different ones.
    """

    products: Mapping[str, tuple[float, float, float]]
    sizes: Mapping[str, tuple[int, int]]
    shared_rank: int | None = None

    @property
    def cosines(self) -> dict[str, float]:
        """Cosine by module, of those that both adapters change."""
        return {
            module: inner / (first * second)
            for module, (inner, first, second) in self.products.items()
            if first > 0 and second > 0
        }

    @property
    def rms(self) -> float:
        """Root mean square of the modules' cosines: the paper's measure."""
        return rms(self.cosines.values())

    @property
    def floors(self) -> dict[str, float]:
        """RMS cosine by module of deltas that have nothing in common but, maybe, their A."""
        return {m: random_floor(*self.sizes[m], self.shared_rank) for m in self.cosines}

    @property
    def floor(self) -> float:
        """RMS of the floors over the modules."""
        return rms(self.floors.values())

    @property
    def rms_by_type(self) -> dict[str, float]:
        """RMS over the modules of each type."""
        return _rms_by_type(self.cosines)

    @property
    def floor_by_type(self) -> dict[str, float]:
        """RMS of the floors over the modules of each type."""
        return _rms_by_type(self.floors)

    @property
    def weighted(self) -> float:
        """Cosine of the two deltas as wholes: every module counts by its norms."""
        inner = sum(product[0] for product in self.products.values())
        first, second = (
            math.hypot(*(product[i] for product in self.products.values())) for i in (1, 2)
        )
        return inner / (first * second) if first and second else 0.0

    @property
    def weighted_rms(self) -> float:
        """RMS of the cosines, each module by the product of its norms."""
        weights = [first * second for _, first, second in self.products.values()]
        squares = [
            first * second * (inner / (first * second)) ** 2 if first and second else 0.0
            for inner, first, second in self.products.values()
        ]
        return math.sqrt(sum(squares) / sum(weights)) if sum(weights) else 0.0


def _rms_by_type(values: Mapping[str, float]) -> dict[str, float]:
    by_type: dict[str, list[float]] = {}
    for module, value in values.items():
        by_type.setdefault(module_type(module), []).append(value)
    return {name: rms(each) for name, each in by_type.items()}


class Results:
    """What is known of a study."""

    def __init__(self, study: Study, workspace: Workspace) -> None:
        """Look up in `workspace`."""
        self.study = study
        self._workspace = workspace
        self.resamples = study.config.evaluation.resamples

    def loss(
        self, terms: Terms, domain: str, template: str | None = None, part: Part = "test"
    ) -> Losses | None:
        """Return a model's losses on a domain's rows; of validation rows only their sum is kept."""
        scoring = Scoring(terms, domain, template or self.study.template, part)
        record = self._workspace.losses.get(self.study.scoring_key(scoring))
        rows = self._workspace.rows.get(
            self.study.rows_key(domain, part, template or self.study.template)
        )
        if record is None or rows is None:
            return None
        tokens = np.asarray(rows["tokens"], dtype=np.float64)
        groups = rows["groups"]
        if part != "test":
            tokens, groups = tokens.sum(keepdims=True), [0]
        if "not_finite" in record:
            nats = WORST_LOSS * tokens
        else:
            nats = np.asarray(record["nats"], dtype=np.float64)
        # Named without the template: the same rows in two templates are resampled alike.
        return clustered(f"{domain} {part}", nats, tokens, groups)

    def union(
        self, terms: Terms, scored: Iterable[tuple[str, str]], part: Part = "test"
    ) -> Losses | None:
        """Return a model's losses on the rows of several (domain, template)s."""
        parts = [self.loss(terms, domain, template, part) for domain, template in scored]
        found = [each for each in parts if each is not None]
        return join(found) if found and len(found) == len(parts) else None

    def router(
        self, own: Mapping[str, AdapterSpec], templates: Mapping[str, str] | None = None
    ) -> Losses | None:
        """Return the losses where an oracle gives each domain's rows to its own adapter."""
        parts = [
            self.loss(total(spec), domain, (templates or {}).get(domain))
            for domain, spec in own.items()
        ]
        found = [each for each in parts if each is not None]
        return join(found) if found and len(found) == len(parts) else None

    def perplexity(self, terms: Terms, domains: Iterable[str], part: Part = "test") -> float | None:
        """Return a model's perplexity on the rows of some domains."""
        found = self.union(terms, self.study.scored(domains), part)
        return None if found is None else found.perplexity

    def change(self, pairs: Iterable[tuple[Losses | None, Losses | None]]) -> Interval | None:
        """Return the change of perplexity from the first to the second model of pairs, one a seed.

        It is over those pairs of which both models are known, and says of how many; None if there
        is none.
        """
        return self.contrast([((-1.0, first), (1.0, second)) for first, second in pairs])

    def contrast(
        self, contrasts: Sequence[Sequence[tuple[float, Losses | None]]]
    ) -> Interval | None:
        """Return the contrast of mean losses, one a seed, of those seeds that are known.

        See `percent_contrast`.
        """
        known = []
        for contrast in contrasts:
            found = [(factor, each) for factor, each in contrast if each is not None]
            if len(found) == len(contrast):
                known.append(found)
        if not known:
            return None
        return percent_contrast(known, self.resamples, asked=len(contrasts))

    def pair(self, pair: Pair, *, activations: bool = False) -> PairGeometry | None:
        """Return how two adapters' deltas lie to each other."""
        record = self._workspace.geometry.get(self.study.pair_key(pair, activations=activations))
        if record is None:
            return None
        products = {module: tuple(values) for module, values in record["products"].items()}
        shared_rank = pair[0].rank if shares_a(pair) else None
        return PairGeometry(products, self.study.inputs.modules, shared_rank)

    def adapter(self, spec: AdapterSpec) -> dict[str, Any] | None:
        """Return what is kept of an adapter's training."""
        return self._workspace.adapters.get(self.study.adapter_key(spec))

    def finding(self, key: str) -> dict[str, Any] | None:
        """Return what an experiment has measured in its own way."""
        return self._workspace.findings.get(key)
