from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from benchmarks.study.config import Config, Data, Seeds
from benchmarks.study.inputs import DataFile, Inputs
from benchmarks.study.study import Study

MakeStudy = Callable[..., Study]


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
            parameters=1,
            modules={"h.0.mlp.c_proj": (8, 4)},
            files={name: DataFile(name, sha256 + name, rows) for name in names},
        )
        return Study(replace(config, **changed), inputs)  # type: ignore[arg-type]

    return make
