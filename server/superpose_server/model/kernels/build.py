"""Compile `kernels.cpp` for this machine, once, and load it as `torch.ops.superpose`."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from superpose_server.model.cache_folder import cache_folder

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-ffp-contract=fast", "-fopenmp", "-fPIC")
_log = logging.getLogger(__name__)


class CompilerError(ValueError):
    """The kernels cannot be compiled; one line with the remedy."""


@cache
def load_kernels() -> None:
    """Make `torch.ops.superpose` available, compiling it first if this machine never did.

    The library is kept under XDG_CACHE_HOME or ~/.cache, named after all that it was made from.

    Raises:
        CompilerError: There is no C++ compiler, or it fails.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or _find_compiler()
    except ValueError as error:
        raise CompilerError(f"CXX is {os.environ['CXX']!r}: {error}") from error
    if not compiler:
        raise CompilerError(
            "--compile auto needs a C++ compiler and there is none: install g++, or pass "
            "--compile off"
        )
    # The macros name the compiler, its version and all that it knows of this processor.
    macros = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    made_from = (_SOURCE.read_bytes(), macros, torch.__version__.encode(), repr(_FLAGS).encode())
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    library = _cache_dir() / f"kernels-{digest}.so"
    if not library.exists():
        _compile(compiler, library)
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    _describe()


def _describe() -> None:
    """Tell torch.compile the shapes of what the kernels return."""

    def linear(
        x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, term: Tensor
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], out_features))

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, *others: object, **more: object
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        return query.new_empty((1, tokens, heads, values.shape[-1]))

    torch.library.register_fake("superpose::linear", linear)
    torch.library.register_fake("superpose::attend", attend)


def _find_compiler() -> list[str]:
    found = shutil.which("c++") or shutil.which("g++")
    return [found] if found else []


def _compile(compiler: list[str], library: Path) -> None:
    started = time.perf_counter()
    _log.info("compiling kernels for this machine into %s", library)
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        _run(
            [
                *compiler,
                *_FLAGS,
                "-shared",
                "-DAT_PARALLEL_OPENMP=1",
                f"-I{torch_folder / 'include'}",
                str(_SOURCE),
                f"-L{torch_folder / 'lib'}",
                "-ltorch_cpu",
                "-lc10",
                "-o",
                str(made),
            ]
        )
        made.replace(library)  # Whole or not at all, whoever else compiles it now.
    _log.info("compiled kernels seconds=%.1f", time.perf_counter() - started)


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", b"").decode(errors="replace") or str(error)
        lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
        raise CompilerError(
            f"{command[0]} cannot compile the kernels ({' '.join(lines[0].split())}): install g++ "
            "11 or newer, or pass --compile off"
        ) from error


def _cache_dir() -> Path:
    try:
        return cache_folder()
    except RuntimeError as error:
        raise CompilerError(
            f"no folder to keep compiled kernels in ({error}): set XDG_CACHE_HOME, or pass "
            "--compile off"
        ) from error
