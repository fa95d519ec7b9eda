from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.shapes import Group, adapter_folder, base_folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the tiny base is made once."""
    folder = tmp_path_factory.mktemp("benchmarks")
    base_folder("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Path:
    return base_folder("tiny", cache)


@pytest.fixture(scope="session")
def adapters(cache: Path, tiny: Path) -> Path:
    return adapter_folder(tiny, cache, [Group(3), Group(1, rank=8, prefix="wide")])
