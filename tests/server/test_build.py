"""Where the kernels come from: which compiler, what is kept, and what is said when it fails."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from tests.server.helpers import open_model

from superpose_server.model import model as model_module
from superpose_server.model.kernels import build
from superpose_server.model.kernels.build import CompilerError, load_kernels

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)


@pytest.fixture
def compiled() -> None:
    """Before anything is patched: the library of this machine lies in the real cache."""
    load_kernels()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Libraries that would have been loaded: torch takes only one of them in a process."""
    paths: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: paths.append(Path(path)))
    monkeypatch.setattr(build, "_describe", lambda: None)
    monkeypatch.setattr(build, "_choose", lambda able: able[0])
    return paths


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "superpose"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Grows with every compiler run."""
    made: list[list[str]] = []
    real = build._run

    def counting(command: list[str]) -> bytes:
        made.append(command)
        return real(command)

    monkeypatch.setattr(build, "_run", counting)
    return made


def load_anew() -> None:
    """Not what an earlier call has found."""
    load_kernels.__wrapped__()


class FakeCompiler:
    """A script that prints macros and makes a library of one word, or fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("echo '#define VERSION 1'", 'echo made > "$made"')

    def write(self, macros: str, compiled: str) -> None:
        self.path.write_text(
            "#!/bin/sh\n"
            'for word in "$@"; do made="$word"; done\n'
            f'case "$*" in *-dM*) {macros};; *) {compiled};; esac\n'
        )
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler(tmp_path / "fake compiler")
    monkeypatch.setenv("CXX", f"'{fake.path}'")
    return fake


def check_message(error: pytest.ExceptionInfo[CompilerError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in ("--compile off", "g++", *words):
        assert word in message


def test_without_a_compiler_the_remedies_are_named(
    monkeypatch: pytest.MonkeyPatch, cache: Path, loaded: list[Path], tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError) as error:
        load_anew()
    check_message(error, "there is none")
    assert loaded == []


@pytest.mark.parametrize("command", ["false", "/nowhere/c++", "env -u NOTHING false"])
def test_a_compiler_that_does_not_run_is_named(
    command: str, monkeypatch: pytest.MonkeyPatch, cache: Path, loaded: list[Path]
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(CompilerError) as error:
        load_anew()
    check_message(error, command.split()[0])
    assert loaded == []
    assert not cache.exists()


def test_a_compiler_that_fails_leaves_nothing_behind(
    compiler: FakeCompiler, cache: Path, loaded: list[Path]
) -> None:
    complaint = "printf 'a note\\nx.cpp:1: error:\\tno  <torch/library.h>\\nanother\\n' >&2"
    compiler.write("echo macros", f'echo half > "$made"; {complaint}; exit 1')
    with pytest.raises(CompilerError) as error:
        load_anew()
    check_message(error, "fake compiler", "(x.cpp:1: error: no <torch/library.h>)")
    assert loaded == []
    assert list(cache.iterdir()) == []


def test_a_library_is_compiled_once_for_all_that_it_is_made_from(
    compiler: FakeCompiler,
    cache: Path,
    commands: list[list[str]],
    loaded: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    load_anew()
    assert len(commands) == 2  # the macros, and the compilation
    load_anew()
    assert len(commands) == 3
    (first,) = set(loaded)
    assert first.parent == cache
    assert first.read_text() == "made\n"
    assert os.access(first, os.R_OK)
    # Another version of the compiler, or another processor.
    compiler.write("echo '#define VERSION 2'", 'echo made > "$made"')
    load_anew()
    # Another torch.
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    load_anew()
    # Another source.
    source = tmp_path / "kernels.cpp"
    source.write_text("// other\n")
    monkeypatch.setattr(build, "_SOURCE", source)
    load_anew()
    assert len(set(loaded)) == 4
    assert len(commands) == 3 + 3 * 2
    assert sorted(cache.iterdir()) == sorted(set(loaded))


def test_a_library_that_is_there_needs_a_compiler_only_for_its_name(
    compiler: FakeCompiler, cache: Path, loaded: list[Path]
) -> None:
    load_anew()
    compiler.write("echo '#define VERSION 1'", "exit 1")
    load_anew()
    assert len(loaded) == 2


@needs_compiler
def test_a_compiler_may_be_several_words(
    compiled: None, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]], loaded: list[Path]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    load_anew()
    found = shutil.which("c++") or shutil.which("g++")
    monkeypatch.setenv("CXX", f"env {found}")
    load_anew()
    # The same compiler has the same macros: one library, compiled already.
    assert len(loaded) == 2
    assert loaded[0] == loaded[1]
    assert [command[:1] for command in commands] == [[found], ["env"]]


def test_a_cache_without_a_home_is_refused_with_the_remedy(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, loaded: list[Path]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CompilerError, match=r"set XDG_CACHE_HOME, or pass --compile off"):
        load_anew()


@pytest.mark.parametrize("fault", ["not writable", "not executable"])
def test_a_cache_that_cannot_hold_programs_is_named(
    fault: str,
    compiler: FakeCompiler,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Path],
) -> None:
    if fault == "not writable":
        cache.parent.mkdir()
        cache.write_text("a file where the folder should be")
    else:

        def refuse(path: str) -> None:
            raise OSError(f"{path}: failed to map segment from shared object")

        monkeypatch.setattr(torch.ops, "load_library", refuse)
    with pytest.raises(CompilerError) as error:
        load_anew()
    message = str(error.value)
    assert message.startswith(f"{cache}/kernels-")
    assert message.endswith(
        "set XDG_CACHE_HOME to a folder that may hold programs, or pass --compile off"
    )
    assert loaded == []


def test_a_model_without_kernels_needs_no_compiler(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise CompilerError("no compiler here")

    monkeypatch.setattr(model_module, "load_kernels", missing)
    with pytest.raises(ValueError, match="no compiler here"):
        open_model(bases["gpt2"], kernels=True)
    assert not open_model(bases["gpt2"]).packed
    assert not open_model(bases["gpt2"], torch.float16, kernels=True).packed
