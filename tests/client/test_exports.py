import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.client.fake_server import FakeServer
from tests.client.test_cli import COMMANDS

import superpose_client

PACKAGE = Path(superpose_client.__file__).parent
PUBLIC_MODULES = ["access", "async_client", "client", "errors", "mix", "requests", "results"]
# Public in their modules for the other modules' sake.
INTERNAL = {
    "MAX_SCORE_ITEMS",
    "MAX_SCORE_ROWS",
    "P",
    "R",
    "ScoreBatches",
    "TAKEN_UNASKED",
    "adapter_folder",
    "format_weight",
    "from_rpc_error",
    "generate",
    "merge_options",
    "mix",
    "score_items",
    "score_scope",
    "tensors_size",
}


def defined(module: str) -> set[str]:
    """Names that a module defines itself, without a leading underscore."""
    names = set()
    for node in ast.parse((PACKAGE / f"{module}.py").read_text()).body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


def test_all_that_is_public_is_exported() -> None:
    public = set().union(*(defined(module) for module in PUBLIC_MODULES)) - INTERNAL
    assert sorted(public) == superpose_client.__all__


def test_what_is_exported_is_there_and_typed() -> None:
    (block,) = [
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If)
    ]
    typed = [
        alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(typed) == superpose_client.__all__
    for name in superpose_client.__all__:
        value = getattr(superpose_client, name)
        assert getattr(value, "__name__", name) in (name, "Union", "Literal")


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        superpose_client.frobnicate  # noqa: B018


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
    )


BASE_INSTALL = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (
            "torch", "transformers", "peft", "safetensors", "numpy", "prometheus_client",
            "superpose_server", "grpc_reflection",
        ):
            raise ModuleNotFoundError(f"{name} is not in the base install", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ModuleNotFoundError:
    print("blocked")

from superpose_client.cli import app

server, *commands = sys.argv[1:]
helps = [["--help"], *([name, "--help"] for name in commands)]
for arguments in [*helps, ["--server", server, "mix"]]:
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, (arguments, end.code)

import superpose_client
for name in superpose_client.__all__:
    getattr(superpose_client, name)
"""


def test_everything_works_from_the_base_install(server: FakeServer) -> None:
    done = python(BASE_INSTALL, server.address, *COMMANDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("blocked\n")
    assert done.stdout.count("Usage: ") == 1 + len(COMMANDS)
    assert "math=1,medicine=0.5" in done.stdout


def test_help_waits_for_neither_grpc_nor_rich() -> None:
    done = python(
        "import sys\n"
        "from superpose_client.cli import app\n"
        "try: app(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('grpc', 'google.protobuf', 'rich') if name in sys.modules])"
    )
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr
