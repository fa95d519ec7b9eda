"""The vocabulary of the study: adapters by how they are trained, models by what is summed.

Everything has a key, a hash of all that determines it. Equal keys mean equal results, but for what
the order of additions changes (machine, threads, who else is in a stack), so a result is computed
once, wherever it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

from benchmarks.study.config import Config
from benchmarks.study.inputs import Inputs
from superpose_adapters.digest import canonical_digest
from superpose_adapters.qa import Part

# Raised when what is stored under a key would be computed differently.
_VERSION = 1
_KEY_DIGITS = 16

Budget = Literal["tokens", "steps"]


@dataclass(frozen=True)
class AdapterSpec:
    """How one adapter is trained.

    Attributes:
        portions: (domain, training rows of it), in the config's order of domains.
        seed: Of rows, order and dropout.
        init_seed: Of the first A.
        block: (i, n): A frozen, block i of n disjoint ones.
    """

    portions: tuple[tuple[str, int], ...]
    seed: int
    init_seed: int
    rank: int
    alpha: float
    template: str
    epochs: float
    batch_size: int
    learning_rate: float
    dropout: float
    block: tuple[int, int] | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """What it is trained on."""
        return tuple(domain for domain, _ in self.portions)

    @property
    def rows(self) -> int:
        """Training rows in all."""
        return sum(rows for _, rows in self.portions)

    @property
    def steps(self) -> int:
        """Steps in all: the last batch of an epoch may be smaller, and counts as one."""
        return math.ceil(math.ceil(self.rows / self.batch_size) * self.epochs)

    @property
    def name(self) -> str:
        """For a reader; not unique."""
        frozen = f" block {self.block[0]}/{self.block[1]}" if self.block else ""
        return f"{'+'.join(self.domains)} r{self.rank} s{self.seed} A{self.init_seed}{frozen}"


Terms = tuple[tuple[AdapterSpec, float], ...]
"""A sum of weighted deltas; () is the base."""


def total(*specs: AdapterSpec, weight: float = 1.0) -> Terms:
    """Return the sum of adapters, each with the same weight."""
    return tuple((spec, weight) for spec in specs)


@dataclass(frozen=True)
class Scoring:
    """One model on one domain's rows."""

    terms: Terms
    domain: str
    template: str
    part: Part = "test"


Pair = tuple[AdapterSpec, AdapterSpec]


@dataclass
class Needs:
    """What an experiment must know; adapters follow from it.

    Attributes:
        scorings: Losses.
        pairs: Cosines.
        activations: Cosines weighted by the covariance of inputs.
        findings: {key: adapters} of what the experiment measures in its own way.
    """

    scorings: dict[Scoring, None] = field(default_factory=dict)
    pairs: dict[Pair, None] = field(default_factory=dict)
    activations: dict[Pair, None] = field(default_factory=dict)
    findings: dict[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)

    def score(self, terms: Terms, scored: Iterable[tuple[str, str]], part: Part = "test") -> None:
        """Ask for a model's losses on (domain, template)s."""
        for domain, template in scored:
            self.scorings[Scoring(terms, domain, template, part)] = None

    def cosines(self, specs: Iterable[AdapterSpec]) -> None:
        """Ask for the cosines of every pair."""
        for pair in combinations(specs, 2):
            self.pairs[pair] = None

    def adapters(self) -> list[AdapterSpec]:
        """Return the adapters that all of it takes, each once."""
        specs = [spec for scoring in self.scorings for spec, _ in scoring.terms]
        specs += [spec for pair in (*self.pairs, *self.activations) for spec in pair]
        specs += [spec for each in self.findings.values() for spec in each]
        return list(dict.fromkeys(specs))


@dataclass(frozen=True)
class Arm:
    """One complete set of adapters: three fundamental ones and four joint ones.

    Attributes:
        name: For a reader.
        shared: All fundamental adapters start from one A.
        seed: Tells arms of a kind apart.
        fundamental: {domain: adapter}.
        joint: {domains: adapter trained on all of them}.
        beside: {domains: the level-2 adapter to sum with the remaining fundamental one}.
    """

    name: str
    shared: bool
    seed: int
    fundamental: Mapping[str, AdapterSpec]
    joint: Mapping[tuple[str, ...], AdapterSpec]
    beside: Mapping[tuple[str, ...], AdapterSpec]


@dataclass(frozen=True)
class Composition:
    """A sum, and the joint model that saw the same rows.

    Attributes:
        name: `math + medicine`, or `math+medicine + finance` where the first is a level-2 adapter.
        domains: Of all its terms.
    """

    name: str
    domains: tuple[str, ...]
    summed: tuple[AdapterSpec, ...]
    merged: AdapterSpec


class Study:
    """A config over its inputs."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        tuned: Mapping[tuple[str, ...], Mapping[str, Any]] | None = None,
    ) -> None:
        """Take the config.

        Args:
            config: What is asked for.
            inputs: What it is asked of.
            tuned: {domains: epochs, batch size, learning rate and dropout that were found for
                them}, if the config applies them.
        """
        self.config = config
        self.inputs = inputs
        self._tuned = tuned or {}

    @property
    def template(self) -> str:
        """The template of all adapters and rows but where an experiment has its own."""
        return self.config.training.template

    def scored(self, domains: Iterable[str]) -> list[tuple[str, str]]:
        """Return (domain, template) for rows in the common template."""
        return [(domain, self.template) for domain in domains]

    def rows(self, domain: str) -> int:
        """Return how many of a domain's training rows are trained on."""
        there = self.inputs.files[domain].rows["train"]
        limit = self.config.training.rows
        return there if limit is None else min(limit, there)

    def spec(
        self, portions: Iterable[tuple[str, int]], *, seed: int, init_seed: int, **changed: Any
    ) -> AdapterSpec:
        """Return how an adapter is trained, by the config but for what is `changed`."""
        order = list(self.config.data.files)
        ordered = tuple(sorted(portions, key=lambda portion: order.index(portion[0])))
        training = self.config.training
        values: dict[str, Any] = {
            "rank": training.rank,
            "alpha": training.alpha,
            "template": training.template,
            "epochs": training.epochs,
            "batch_size": training.batch_size,
            "learning_rate": training.learning_rate,
            "dropout": training.dropout,
        }
        values |= self._tuned.get(tuple(domain for domain, _ in ordered), {})
        return AdapterSpec(ordered, seed, init_seed, **(values | changed))

    def fundamental(
        self, domain: str, seed: int, init_seed: int | None = None, **changed: Any
    ) -> AdapterSpec:
        """Return a domain's own adapter."""
        init = seed if init_seed is None else init_seed
        return self.spec([(domain, self.rows(domain))], seed=seed, init_seed=init, **changed)

    def joint(
        self,
        domains: Iterable[str],
        seed: int,
        *,
        rank: int | None = None,
        budget: Budget | None = None,
    ) -> AdapterSpec:
        """Return the adapter trained on several domains; alpha / rank is that of all others.

        Without a budget it is the paper's: all rows of all domains, epochs and the rest as joint
        adapters have them. With one it is a control: batch size, learning rate and dropout are
        those of the paper's, rows and epochs follow from the fundamental adapters, which may
        have been tuned apart. A row visit is a row in an epoch; rows of each domain are rounded.

        Args:
            domains: What it is trained on.
            seed: Of everything.
            rank: The config's when absent.
            budget: tokens: as many visits to each domain's rows as its fundamental adapter pays,
                in as many epochs as the longest of these takes, so that no domain lacks rows.
                steps: as many steps as a fundamental adapter takes on average, the domains in the
                proportion of their visits.
        """
        named = list(domains)
        training = self.config.training
        of = rank or training.rank
        papers = self.spec(
            [(domain, self.rows(domain)) for domain in named],
            seed=seed,
            init_seed=seed,
            rank=of,
            alpha=training.alpha * of / training.rank,
        )
        if budget is None:
            return papers
        apart = [self.fundamental(domain, seed) for domain in papers.domains]
        epochs = max(each.epochs for each in apart)
        visits = [each.epochs * each.rows for each in apart]
        steps = round(fmean(each.steps for each in apart))
        share = min(1.0, steps * papers.batch_size / sum(visits)) if budget == "steps" else 1.0
        control = replace(
            papers,
            portions=tuple(
                (domain, max(1, round(share * of_domain / epochs)))
                for domain, of_domain in zip(papers.domains, visits, strict=True)
            ),
            epochs=epochs,
        )
        if budget == "tokens":
            return control
        return replace(control, epochs=steps / math.ceil(control.rows / control.batch_size))

    def separate(self, seed: int) -> dict[str, AdapterSpec]:
        """Return the three domains' adapters of a seed, each from an A of its own."""
        return {
            domain: self.fundamental(domain, seed, 1000 * (seed + 1) + i)
            for i, domain in enumerate(self.config.domains)
        }

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of the three domains."""
        return list(combinations(self.config.domains, 2))

    @property
    def unions(self) -> list[tuple[str, ...]]:
        """The three pairs, and all three domains."""
        return [*self.pairs, self.config.domains]

    @cached_property
    def arms(self) -> list[Arm]:
        """Return every arm: shared A, then different A.

        With three shared seeds or more, arms of different A come free: each domain's adapter is
        taken from another seed.
        """
        domains, seeds = self.config.domains, self.config.seeds.shared
        arms = []
        for seed in seeds:
            joint = {union: self.joint(union, seed) for union in self.unions}
            own = {domain: self.fundamental(domain, seed) for domain in domains}
            arms.append(Arm(f"shared A, seed {seed}", True, seed, own, joint, joint))
        if len(seeds) >= 3:
            for at, seed in enumerate(seeds):
                turned = {d: seeds[(at + i) % len(seeds)] for i, d in enumerate(domains)}
                own = {domain: self.fundamental(domain, turned[domain]) for domain in domains}
                joint = {union: self.joint(union, seed) for union in self.unions}
                beside: dict[tuple[str, ...], AdapterSpec] = {}
                for pair in self.pairs:
                    (rest,) = set(domains) - set(pair)
                    after = seeds[(seeds.index(turned[rest]) + 1) % len(seeds)]
                    beside[pair] = self.joint(pair, after)
                arms.append(Arm(f"different A, rotated {seed}", False, seed, own, joint, beside))
        for at, seed in enumerate(self.config.seeds.separate):
            own = self.separate(seed)
            # Arms share no adapter, so that they are independent.
            joint = {union: self.joint(union, seeds[at]) for union in self.unions}
            arms.append(Arm(f"different A, seed {seed}", False, seed, own, joint, joint))
        return arms

    def compositions(self, arm: Arm) -> Iterator[Composition]:
        """Return the seven: three pairs, the triple, three level-2 adapters with the third."""
        for union in self.unions:
            summed = tuple(arm.fundamental[domain] for domain in union)
            yield Composition(" + ".join(union), union, summed, arm.joint[union])
        for pair in self.pairs:
            (rest,) = set(self.config.domains) - set(pair)
            yield Composition(
                f"{'+'.join(pair)} + {rest}",
                self.config.domains,
                (arm.beside[pair], arm.fundamental[rest]),
                arm.joint[self.config.domains],
            )

    # Keys.

    def adapter_key(self, spec: AdapterSpec) -> str:
        """Return the key of an adapter: of everything that determines its tensors."""
        training = self.config.training
        return self._key(
            "adapter",
            asdict(spec),
            [self.inputs.files[domain].sha256 for domain in spec.domains],
            list(training.target_modules),
            training.max_length,
            training.schedule,
            training.loss_scope,
            training.eval_rows,
            # Nothing of float32: all were trained in it before there was a choice.
            *([] if training.precision == "float32" else [training.precision]),
            *self._special_tokens(),
        )

    def rows_key(self, domain: str, part: Part, template: str) -> str:
        """Return the key of rows that are scored."""
        evaluation, training = self.config.evaluation, self.config.training
        limit = evaluation.test_rows if part == "test" else evaluation.validation_rows
        there = self.inputs.files[domain].rows[part]
        return self._key(
            "rows",
            self.inputs.files[domain].sha256,
            part,
            there if limit is None else min(limit, there),
            template,
            training.max_length,
            training.loss_scope,
            *self._special_tokens(),
        )

    def scoring_key(self, scoring: Scoring) -> str:
        """Return the key of losses."""
        terms = sorted((self.adapter_key(spec), weight) for spec, weight in scoring.terms if weight)
        evaluation = self.config.evaluation
        return self._key(
            "losses",
            self.rows_key(scoring.domain, scoring.part, scoring.template),
            evaluation.dtype,
            evaluation.kernels,
            "served" if evaluation.served else "local",
            [list(term) for term in terms],
        )

    def pair_key(self, pair: Pair, *, activations: bool = False) -> str:
        """Return the key of the cosines of two adapters; (a, b) and (b, a) have one."""
        keys = sorted(self.adapter_key(spec) for spec in pair)
        if not activations:
            return self._key("cosines", keys)
        rows = [self.rows_key(d, "validation", self.template) for d in covariance_domains(pair)]
        # Whatever scores, the modules' inputs are looked at in this process.
        evaluation = self.config.evaluation
        return self._key("activations", keys, rows, evaluation.dtype, evaluation.kernels)

    def finding_key(self, kind: str, specs: Iterable[AdapterSpec], *parts: Any) -> str:
        """Return the key of what an experiment measures in its own way."""
        return self._key(kind, [self.adapter_key(spec) for spec in specs], *parts)

    def _special_tokens(self) -> list[list[str]]:
        # Nothing where there are none: rows began with none before they began as texts do.
        return [list(self.inputs.special_tokens)] if self.inputs.special_tokens else []

    def _key(self, kind: str, *parts: Any) -> str:
        base = [self.inputs.base_digest, self.inputs.setup_digest]
        value = [_VERSION, kind, base, *parts]
        return canonical_digest(_plain(value))[:_KEY_DIGITS]


def covariance_domains(pair: Pair) -> list[str]:
    """Return the domains on whose rows the inputs of a pair's modules are looked at."""
    return sorted({domain for spec in pair for domain in spec.domains})


def _plain(value: Any) -> Any:
    """Return tuples as lists and floats as text, so that 1 and 1.0 are one key."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value).hex()
    return value
