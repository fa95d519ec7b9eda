"""Every claim comes out every way, from hand-made losses and cosines."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmarks.study.config import (
    Blocks,
    Controls,
    Data,
    Lambdas,
    Orthogonal,
    Overlap,
    Prediction,
    Seeds,
    Templates,
    Unlearning,
    bundled_configs,
    read_config,
)
from benchmarks.study.experiments import (
    blocks,
    compositions,
    controls,
    lambdas,
    orthogonal,
    overlap,
    prediction,
    seeds,
    templates,
    unlearning,
)
from benchmarks.study.front import summary
from benchmarks.study.plan import wanted
from benchmarks.study.statistics import Interval
from benchmarks.study.study import Pair, Scoring, Study
from benchmarks.study.verdict import Verdict, at_least, at_most, every, exactly
from tests.benchmarks.study.conftest import MakeStudy
from tests.benchmarks.study.made_results import Made

HOLDS, FAILS, OPEN, NOT_RUN = Verdict.HOLDS, Verdict.FAILS, Verdict.OPEN, Verdict.NOT_RUN
_SEEDS = (0, 1, 2)
_MODULES = {"h.0.attn.c_attn": (8, 24), "h.0.mlp.c_proj": (32, 8)}


def _jitter(seed: int, spread: float) -> float:
    return spread * (seed % 3 - 1)


def _seed(scoring: Scoring) -> int:
    return scoring.terms[0][0].init_seed if scoring.terms else 0


def _is_sum(scoring: Scoring) -> bool:
    return len(scoring.terms) > 1


Loss = Callable[[Scoring], float | None]
Cosine = Callable[[Pair, str], float]
Norm = Callable[[Pair], float]


def _flat(_: Scoring) -> float:
    return 1.0


def _tenth(*_: object) -> float:
    return 0.1


def _one(_: Pair) -> float:
    return 1.0


@dataclass(frozen=True)
class World:
    """What is so, and what must come of it."""

    experiment: ModuleType
    claim: int
    expected: Verdict
    loss: Loss = _flat
    cosine: Cosine = _tenth
    norm: Norm = _one


# Compositions: what sums cost over joint adapters, in nats.


def _sums(pair: float, triple: float, spread: float = 0.0) -> Loss:
    def loss(scoring: Scoring) -> float:
        if not _is_sum(scoring):
            return 1.0
        cost = pair if len(scoring.terms) == 2 else triple
        return 1.0 + cost + _jitter(_seed(scoring), spread)

    return loss


def _triple_against_pairs(spread: float) -> Loss:
    """Pairs cost the same in every seed; the triple does not."""

    def loss(scoring: Scoring) -> float:
        if not _is_sum(scoring):
            return 1.0
        return 1.2 if len(scoring.terms) == 2 else 1.2 + _jitter(_seed(scoring), spread)

    return loss


_PAIR_COST: dict[tuple[str, ...], float] = {("a", "b"): 0.1, ("a", "c"): 0.2, ("b", "c"): 0.3}


def _by_pair(scoring: Scoring) -> float:
    domains = tuple(domain for spec, _ in scoring.terms for domain in spec.domains)
    if not _is_sum(scoring):
        return 1.0
    return 1.0 + _PAIR_COST.get(domains, 0.0)


def _ordered(sign: Callable[[int], float]) -> Cosine:
    """Cosines in the order of the costs of pairs, or against it, seed by seed."""

    def cosine(pair: Pair, _: str) -> float:
        domains = tuple(domain for spec in pair for domain in spec.domains)
        cost = _PAIR_COST.get(domains, 0.2)
        return float(0.5 + sign(pair[0].init_seed) * cost)

    return cosine


# Seeds: cosines by how two adapters are related.


def _related(same: float, different: float, ceiling: float, spread: float = 0.0) -> Cosine:
    def cosine(pair: Pair, _: str) -> float:
        first, second = pair
        shared = first.init_seed == second.init_seed
        if first.domains == second.domains:
            return same if shared else ceiling
        jitter = _jitter(first.init_seed + second.init_seed, spread)
        return same if shared else different * (1 + jitter)

    return cosine


def _carried(share: float, spread: float = 0.0) -> Cosine:
    """mlp.c_proj carries a share of the sum of squares."""

    def cosine(pair: Pair, module: str) -> float:
        carried = share + _jitter(pair[0].init_seed, spread)
        return float((carried if module.endswith("mlp.c_proj") else 1 - carried) ** 0.5 / 2)

    return cosine


# Controls: what rank and rows do to a joint adapter.


def _joint(wide: float, fewer: float, spread: float = 0.0) -> Loss:
    def loss(scoring: Scoring) -> float:
        (spec, _), *rest = scoring.terms
        if rest:
            return 1.0
        value = 1.0 + (wide if spec.rank > 4 else 0.0) + (fewer if spec.rows < 300 else 0.0)
        return value + (_jitter(spec.seed, spread) if spec.rank > 4 or spec.rows < 300 else 0.0)

    return loss


# Lambdas: loss by weight, least at `best`, and how far above the joint adapter.


def _weighted(best: float, at_one: float, behind: float, spread: float = 0.0) -> Loss:
    def loss(scoring: Scoring) -> float:
        if not _is_sum(scoring):
            return 1.0
        weight = scoring.terms[0][1]
        shift = _jitter(_seed(scoring), spread)
        if weight == best:
            return 1.0 + behind + shift
        return 1.0 + behind + at_one if weight == 1.0 else 3.0

    return loss


def _own_templates(smaller: float, spread: float = 0.0) -> Cosine:
    def cosine(pair: Pair, _: str) -> float:
        own = pair[0].template != pair[1].template
        return 0.3 * (1 - smaller + _jitter(pair[0].init_seed, spread)) if own else 0.3

    return cosine


def _own_interference(lower: float, spread: float = 0.0) -> Loss:
    """Sums of adapters with templates of their own lose less, by so many nats."""

    def loss(scoring: Scoring) -> float:
        if not _is_sum(scoring):
            return 1.0
        if not scoring.template[0].isdigit():
            return 1.5
        return 1.5 - lower + _jitter(_seed(scoring), spread)

    return loss


def _shares(growth: float, spread: float = 0.0) -> Cosine:
    """The cosine grows e-fold by `growth` from share 0 to 1."""

    def cosine(pair: Pair, _: str) -> float:
        rows = dict(pair[1].portions)
        share = rows.get("a", 0) / sum(rows.values())
        slope = growth + _jitter(pair[0].init_seed, spread)
        return float(0.1 * 2.718281828 ** (slope * share))

    return cosine


def _against_base(at_one: float, at_best: float, spread: float = 0.0) -> Loss:
    """Sums of four against the base, whose loss is 2; weight 0.4 is the best."""

    def loss(scoring: Scoring) -> float:
        if not scoring.terms:
            return 2.0
        if len(scoring.terms) < 4:
            return 1.0
        shift = _jitter(_seed(scoring), spread)
        weight = scoring.terms[0][1]
        if scoring.part == "validation":
            return 1.0 if weight == 0.4 else 2.0
        return 2.0 + shift + (at_one if weight == 1.0 else at_best)

    return loss


_HARM = {"a": 0.1, "b": 0.2, "c": 0.35, "d": 0.7, "e": 0.5}


def _foretold(by_cosine: bool) -> tuple[Loss, Cosine]:
    """A sum costs what its cosine says, or no more than whether A is shared says."""

    def strength(domains: tuple[str, ...], shared: bool) -> float:
        own = _HARM[domains[0]] * _HARM[domains[1]]
        return own * (2 if shared else 1)

    def loss(scoring: Scoring) -> float:
        if not _is_sum(scoring):
            return 1.0
        (first, _), (second, _) = scoring.terms
        shared = first.init_seed == second.init_seed
        domains = (*first.domains, *second.domains)
        cost = strength(domains, shared) if by_cosine else 0.5 if shared else 0.1
        return 1.0 + cost * (1 + 0.05 * _scattered(scoring))

    def cosine(pair: Pair, _: str) -> float:
        first, second = pair
        shared = first.init_seed == second.init_seed
        if first.domains == second.domains:
            return 0.9
        return strength((*first.domains, *second.domains), shared)

    return loss, cosine


def _scattered(of: Scoring | Pair) -> float:
    """Something of every sum or pair that has nothing to do with anything else, 0 to 1."""
    specs = [spec for spec, _ in of.terms] if isinstance(of, Scoring) else of
    text = " ".join(f"{'+'.join(spec.domains)} {spec.init_seed}" for spec in specs)
    text += f" {type(of).__name__}"
    return zlib.crc32(text.encode()) / 2**32


def _sized(pair: Pair, noise: float) -> float:
    """Norms whose product has the logarithm that the sum costs, but for noise."""
    return math.exp(_noisy(pair, "", noise) / 2)


def _noisy(pair: Pair, module: str, noise: float) -> float:
    return _foretold(True)[1](pair, module) + noise * _scattered(pair)


_WORLDS = [
    World(compositions, 0, HOLDS, _sums(0.1, 0.3)),
    World(compositions, 0, FAILS, _sums(0.4, 0.5)),
    World(compositions, 0, OPEN, _sums(0.2, 0.3, 0.3)),
    World(compositions, 1, HOLDS, _sums(0.1, 0.3)),
    # The costs of seeds go together: three is more than two in every one of them.
    World(compositions, 1, HOLDS, _sums(0.1, 0.3, 0.3)),
    World(compositions, 1, FAILS, _sums(0.3, 0.1)),
    World(compositions, 1, OPEN, _triple_against_pairs(0.1)),
    World(compositions, 2, HOLDS, _by_pair, _ordered(lambda seed: 1)),
    World(compositions, 2, FAILS, _by_pair, _ordered(lambda seed: -1)),
    World(compositions, 2, OPEN, _by_pair, _ordered(lambda seed: 1 if seed else -1)),
    World(seeds, 0, HOLDS, cosine=_related(0.3, 0.05, 0.1)),
    World(seeds, 0, FAILS, cosine=_related(0.3, 0.25, 0.3)),
    World(seeds, 0, OPEN, cosine=_related(0.3, 0.14, 0.3, 0.4)),
    World(seeds, 1, HOLDS, cosine=_related(0.3, 0.05, 0.1)),
    World(seeds, 1, FAILS, cosine=_related(0.3, 0.1, 0.1)),
    World(seeds, 1, OPEN, cosine=_related(0.3, 0.089, 0.1, 0.4)),
    World(seeds, 2, HOLDS, cosine=_carried(0.95)),
    World(seeds, 2, FAILS, cosine=_carried(0.6)),
    World(seeds, 2, OPEN, cosine=_carried(0.8, 0.15)),
    World(controls, 0, HOLDS, _joint(-0.3, 0.2)),
    World(controls, 0, FAILS, _joint(0.0, 0.2)),
    World(controls, 0, OPEN, _joint(-0.1, 0.2, 0.1)),
    World(controls, 1, HOLDS, _joint(-0.3, 0.2)),
    World(controls, 1, FAILS, _joint(-0.3, 0.0)),
    World(controls, 1, OPEN, _joint(-0.3, 0.1, 0.1)),
    World(lambdas, 0, HOLDS, _weighted(0.5, 0.3, 0.2)),
    World(lambdas, 0, FAILS, _weighted(0.5, 0.01, 0.2)),
    World(lambdas, 0, FAILS, _weighted(1.0, 0.0, 0.2)),
    World(lambdas, 0, OPEN, _weighted(0.5, 0.2, 0.2, 0.15)),
    World(lambdas, 1, HOLDS, _weighted(0.5, 0.3, 0.2)),
    World(lambdas, 1, FAILS, _weighted(0.5, 0.3, 0.0)),
    World(lambdas, 1, OPEN, _weighted(0.5, 0.3, 0.1, 0.1)),
    World(templates, 0, HOLDS, cosine=_own_templates(0.5)),
    World(templates, 0, FAILS, cosine=_own_templates(0.1)),
    World(templates, 0, OPEN, cosine=_own_templates(0.3, 0.2)),
    World(templates, 1, HOLDS, _own_interference(0.3)),
    World(templates, 1, FAILS, _own_interference(0.0)),
    World(templates, 1, OPEN, _own_interference(0.1, 0.1)),
    World(orthogonal, 0, HOLDS, cosine=lambda *_: 1e-9),
    World(orthogonal, 0, FAILS, cosine=lambda *_: 1e-3),
    World(orthogonal, 1, HOLDS, _sums(0.1, 0.3)),
    World(orthogonal, 1, FAILS, _sums(0.1, 0.0)),
    World(orthogonal, 1, OPEN, _sums(0.1, 0.1, 0.1)),
    World(overlap, 0, HOLDS, cosine=_shares(0.5)),
    World(overlap, 0, FAILS, cosine=_shares(0.05)),
    World(overlap, 0, OPEN, cosine=_shares(0.3, 0.2)),
    World(overlap, 1, HOLDS, cosine=_shares(0.5)),
    World(overlap, 1, FAILS, cosine=_shares(0.05)),
    World(overlap, 1, OPEN, cosine=_shares(0.3, 0.2)),
    World(blocks, 0, HOLDS, _against_base(0.3, -0.3)),
    World(blocks, 0, FAILS, _against_base(-0.3, -0.3)),
    World(blocks, 0, OPEN, _against_base(0.05, -0.3, 0.1)),
    World(blocks, 1, HOLDS, _against_base(0.3, -0.3)),
    World(blocks, 1, FAILS, _against_base(0.3, 0.3)),
    World(blocks, 1, OPEN, _against_base(0.3, -0.05, 0.1)),
    World(prediction, 0, HOLDS, *_foretold(True)),
    # Cosines that tell a shared A from others and no more: R2 is high, and says nothing of them.
    World(prediction, 0, FAILS, _foretold(False)[0], _related(0.3, 0.05, 0.4)),
    World(prediction, 0, FAILS, _scattered, lambda pair, _: _scattered(pair)),
    World(prediction, 0, OPEN, _foretold(True)[0], lambda p, m: _noisy(p, m, 0.35)),
    World(prediction, 1, HOLDS, *_foretold(True)),
    World(prediction, 1, FAILS, _foretold(True)[0], lambda p, m: 0.99 - _foretold(True)[1](p, m)),
    World(prediction, 1, OPEN, _foretold(True)[0], lambda p, m: _noisy(p, m, 0.3)),
    World(prediction, 2, HOLDS, _foretold(True)[0], norm=lambda p: _sized(p, 0.0)),
    # Norms that say what the cosines say are no better than these.
    World(prediction, 2, FAILS, *_foretold(True), norm=lambda p: _sized(p, 0.0)),
    World(prediction, 2, FAILS, _foretold(True)[0]),
    World(prediction, 2, OPEN, _foretold(True)[0], norm=lambda p: _sized(p, 0.35)),
]


def _world_name(world: World) -> str:
    name = world.experiment.__name__.rpartition(".")[2]
    return f"{name}-{world.claim}-{world.expected.value.replace(' ', '-')}"


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    """Every experiment over three seeds."""
    study = make_study(
        Seeds(shared=_SEEDS, twins=_SEEDS),
        controls=Controls(ranks=(12,), seeds=_SEEDS),
        lambdas=Lambdas(grid=(0.5,), seeds=_SEEDS),
        templates=Templates({"a": "1 {q} {a}", "b": "2 {q} {a}", "c": "3 {q} {a}"}, seeds=_SEEDS),
        overlap=Overlap("a", "b", seeds=_SEEDS),
        blocks=Blocks(("a", "b", "c", "d"), grid=(0.4,), seeds=_SEEDS),
        orthogonal=Orthogonal(seeds=_SEEDS),
        unlearning=Unlearning(),
        prediction=Prediction(("a", "b", "c", "d", "e"), activations=False),
        data=Data({name: name for name in "abcde"}),
    )
    files = dict.fromkeys("abcde", study.inputs.files["a"])
    for name in files:
        files[name] = replace(files[name], name=name, sha256=name)
    study.inputs = replace(study.inputs, modules=_MODULES, files=files)
    return study


def _fill(made: Made, world: World) -> None:
    needs = world.experiment.needs(made.study)
    made.losses(needs.scorings, world.loss)
    made.cosines(needs.pairs, world.cosine, world.norm)


@pytest.mark.parametrize("world", _WORLDS, ids=_world_name)
def test_a_claim_comes_out_as_the_figures_say(world: World, study: Study, tmp_path: Path) -> None:
    made = Made(study, tmp_path)
    _fill(made, world)
    claim = world.experiment.section(study, made.results).claims[world.claim]
    assert claim.verdict is world.expected, claim.evidence
    assert claim.evidence


@pytest.mark.parametrize(
    "world", [each for each in _WORLDS if each.expected is HOLDS], ids=_world_name
)
def test_a_claim_needs_everything_it_rests_on(world: World, study: Study, tmp_path: Path) -> None:
    """The last seed not done: the rest would have held, but nothing is said."""
    made = Made(study, tmp_path)
    needs = world.experiment.needs(study)
    last = max(_SEEDS) if world.experiment is not prediction else 1

    def there(scoring_or_pair: Scoring | Pair) -> bool:
        specs = (
            [spec for spec, _ in scoring_or_pair.terms]
            if isinstance(scoring_or_pair, Scoring)
            else scoring_or_pair
        )
        return all(spec.init_seed % 100 != last for spec in specs)

    made.losses(filter(there, needs.scorings), world.loss)
    made.cosines(filter(there, needs.pairs), world.cosine, world.norm)
    claim = world.experiment.section(study, made.results).claims[world.claim]
    assert claim.verdict is NOT_RUN


def test_one_seed_decides_nothing_about_cosines(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(templates=Templates({"a": "1 {q} {a}", "b": "2 {q} {a}", "c": "3 {q} {a}"}))
    made = Made(study, tmp_path)
    _fill(made, World(templates, 0, OPEN, cosine=_own_templates(0.9)))
    claim, _ = templates.section(study, made.results).claims
    assert claim.verdict is OPEN
    assert "no interval, n = 1" in claim.evidence


def test_two_seeds_are_too_few_to_rank(make_study: MakeStudy, tmp_path: Path) -> None:
    """Three points are left without a seed: their ranks may well be the same by chance."""
    study = make_study(Seeds(shared=(0, 1)))
    made = Made(study, tmp_path)
    _fill(made, World(compositions, 2, OPEN, _by_pair, _ordered(lambda seed: -1)))
    claim = compositions.section(study, made.results).claims[2]
    assert claim.verdict is OPEN
    assert "no interval, n = 2" in claim.evidence


def test_one_seed_of_losses_says_so(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    made = Made(study, tmp_path)
    _fill(made, World(compositions, 0, HOLDS, _sums(0.1, 0.3)))
    section = compositions.section(study, made.results)
    assert "rows only, one seed" in section.claims[0].evidence
    assert "(rows only, one seed)" in str(section.tables[4].rows)


def test_sums_that_are_not_finite_are_counted(study: Study, tmp_path: Path) -> None:
    made = Made(study, tmp_path)
    loss, cosine = _foretold(True)

    def broken(scoring: Scoring) -> float | None:
        domains = {domain for spec, _ in scoring.terms for domain in spec.domains}
        return None if domains == {"a", "b"} else loss(scoring)

    _fill(made, World(prediction, 0, HOLDS, broken, cosine))
    everything = prediction.observations(study, made.results)
    assert (len(everything.cases), everything.not_finite, everything.missing) == (18, 2, 0)
    section = prediction.section(study, made.results)
    assert "2 cases have no finite loss" in section.text[0]
    assert section.claims[0].verdict is HOLDS


def _removal(changed: bool, exact: bool, subtracted: float = 0.3) -> dict[str, Any]:
    return {
        "cycles": 3,
        "changed_by_adding": changed,
        "refold_equals_never_added": exact,
        "empty_mix_equals_base": exact,
        "subtraction": [{"cycles": 3, "changed": subtracted, "residue": 0.1}],
        "perplexity_never_added": 3.0,
        "perplexity_subtracted": 3.0,
    }


@pytest.mark.parametrize(
    ("low", "expected"),
    [
        (_removal(True, True), (HOLDS, HOLDS)),
        (_removal(True, False), (FAILS, HOLDS)),
        # Nothing was folded, so that equality says nothing.
        (_removal(False, True), (OPEN, HOLDS)),
        (_removal(True, True, 0.001), (HOLDS, FAILS)),
        (None, (NOT_RUN, NOT_RUN)),
    ],
)
def test_unlearning(
    low: dict[str, Any] | None, expected: tuple[Verdict, Verdict], study: Study, tmp_path: Path
) -> None:
    made = Made(study, tmp_path)
    for key, dtype in unlearning.keys(study).items():
        record = _removal(True, True) if dtype == "float32" else low
        if record is not None:
            made.workspace.findings.add({"key": key, "dtype": dtype, **record})
    section = unlearning.section(study, made.results)
    assert tuple(claim.verdict for claim in section.claims) == expected
    if low is not None and not low["changed_by_adding"]:
        assert "served by correction" in section.claims[0].evidence


def _interval(low: float, high: float, n: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, n, 3, "rows and seeds")


def test_verdicts_take_the_whole_interval() -> None:
    assert at_least(_interval(5, 9), 5) is HOLDS
    assert at_least(_interval(1, 4), 5) is FAILS
    assert at_least(_interval(4, 9), 5) is OPEN
    assert at_most(_interval(1, 5), 5) is HOLDS
    assert at_most(_interval(6, 9), 5) is FAILS
    assert at_most(_interval(4, 9), 5) is OPEN
    for judge in (at_least, at_most):
        assert judge(None, 5) is NOT_RUN
        assert judge(_interval(1, 9, n=2), 0) is NOT_RUN
    assert [exactly(known) for known in (True, False, None)] == [HOLDS, FAILS, NOT_RUN]


def test_a_claim_of_several_parts() -> None:
    assert every([HOLDS, HOLDS]) is HOLDS
    assert every([HOLDS, OPEN]) is OPEN
    assert every([HOLDS, OPEN, FAILS]) is FAILS
    assert every([FAILS, NOT_RUN]) is NOT_RUN
    assert every([]) is NOT_RUN


def test_the_summary_says_what_the_claims_say(study: Study, tmp_path: Path) -> None:
    made = Made(study, tmp_path)
    # Losses alone: what needs cosines is not run.
    made.losses(compositions.needs(study).scorings, _sums(0.1, 0.3))
    claims = compositions.section(study, made.results).claims
    assert [claim.verdict for claim in claims] == [HOLDS, HOLDS, NOT_RUN]
    decided, not_run, counts = summary(claims)
    assert "come close to one adapter trained on both domains: within 30 %" in decided
    assert not_run.startswith("Not measured, or not in full, is whether a larger cosine")
    assert counts.startswith("Of 3 claims 2 hold, 0 do not, 0 are not decided")
    assert counts.count("1 were not run") == 1


@pytest.mark.parametrize("name", bundled_configs())
def test_sections_bear_with_an_empty_workspace(
    name: str, make_study: MakeStudy, tmp_path: Path
) -> None:
    config = read_config(name)
    blank = make_study()
    file = next(iter(blank.inputs.files.values()))
    inputs = replace(blank.inputs, modules=_MODULES, files=dict.fromkeys(config.data.files, file))
    empty = Study(config, inputs)
    results = Made(empty, tmp_path).results
    for experiment in wanted(config):
        section = experiment.section(empty, results)
        assert section.text
        assert {claim.verdict for claim in section.claims} <= {NOT_RUN}
