"""The invariants of the engine, with each family of kernels that this processor runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from superpose_server.model.kernels.family import FAMILIES, VARIABLE, families

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
INVARIANTS = [
    "tests/server/test_kernels.py",
    "tests/server/test_packed.py",
    "tests/server/test_weights.py",
    "tests/server/test_bfloat16.py",
    "tests/server/test_compiled.py",
    "tests/integration/test_bits.py",
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_invariant_holds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    monkeypatch.delenv(VARIABLE, raising=False)
    able = [family.name for family in families()]
    if name not in able:
        pytest.skip(f"this processor runs {', '.join(able)}")
    if name == able[0]:
        pytest.skip("the best that this processor runs: every other test has run with it")
    # In a process of its own: one process takes one family.
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *INVARIANTS],
        cwd=ROOT,
        env=os.environ | {VARIABLE: name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
