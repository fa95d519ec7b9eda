"""Compile `kernels.cpp` for this kind of processor, once, and load it as `torch.ops.superpose`."""

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

from superpose_adapters.cache_folder import cache_folder
from superpose_adapters.one_line import one_line
from superpose_server.model.kernels.family import Family, families
from superpose_server.model.packed import TERM_FIELDS, pack

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fopenmp", "-fPIC")
_log = logging.getLogger(__name__)


class CompilerError(ValueError):
    """The kernels cannot be compiled; one line with the remedy."""


@cache
def load_kernels() -> Family:
    """Make `torch.ops.superpose` available, compiling it first if this machine never did.

    The library is kept under XDG_CACHE_HOME or ~/.cache, named after all that it was made from.
    Products in bfloat16 that differ from those in float32 arithmetic are not used, with a warning.

    Returns:
        The family of kernels that this process uses from now on.

    Raises:
        CompilerError: There is no C++ compiler, or it fails.
        FamilyError: See `families`.
    """
    able = families()
    flags = (*_FLAGS, f"-march={able[0].architecture}")
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or _find_compiler()
    except ValueError as error:
        raise CompilerError(f"CXX is {os.environ['CXX']!r}: {error}") from error
    if not compiler:
        raise CompilerError(
            "the CPU kernels need a C++ compiler and there is none: install g++, or pass "
            "--compile off"
        )
    # The macros name the compiler, its version and all that it knows of the processor.
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.[ch]*"))]
    made_from = (*sources, macros, torch.__version__.encode(), repr(flags).encode())
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    library = _cache_dir() / f"kernels-{digest}.so"
    try:
        if not library.exists():
            _compile([*compiler, *flags], library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:  # Nothing may be written there, or nothing that lies there may run.
        raise CompilerError(
            f"{library} cannot be made or loaded ({one_line(error)}): set XDG_CACHE_HOME to a "
            "folder that may hold programs, or pass --compile off"
        ) from error
    _describe()
    family = _choose([f for f in able if f.architecture == able[0].architecture])
    _log.info("kernels family=%s", family.name)
    return family


def _choose(able: list[Family]) -> Family:
    """Use the first family whose products are right; the last needs no check, it is the measure."""
    for family in able:
        if torch.ops.superpose.use_products(family.products) and (
            family.products == "floats" or _products_are_right(family.products)
        ):
            return family
        _log.warning("this machine fails at products of family=%s: not used", family.name)
    raise CompilerError(
        f"no family of kernels is right on this machine (tried {', '.join(f.name for f in able)}): "
        "pass --compile off"
    )


def _products_are_right(products: str) -> bool:
    """Compare products with those in float32 arithmetic, and leave the former in use."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    none = torch.zeros(TERM_FIELDS, dtype=torch.int64)
    # Every number of tiles and what is left over: rows and panels beyond one and two, odd widths.
    for rows, inputs, outputs in ((1, 64, 16), (13, 96, 40), (47, 75, 64)):
        x, packed, bias = (
            random(rows, inputs),
            pack(random(inputs, outputs), transposed=True),
            random(outputs),
        )
        found = []
        for way in ("floats", products):
            torch.ops.superpose.use_products(way)
            found.append(torch.ops.superpose.linear(x, packed, bias, outputs, none).float())
        # One rounding of bfloat16 apart at most, where sums are next to a tie.
        if not bool(((found[1] - found[0]).abs() <= 2**-7 * found[0].abs() + 1e-5).all()):
            return False
    return True


def _describe() -> None:
    """Tell torch.compile the shapes of what the kernels return."""

    def linear(
        x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, term: Tensor
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], out_features))

    def embed(ids: Tensor, packed: Tensor, in_features: int) -> Tensor:
        return packed.new_empty((*ids.shape, in_features))

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, *others: object, **more: object
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        return query.new_empty((1, tokens, heads, values.shape[-1]))

    torch.library.register_fake("superpose::linear", linear)
    torch.library.register_fake("superpose::embed", embed)
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
