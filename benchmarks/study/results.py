"""Finished work, looked up by what it is about; None where it is not done yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.study.statistics import (
    WORST_LOSS,
    Interval,
    Losses,
    join,
    percent_change,
)
from benchmarks.study.study import AdapterSpec, Pair, Scoring, Study, Terms, total
from benchmarks.study.workspace import Workspace
from superpose_adapters.geometry import module_type, rms
from superpose_adapters.qa import Part


@dataclass(frozen=True)
class PairGeometry:
    """How two deltas lie to each other.

    Attributes:
        products: {module: (inner product, norm of one, norm of the other)}.
        sizes: {module: (in, out)}.
    """

    products: Mapping[str, tuple[float, float, float]]
    sizes: Mapping[str, tuple[int, int]]

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
    def floor(self) -> float:
        """RMS of two random deltas' cosines."""
        return rms(1 / math.sqrt(i * o) for i, o in (self.sizes[m] for m in self.cosines))

    @property
    def rms_by_type(self) -> dict[str, float]:
        """RMS over the modules of each type."""
        by_type: dict[str, list[float]] = {}
        for module, cosine in self.cosines.items():
            by_type.setdefault(module_type(module), []).append(cosine)
        return {name: rms(values) for name, values in by_type.items()}

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
        if part != "test":
            tokens = tokens.sum(keepdims=True)
        if "not_finite" in record:
            return Losses(WORST_LOSS * tokens, tokens, (len(tokens),))
        return Losses(np.asarray(record["nats"], dtype=np.float64), tokens, (len(tokens),))

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
        """Return the change of perplexity over those pairs of models that are both known."""
        known = [(first, second) for first, second in pairs if first and second]
        return percent_change(known, self.resamples) if known else None

    def pair(self, pair: Pair, *, activations: bool = False) -> PairGeometry | None:
        """Return how two adapters' deltas lie to each other."""
        record = self._workspace.geometry.get(self.study.pair_key(pair, activations=activations))
        if record is None:
            return None
        products = {module: tuple(values) for module, values in record["products"].items()}
        return PairGeometry(products, self.study.inputs.modules)

    def adapter(self, spec: AdapterSpec) -> dict[str, Any] | None:
        """Return what is kept of an adapter's training."""
        return self._workspace.adapters.get(self.study.adapter_key(spec))

    def finding(self, key: str) -> dict[str, Any] | None:
        """Return what an experiment has measured in its own way."""
        return self._workspace.findings.get(key)
