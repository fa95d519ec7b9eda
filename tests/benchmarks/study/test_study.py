from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import benchmarks.study as study_package
import pytest
from benchmarks.study.config import (
    Blocks,
    Controls,
    Evaluation,
    Lambdas,
    Orthogonal,
    Overlap,
    Prediction,
    Seeds,
    Templates,
    Training,
    Unlearning,
    bundled_configs,
    read_config,
)
from benchmarks.study.experiments import prediction
from benchmarks.study.inputs import read_inputs
from benchmarks.study.plan import needed_keys, wanted
from benchmarks.study.study import AdapterSpec, Needs, Scoring, Study, total
from tests.benchmarks.study.conftest import MakeStudy

from superpose_train.options import Options
from superpose_train.schedule import Plan


def test_the_paper_has_seven_adapters_and_seven_compositions(make_study: MakeStudy) -> None:
    study = make_study()
    (arm,) = study.arms
    compositions = list(study.compositions(arm))
    assert len({*arm.fundamental.values(), *arm.joint.values()}) == 7
    assert [c.name for c in compositions] == [
        "a + b",
        "a + c",
        "b + c",
        "a + b + c",
        "a+b + c",
        "a+c + b",
        "b+c + a",
    ]
    for composition in compositions:
        covered = {domain for spec in composition.summed for domain in spec.domains}
        assert covered == set(composition.domains) == set(composition.merged.domains)


def test_arms_of_a_shared_a_share_it_and_others_do_not(make_study: MakeStudy) -> None:
    study = make_study(Seeds(shared=(0, 1, 2, 3, 4)))
    assert [arm.shared for arm in study.arms] == [True] * 5 + [False] * 5
    apart = make_study(Seeds(shared=(0, 1), separate=(7, 8)))
    assert [arm.shared for arm in apart.arms] == [True] * 2 + [False] * 2
    for arm in (*study.arms, *apart.arms):
        firsts = {spec.init_seed for spec in arm.fundamental.values()}
        assert len(firsts) == (1 if arm.shared else 3)
        for composition in study.compositions(arm):
            of_sum = {spec.init_seed for spec in composition.summed}
            assert len(of_sum) == (1 if arm.shared else len(composition.summed))
    # Rotated arms take nothing but adapters that the others have.
    shared = {s for arm in study.arms[:5] for s in (*arm.fundamental.values(), *arm.joint.values())}
    for arm in study.arms[5:]:
        assert set(arm.fundamental.values()) <= shared
        assert set(arm.beside.values()) <= shared
    # Intervals take arms of a kind for independent.
    for arms in (study.arms[:5], study.arms[5:], apart.arms[:2], apart.arms[2:]):
        joint = [spec for arm in arms for spec in arm.joint.values()]
        assert len(set(joint)) == len(joint)


def test_equal_domains_need_no_other_control_than_the_papers(make_study: MakeStudy) -> None:
    study = make_study()
    union = study.config.domains
    assert study.joint(union, 0).rows == 300
    assert study.joint(union, 0, budget="tokens") == study.joint(union, 0)
    wide = study.joint(union, 0, rank=12, budget="steps")
    assert wide.rank == 12
    assert wide.alpha / wide.rank == study.config.training.alpha / study.config.training.rank


def _trainer_steps(spec: AdapterSpec) -> int:
    """The steps that the trainer itself would take."""
    options = Options(
        base="none",
        data=(Path("none"),),
        name="none",
        out=Path("none"),
        epochs=spec.epochs,
        batch_size=spec.batch_size,
    )
    return Plan.of(options, spec.rows).steps


