from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.study.__main__ import main


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_to_the_same_results(little: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        places = [f"--out={tmp_path / name / 'out'}", f"--cache={tmp_path / name / 'cache'}"]
        return ["run", f"--config={little}", "--only=compositions", *places]

    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.study", *arguments("killed")],
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
    losses = tmp_path / "killed" / "out" / "losses.jsonl"
    done = len(losses.read_bytes().splitlines()) if losses.exists() else 0

    assert main(arguments("killed")) == 0
    assert main(arguments("whole")) == 0
    found = [_nats(tmp_path / name / "out" / "losses.jsonl") for name in ("killed", "whole")]
    assert done < len(found[1])
    assert found[0].keys() == found[1].keys()
    for key, nats in found[1].items():
        assert found[0][key] == pytest.approx(nats, rel=1e-5)


def _nats(path: Path) -> dict[str, list[float]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["key"]: record["nats"] for record in records}
