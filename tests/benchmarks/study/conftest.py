from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.study.__main__ import main
from benchmarks.study.config import Config, Data, Seeds
from benchmarks.study.inputs import DataFile, Inputs
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace

MakeStudy = Callable[..., Study]

_LITTLE = """
name = "little"
base = "{base}"
domains = ["birds", "metals", "ports"]
data.synthetic = 80
data.files = {{ birds = "birds", metals = "metals", ports = "ports" }}
training.max_length = 24
training.rows = 8
training.eval_rows = 2
evaluation.test_rows = 2
evaluation.resamples = 100
"""


@pytest.fixture
def make_study() -> MakeStudy:
    """Build a study on paper: no base, no data."""

    def make(seeds: Seeds | None = None, sha256: str = "00", **changed: object) -> Study:
        names = ("a", "b", "c", "d")
        config = Config(
            "paper-only",
            "none",
            names[:3],
            Data({name: name for name in names}),
            seeds=seeds or Seeds(),
        )
        rows = {"train": 100, "validation": 10, "test": 10}
        inputs = Inputs(
            base="none",
            base_digest="0",
            setup_digest="0",
            parameters=1,
            modules={"h.0.mlp.c_proj": (8, 4)},
            files={name: DataFile(name, sha256 + name, rows) for name in names},
        )
        return Study(replace(config, **changed), inputs)  # type: ignore[arg-type]

    return make


def _write_little(tiny: Path, folder: Path) -> Path:
    """Write the config of a study that takes seconds: the tiny base, made-up domains, few rows."""
    path = folder / "little.toml"
    path.write_text(_LITTLE.format(base=tiny))
    return path


@pytest.fixture
def little(tiny: Path, tmp_path: Path) -> Path:
    return _write_little(tiny, tmp_path)


def run_little(config: Path, folder: Path, *flags: str, only: str = "compositions") -> Workspace:
    """Run a study in `out` and `cache` of a folder."""
    places = [f"--out={folder / 'out'}", f"--cache={folder / 'cache'}"]
    assert main(["run", f"--config={config}", f"--only={only}", *places, *flags]) == 0
    return Workspace(folder / "out", folder / "cache")


@pytest.fixture(scope="session")
def little_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the little study has run; whoever changes it works on a copy."""
    folder = tmp_path_factory.mktemp("little")
    run_little(_write_little(tiny, folder), folder)
    return folder