_TUNED = {
    ("a",): {"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "dropout": 0.1},
    ("b",): {"epochs": 5, "batch_size": 32, "learning_rate": 2e-3, "dropout": 0.0},
    ("c",): {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3, "dropout": 0.2},
    ("a", "b", "c"): {"epochs": 2, "batch_size": 32, "learning_rate": 4e-4, "dropout": 0.3},
    # Few epochs of large batches: as many steps need more epochs than any domain has.
    ("a", "b"): {"epochs": 1, "batch_size": 64, "learning_rate": 4e-4, "dropout": 0.3},
}


@pytest.mark.parametrize("rank", [4, 8, 12])
def test_controls_of_tuned_unequal_domains_are_matched(make_study: MakeStudy, rank: int) -> None:
    blank = make_study()
    files = {
        name: replace(blank.inputs.files[name], rows={"train": rows, "validation": 9, "test": 9})
        for name, rows in {"a": 1000, "b": 317, "c": 643, "d": 10}.items()
    }
    study = Study(blank.config, replace(blank.inputs, files=files), _TUNED)
    for union in study.unions:
        apart = [study.fundamental(domain, 0) for domain in union]
        papers = study.joint(union, 0)
        tokens, steps = (
            study.joint(union, 0, rank=rank, budget=budget) for budget in ("tokens", "steps")
        )
        assert abs(_trainer_steps(steps) - fmean(_trainer_steps(each) for each in apart)) <= 1
        visits = sum(each.epochs * each.rows for each in apart)
        assert abs(tokens.epochs * tokens.rows - visits) <= tokens.batch_size
        for (domain, rows), each in zip(tokens.portions, apart, strict=True):
            assert domain in each.domains
            assert abs(tokens.epochs * rows - each.epochs * each.rows) <= tokens.epochs
        for control in (tokens, steps):
            assert all(0 < rows <= files[domain].rows["train"] for domain, rows in control.portions)
            assert control.rank == rank
            assert control.alpha / rank == papers.alpha / papers.rank
            for option in ("batch_size", "learning_rate", "dropout", "seed", "init_seed"):
                assert getattr(control, option) == getattr(papers, option)
        for spec in (*apart, tokens, steps):
            assert spec.steps == _trainer_steps(spec)


def test_rows_are_limited_by_the_config_and_the_file(make_study: MakeStudy) -> None:
    assert make_study(training=Training(rows=30)).rows("a") == 30
    assert make_study(training=Training(rows=3000)).rows("a") == 100
    assert make_study(training=Training(rows=None)).rows("a") == 100


def test_keys_follow_from_what_determines_a_result(make_study: MakeStudy) -> None:
    study = make_study()
    spec = study.fundamental("a", 0)
    key = study.adapter_key(spec)
    assert make_study().adapter_key(spec) == key
    others = [
        study.adapter_key(study.fundamental("a", 1)),
        study.adapter_key(study.fundamental("a", 0, init_seed=1)),
        study.adapter_key(study.fundamental("a", 0, rank=8)),
        study.adapter_key(study.fundamental("a", 0, learning_rate=1e-4)),
        study.adapter_key(study.fundamental("b", 0)),
        make_study(training=Training(max_length=32)).adapter_key(spec),
        make_study(training=Training(loss_scope="answer")).adapter_key(spec),
        make_study(training=Training(precision="bfloat16")).adapter_key(spec),
        make_study(sha256="11").adapter_key(spec),
    ]
    assert len({key, *others}) == len(others) + 1
    # What is measured of an adapter does not change it, and the other way round.
    measured = make_study(evaluation=Evaluation(dtype="bfloat16", test_rows=5))
    assert measured.adapter_key(spec) == key
    scoring = Scoring(total(spec), "a", study.template)
    pair = (spec, study.fundamental("b", 0))
    by = {
        name: make_study(evaluation=evaluation)
        for name, evaluation in {
            "plain": Evaluation(),
            "dtype": Evaluation(dtype="bfloat16"),
            "kernels": Evaluation(kernels=True),
            "served": Evaluation(served=True),
            "rows": Evaluation(test_rows=5, validation_rows=5),
        }.items()
    }
    assert len({each.scoring_key(scoring) for each in by.values()}) == len(by)
    # Inputs of modules are looked at in this process, whatever scores.
    weighted = {name: each.pair_key(pair, activations=True) for name, each in by.items()}
    assert weighted.pop("served") == weighted["plain"]
    assert len(set(weighted.values())) == len(weighted)
    assert len({each.pair_key(pair) for each in by.values()}) == 1


@pytest.mark.parametrize("name", ["mini", "smollm2"])
def test_published_results_are_found_under_the_keys_of_now(name: str) -> None:
    folder = Path(study_package.__file__).parent / "results" / name
    inputs = read_inputs(folder / "inputs.json")
    assert inputs is not None
    study = Study(read_config(name), inputs)
    # They were trained in float32, and are on whatever processor trains them again.
    assert study.config.training.precision == "float32"
    needed = needed_keys(study, wanted(study.config))
    for records in ("losses", "geometry", "findings", "adapters", "rows"):
        lines = (folder / f"{records}.jsonl").read_text("utf-8").splitlines()
        needed -= {json.loads(line)["key"] for line in lines}
    assert not needed


def test_another_config_or_tokenizer_of_the_base_changes_every_key(make_study: MakeStudy) -> None:
    study = make_study()
    other = Study(study.config, replace(study.inputs, setup_digest="1"))
    spec = study.fundamental("a", 0)
    pair = (spec, study.fundamental("b", 0))
    scoring = Scoring((), "a", study.template)
    assert study.adapter_key(spec) != other.adapter_key(spec)
    assert study.rows_key("a", "test", "") != other.rows_key("a", "test", "")
    assert study.scoring_key(scoring) != other.scoring_key(scoring)
    assert study.pair_key(pair) != other.pair_key(pair)
    assert study.finding_key("x", []) != other.finding_key("x", [])


def test_what_stands_before_a_row_is_in_every_key_where_there_is_something(
    make_study: MakeStudy,
) -> None:
    """Where there is nothing the keys are those of before; see the published results above."""
    study = make_study()
    told = Study(study.config, replace(study.inputs, special_tokens=("<s>",)))
    spec = study.fundamental("a", 0)
    assert study.adapter_key(spec) != told.adapter_key(spec)
    assert study.rows_key("a", "test", "") != told.rows_key("a", "test", "")
    # A switch that changes nothing for a base makes nothing else of what was computed.
    off = make_study(training=Training(special_tokens=False))
    assert study.adapter_key(spec) == off.adapter_key(spec)
    assert study.rows_key("a", "test", "") == off.rows_key("a", "test", "")


def test_order_and_zero_weights_make_no_other_model(make_study: MakeStudy) -> None:
    study = make_study()
    one, two, three = (study.fundamental(domain, 0) for domain in "abc")

    def key(*terms: tuple[object, float]) -> str:
        return study.scoring_key(Scoring(terms, "a", study.template))  # type: ignore[arg-type]

    assert (
        key((one, 1.0), (two, 1.0))
        == key((two, 1), (one, 1))
        == key((two, 1), (three, 0), (one, 1))
    )
    assert key((one, 1.0), (two, 0.5)) != key((one, 0.5), (two, 1.0))
    assert study.pair_key((one, two)) == study.pair_key((two, one))
    assert study.pair_key((one, two)) != study.pair_key((one, two), activations=True)


def test_the_prediction_has_more_than_thirty_pairs(make_study: MakeStudy) -> None:
    config = read_config("mini")
    assert config.prediction is not None
    study = make_study(prediction=Prediction(("a", "b", "c", "d")))
    cases = prediction.cases(study)
    assert len(cases) == 12
    for case in cases:
        assert (case.adapters[0].init_seed == case.adapters[1].init_seed) == case.shared
        for first, second in case.ceilings:
            assert first != second
            assert first.domains == second.domains
            assert (first.init_seed == second.init_seed) == case.shared
    count = len(config.prediction.domains)
    assert count * (count - 1) // 2 * 2 >= 30


def test_every_experiment_bears_with_having_nothing(make_study: MakeStudy) -> None:
    study = make_study(
        controls=Controls(),
        lambdas=Lambdas(pair_grid=(0.5,), rotated=True),
        templates=Templates({"a": "{q} {a}"}),
        overlap=Overlap("a", "b"),
        blocks=Blocks(("a", "b", "c", "d")),
        orthogonal=Orthogonal(),
        unlearning=Unlearning(),
        prediction=Prediction(("a", "b", "c")),
    )
    seen = Needs()
    for experiment in wanted(study.config):
        needs = experiment.needs(study)
        assert needs.scorings or needs.pairs or needs.findings
        assert needs.adapters() or experiment.name == "tuning"
        seen.scorings |= needs.scorings
    assert len(seen.scorings) > 100


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_plans(name: str, make_study: MakeStudy) -> None:
    config = read_config(name)
    blank = make_study()
    files = dict.fromkeys(config.data.files, next(iter(blank.inputs.files.values())))
    study = make_study()
    study.config = config
    study.inputs = replace(blank.inputs, files=files)
    for experiment in wanted(config):
        needs = experiment.needs(study)
        assert needs.scorings or needs.pairs or needs.findings, experiment.name
