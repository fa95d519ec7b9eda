from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.study.workspace import Workspace
from tests.benchmarks.study.conftest import run_little


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_to_the_same_results(
    little: Path, little_run: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "benchmarks.study", "run", f"--config={little}"),
            *("--only=compositions", f"--out={out}", f"--cache={cache}"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stderr is not None
    with process:
        for line in process.stderr:
            if line.startswith("score for compositions"):
                process.kill()
                break
    assert process.returncode != 0
    whole = _nats(Workspace(little_run / "out", little_run / "cache"))
    assert len(_nats(Workspace(out, cache))) < len(whole)

    found = _nats(run_little(little, tmp_path))
    assert found.keys() == whole.keys()
    for key, nats in whole.items():
        assert found[key] == pytest.approx(nats, rel=1e-5)


def _nats(workspace: Workspace) -> dict[str, list[float]]:
    return {record["key"]: record["nats"] for record in workspace.losses}
