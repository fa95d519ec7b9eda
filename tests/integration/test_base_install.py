"""`adapterctl` needs the base install only: no torch, and nothing else that the extras bring.

A virtual environment with nothing else in it would need a package index, which tests may not. So
`adapterctl` runs in a process that can import the standard library, the client's packages, and
what `dependencies` in pyproject.toml bring with all that they need in turn; nothing else is found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.integration.harness import PATIENCE, PROMPT, Served

ROOT = Path(__file__).parents[2]

LAUNCHER = """
import importlib.abc, json, sys

allowed = {*json.loads(sys.argv.pop(1)), *sys.stdlib_module_names, *sys.builtin_module_names}

class BaseInstall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # The standard library's own record of how Python was built has a name for each platform.
        if name.partition(".")[0] not in allowed and not name.startswith("_sysconfigdata_"):
            raise ModuleNotFoundError(f"No module named {name!r} in the base install", name=name)

sys.meta_path.insert(0, BaseInstall())
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def base_modules() -> list[str]:
    """Return the top-level modules of the base install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(line) for line in project["dependencies"]]
    found: set[str] = set()
    while todo:
        needed = todo.pop()
        if normal(needed.name) in found:
            continue
        found.add(normal(needed.name))
        try:
            lines = requires(needed.name) or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(
                marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)
            ):
                todo.append(requirement)
    modules = (
        module
        for module, owners in packages_distributions().items()
        if found & {normal(owner) for owner in owners}
    )
    return sorted({*modules, "superpose_client", "superpose_adapters", "superpose_proto"})


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code where only the base install can be imported."""
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER + code, json.dumps(base_modules()), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


ADAPTERCTL = """
from superpose_client.cli import main
sys.argv[0] = "adapterctl"
main()
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("status",), "float32"),
        (("generate", PROMPT, "--max-new-tokens=3", "--ignore-eos", "--json"), "LENGTH"),
        (("analyze", "a,b=0.5"), "interference"),
    ],
)
def test_adapterctl_works_with_the_base_install_alone(
    served: Served, arguments: tuple[str, ...], expected: str
) -> None:
    result = run(ADAPTERCTL, *arguments, f"--server={served.address}")
    assert result.stderr == ""
    assert result.returncode == 0
    assert expected in result.stdout


@pytest.mark.parametrize(
    "module",
    [
        "torch",
        "transformers",
        "numpy",
        "superpose_server",
        "prometheus_client",
    ],
)
def test_nothing_else_can_be_imported_there(module: str) -> None:
    """Without this, the test above would prove nothing."""
    result = run(f"import {module}")
    assert result.returncode == 1
    assert f"No module named '{module}' in the base install" in result.stderr
