from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.study.__main__ import main
from benchmarks.study.config import Tuning
from benchmarks.study.experiments.tuning import searches, section, tuned_study
from benchmarks.study.results import Results
from benchmarks.study.workspace import Workspace
from tests.benchmarks.study.conftest import MakeStudy

_FOUND = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "dropout": 0.25}


def test_an_unfinished_search_is_not_passed_over(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tuning=Tuning(2, domains=("a", "b"), apply=True))
    workspace = Workspace(tmp_path, tmp_path)
    for key, spec in searches(study).items():
        with pytest.raises(ValueError, match=f"the search of {spec.domains[0]} is not done"):
            tuned_study(study, workspace)
        best = {"parameters": _FOUND, "validation_loss": 1.0, "test_perplexity": 2.0}
        workspace.findings.add(
            {
                "key": key,
                "trials": [{"number": 0, "validation_loss": 1.0}],
                "best": best,
                "importances": {},
            }
        )
    tuned = tuned_study(study, workspace)
    for domain in "abc":
        plain = study.fundamental(domain, 0)
        expected = plain if domain == "c" else replace(plain, **_FOUND)  # type: ignore[arg-type]
        assert tuned.fundamental(domain, 0) == expected
    (text,) = section(tuned, Results(tuned, workspace)).text
    assert "2 of 2 searches are done" in text
    assert "trained on a, b are trained with what is found, all others" in text


def test_a_search_that_is_not_applied_may_be_missing(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tuning=Tuning(2))
    assert tuned_study(study, Workspace(tmp_path, tmp_path)) is study


def test_a_run_before_its_tuning_is_refused_and_status_says_so(
    little: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with little.open("a") as file:
        file.write("tuning.trials = 1\ntuning.apply = true\n")
    places = [f"--config={little}", f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}"]
    assert main(["status", *places]) == 0
    assert "after tuning" in capsys.readouterr().err
    assert main(["run", "--only=compositions", *places]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the search of birds is not done; finish it by `run --only tuning`" in told
    assert not (tmp_path / "out" / "adapters.jsonl").exists()
    # A report can be made, and tells of the searches alone.
    assert main(["report", *places]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "0 of 3 searches are done" in report
    assert "Everything but tuning" in report
    assert "Tables 2 and 5" not in report
