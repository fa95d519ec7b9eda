"""Why a server does not start, in one line each; and what a start does in which order."""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import test_checkpoint as refusals
from tests.integration.harness import Family, LoopThread, ServerProcess, start
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_llama
from tests.zoo import build

import superpose_server.command as command
import superpose_server.loading as loading_room
import superpose_server.local as local_room
import superpose_server.model.model as model_room
import superpose_server.runtime as runtime_room
from superpose_adapters.store import AdapterStore
from superpose_server.config import ServerConfig, parse_config
from superpose_server.engine.engine import Engine
from superpose_server.errors import StartupError
from superpose_server.model.cache import SlotCache
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.memory import is_out_of_memory
from superpose_server.runtime import Runtime
from superpose_server.weights.resident import ResidentWeights

Patch = pytest.MonkeyPatch
FLAG = re.compile(r"--[a-z][a-z-]*")
ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: Patch, tmp_path: Path) -> None:
    """Which kinds were checked is noted for each test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def flags() -> set[str]:
    """All flags of the server's own."""
    with pytest.MonkeyPatch.context() as patch:
        found: set[str] = set()
        real = argparse.ArgumentParser.add_argument

        def note(self: Any, *names: str, **more: Any) -> Any:
            found.update(names)
            return real(self, *names, **more)

        patch.setattr(argparse.ArgumentParser, "add_argument", note)
        parse_config(["--base", "x"])
    return {name for name in found if name.startswith("--")}


def check_line(line: str, flags: set[str]) -> None:
    """Check what holds for every line that a start ends with."""
    assert line.strip() == line
    assert line
    assert "\n" not in line
    assert not line.startswith("[Errno")
    for word in ("trust_remote_code", "Traceback", "ignore_mismatched", "hf.co", "None"):
        assert word not in line
    # Only what this command takes is advised.
    assert set(FLAG.findall(line)) <= flags


def config_of(base: Path | str, state_dir: Path, **more: Any) -> ServerConfig:
    values: dict[str, Any] = {
        "base": str(base),
        "state_dir": state_dir,
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "device": "cpu",
        "dtype": "float32",
        "compile": "off",
    }
    return ServerConfig(**(values | more))


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, flags: set[str]) -> Refused:
    """The line with which a start ends."""

    def refuse(base: Path | str, state_dir: Path | None = None, **more: Any) -> str:
        state_dir = state_dir or tmp_path / "state"
        with pytest.raises(StartupError) as caught:
            Runtime(config_of(base, state_dir, **more))
        line = str(caught.value)
        check_line(line, flags)
        # What it held is let go of.
        AdapterStore(state_dir / "adapters").close()
        return line

    return refuse


@pytest.fixture
def base(gpt2: Family, tmp_path: Path) -> Path:
    """A folder of the tiny GPT-2 to spoil."""
    return Path(shutil.copytree(gpt2.base, tmp_path / "base"))


# Anything that raises.

ANYTHING: dict[str, tuple[Exception, str]] = {
    "key": (KeyError("a\nb"), "cannot be served: KeyError: 'a\\nb'"),
    "assertion": (AssertionError(), "cannot be served: AssertionError: AssertionError"),
    "runtime": (RuntimeError("one\n  two"), "cannot be served: RuntimeError: one two"),
    "value": (ValueError("too\nmany"), "cannot be served: too many"),
    "unicode": (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        "cannot be served: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position "
        "0: bad",
    ),
    "file": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"),
        "cannot be served: FileNotFoundError: [Errno 2] No such file or directory: 'x.json'",
    ),
    "recursion": (RecursionError("deep"), "cannot be served: RecursionError: deep"),
    "attribute": (AttributeError("no x"), "cannot be served: AttributeError: no x"),
    "allocates": (RuntimeError("shared allocator"), "cannot be served: RuntimeError: shared all"),
}
MEMORY: dict[str, Exception] = {
    "python": MemoryError(),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "cpu": RuntimeError(ALLOCATOR),
    "windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
    ),
    "mapping": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
}
PLACES = ("load_checkpoint", "checkpoint_digest", "expect", "Model", "ResidentWeights", "Engine")


def _some_places(case: str) -> list[str]:
    """Three places for each case, so that each place has some of either table."""
    first = [*ANYTHING, *MEMORY].index(case)
    return [PLACES[(first + further) % len(PLACES)] for further in (0, 1, 3)]


def fail_at(place: str, error: Exception, patch: Patch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    room = next(room for room in (loading_room, local_room) if hasattr(room, place))
    patch.setattr(room, place, fail)


@pytest.mark.parametrize("case", ANYTHING)
def test_any_error_becomes_one_line(
    case: str, gpt2: Family, refused: Refused, monkeypatch: Patch
) -> None:
    error, reason = ANYTHING[case]
    assert not is_out_of_memory(error)
    for place in _some_places(case):
        with monkeypatch.context() as patch:
            fail_at(place, error, patch)
            line = refused(gpt2.base, self_check=place == "expect")
            assert line.startswith(f"base {gpt2.base} {reason}"), place
            assert "does not fit" not in line


@pytest.mark.parametrize("case", MEMORY)
def test_a_lack_of_memory_is_said_to_be_one(
    case: str, gpt2: Family, refused: Refused, monkeypatch: Patch
) -> None:
    error = MEMORY[case]
    assert is_out_of_memory(error)
    for place in _some_places(case):
        with monkeypatch.context() as patch:
            fail_at(place, error, patch)
            line = refused(gpt2.base, max_batch=3, self_check=place == "expect")
            assert line.startswith(
                f"base {gpt2.base} does not fit the memory of --device cpu with --max-batch 3: "
            )
    fail_at("Model", error, monkeypatch)
    assert " --max-batch 16 and --max-length 8: " in refused(gpt2.base, max_length=8)


def test_a_real_lack_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


def test_the_command_ends_with_that_line_and_status_1(
    gpt2: Family, tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("superpose-server", f"--base={gpt2.base}", f"--state-dir={tmp_path / 'state'}"),
        *("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--device=cpu", "--compile=off"),
        "--no-self-check",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    for error in (*(error for error, _ in ANYTHING.values()), *MEMORY.values()):
        with monkeypatch.context() as patch:
            fail_at("Model", error, patch)
            with pytest.raises(SystemExit) as caught:
                command.run()
        # A text: Python prints it to stderr and exits with 1.
        assert str(caught.value.code).startswith(f"superpose-server: base {gpt2.base} ")
        assert "\n" not in str(caught.value.code)
    out, err = capfd.readouterr()
    assert (out, "Traceback" in err) == ("", False)


# What is wrong with the base.


def test_what_checkpoints_are_refused_for_is_said_as_it_is(
    base: Path, tmp_path: Path, refused: Refused
) -> None:
    """Each line of the tables of `test_checkpoint.py`, as a server says it."""
    lines = []
    spoilers: list[Callable[[Path], Any]] = [
        *(spoil for spoil, _ in refusals.FILES.values()),
        *(spoil for spoil, _ in refusals.TENSORS.values()),
        *(
            lambda f, c=config: refusals.configure(f, **c)
            for config, _ in refusals.SETTINGS.values()
        ),
    ]
    # The tables are about a model of 64 positions.
    source = save_base(tiny_gpt2(), tmp_path / "source")
    for spoil in spoilers:
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(source, base)
        spoil(base)
        lines.append(refused(base))
    assert all(re.match(rf"base {re.escape(str(base))}:? ", line) for line in lines)
    assert not any("is refused" in line or "cannot be served" in line for line in lines)
    assert len(set(lines)) > 40


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: refusals.configure(folder, **fields)


def _tokenizer_config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def _adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    make_adapter(tiny_gpt2(), folder)


def _llama(*spoilers: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        save_base(tiny_llama(), folder)
        for each in spoilers:
            each(folder)

    return spoil


def _remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def _cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text((folder / name).read_text()[:40])


def _tokens(content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "tokenizer.json").write_text(content)


COPY = "copy tokenizer.json and tokenizer_config.json there from where the base came from"
NO_TOKENIZER = f"has no tokenizer.json, and no other tokenizer that can be used: {COPY}"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "encoder-decoder": (_config(model_type="t5"), "is an encoder-decoder (t5) or a part of one: "),
    "quantised": (_config(quantization_config={"quant_method": "awq"}), "is quantised (awq): "),
    "an adapter": (_adapter, "this folder is an adapter and no base: name the base that it was"),
    "unknown": (_config(model_type="foo"), "is of model type 'foo', which transformers "),
    "no tokenizer.json": (_remove("tokenizer.json"), NO_TOKENIZER),
    # transformers makes an empty GPT2Tokenizer of nothing.
    "no tokenizer": (_remove("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    "no tokenizer of a llama": (
        _llama(_remove("tokenizer.json", "tokenizer_config.json")),
        NO_TOKENIZER,
    ),
    "tokenizer cut off": (
        _cut("tokenizer.json"),
        "has a tokenizer that cannot be used (JSONDecodeError: ",
    ),
    "tokenizer of nothing": (_tokens("{}"), "has a tokenizer that cannot be used (KeyError: "),
    "tokenizer_config.json cut off": (
        _cut("tokenizer_config.json"),
        "has a tokenizer that cannot be used (JSONDecodeError: ",
    ),
    "tokenizer of its own code": (
        _llama(_tokenizer_config(auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Foo")),
        "has a tokenizer that needs code of its own (auto_map in tokenizer_config.json), which is "
        "never run: use a base with a tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_base_is_refused_in_its_own_words(
    case: str, base: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = SPOILT[case]
    spoil(base)
    line = refused(base)
    assert re.sub(rf"^base {re.escape(str(base))}:? ", "", line).startswith(reason)
    if "tokenizer" in case and "code" not in case:
        assert line.endswith(COPY)
    assert "Traceback" not in capfd.readouterr().err


def test_the_process_says_it_in_one_line(base: Path, tmp_path: Path, flags: set[str]) -> None:
    _remove("tokenizer.json")(base)
    with ServerProcess(base, tmp_path / "state") as process:
        status, errors = process.wait()
    assert (status, process.ready_line) == (1, "")
    assert errors == f"superpose-server: base {base} {NO_TOKENIZER}\n"
    check_line(errors.rstrip("\n"), flags)


# What is wrong with the flags.


def test_a_length_that_the_base_has_not_is_refused_before_anything_is_checked(
    gpt2: Family, refused: Refused, monkeypatch: Patch
) -> None:
    fail_at("_check_meaning", AssertionError("too late"), monkeypatch)
    fail_at("checkpoint_digest", AssertionError("too late"), monkeypatch)
    assert refused(gpt2.base, max_length=1025) == (
        f"--max-length is 1025: base {gpt2.base} takes 2 to 1024"
    )
    with pytest.raises(ValueError, match="--max-length is 1: use at least 2"):
        config_of(gpt2.base, Path(), max_length=1)


def test_folders_that_cannot_be_used_are_named_by_their_flags(
    gpt2: Family, tmp_path: Path, refused: Refused, flags: set[str], monkeypatch: Patch
) -> None:
    fail_at("load_checkpoint", AssertionError("too late"), monkeypatch)
    missing = tmp_path / "missing"
    assert refused(gpt2.base, adapter_dir=missing).startswith(f"--adapter-dir {missing} is no f")
    adapter = gpt2.adapters["a"]
    assert refused(gpt2.base, adapter_dir=adapter).startswith(f"--adapter-dir {adapter} is an ad")
    file = tmp_path / "file"
    file.touch()
    # In /proc nobody makes a folder, not even root.
    for folder, why in ((file, "it is a file"), (file / "s", "Not a directory"), ("/proc/s", "No")):
        for check in (command._check, Runtime):
            with pytest.raises(StartupError) as caught:
                check(config_of(gpt2.base, Path(folder)))
            line = str(caught.value)
            check_line(line, flags)
            assert line.startswith(f"--state-dir {folder} cannot be used ({why}")
            assert line.endswith("): name a folder that can be written")


def test_a_state_folder_of_another_base_is_refused(
    loop: LoopThread, gpt2: Family, llama: Family, tmp_path: Path, refused: Refused
) -> None:
    state_dir = tmp_path / "state"
    served = start(loop, gpt2.base, state_dir)
    served.client.push("a", gpt2.adapters["a"])
    served.client.add("a")
    served.stop()
    assert refused(llama.base, state_dir).startswith("pushed adapter a: ")
    shutil.rmtree(state_dir / "adapters")
    assert refused(llama.base, state_dir).startswith(f"journal {state_dir}/mix.json belongs to ano")


def test_a_port_that_is_taken_is_refused_before_torch_is_imported(
    gpt2: Family, tmp_path: Path, monkeypatch: Patch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("listen", "metrics_listen", "http_listen"):
            with pytest.raises(StartupError, match=r"in use\): choose a free port, or 0 for any"):
                command._check(config_of(gpt2.base, tmp_path, **{flag: address}))


def test_without_its_packages_the_http_door_is_refused_before_torch_is_imported(
    gpt2: Family, tmp_path: Path, monkeypatch: Patch
) -> None:
    absent = {"uvicorn", "starlette"}
    monkeypatch.setattr(
        "superpose_server.command.find_spec",
        lambda name: None if name in absent else find_spec(name),
    )
    with pytest.raises(StartupError) as caught:
        command._check(config_of(gpt2.base, tmp_path, http_listen="127.0.0.1:0"))
    assert str(caught.value) == (
        "--http-listen 127.0.0.1:0 needs starlette and uvicorn: pip install 'superpose[http]'"
    )
    command._check(config_of(gpt2.base, tmp_path))


# A base that fails its check.


def read_beyond(patch: Patch) -> None:
    """Let layers write nothing while they decode."""
    real = SlotCache.update

    def update(self: Any, keys: Any, values: Any, layer: int, *more: Any, **others: Any) -> Any:
        if layer == 1 and layer < len(self._keys) and self._batch.decodes:
            return self._keys[layer], self._values[layer]
        return real(self, keys, values, layer, *more, **others)

    patch.setattr(SlotCache, "update", update)


def test_a_base_that_fails_is_refused_and_served_if_told(
    loop: LoopThread, gpt2: Family, tmp_path: Path, refused: Refused, monkeypatch: Patch
) -> None:
    read_beyond(monkeypatch)
    line = refused(gpt2.base)
    assert re.fullmatch(
        rf"base {re.escape(str(gpt2.base))} is refused: a row of a small random model of its kind "
        r"has another answer here than in transformers: logits are off by [\d.e+]+ % of their "
        r"spread \(gpt2.*\); --no-self-check serves it all the same",
        line,
    )
    # Not even that is noted down as good.
    assert not list(tmp_path.glob("cache/superpose/trusted/*"))
    monkeypatch.setattr(loading_room, "check_meaning", lambda *_, **__: None)
    line = refused(gpt2.base, dtype="bfloat16")
    assert re.fullmatch(
        r"base \S+ is refused: its weights give another answer here than in transformers: logits "
        r"are off by [\d.e+]+ % of their spread, where rounding explains [\d.]+ % \(gpt2\); "
        "--no-self-check serves it all the same",
        line,
    )
    served = start(loop, gpt2.base, tmp_path / "state", self_check=False)
    try:
        assert len(served.greedy()) == 8
    finally:
        served.stop()


def test_a_base_whose_output_is_not_finite_is_refused(base: Path, refused: Refused) -> None:
    refusals.change(base, transformer__ln_f__weight=torch.full((32,), 1e30))
    line = refused(base, dtype="float16")
    assert line == (
        f"base {base} is refused: its output is not finite in float16, in transformers' own pass "
        "either: use another --dtype, or copy the checkpoint again; --no-self-check serves it all "
        "the same"
    )


def test_the_environment_can_turn_the_check_off(monkeypatch: Patch) -> None:
    assert parse_config(["--base", "x"]).self_check
    assert not parse_config(["--base", "x", "--no-self-check"]).self_check
    for setting, checked in (("1", False), ("true", False), ("0", True), ("", True)):
        monkeypatch.setenv("SUPERPOSE_NO_SELF_CHECK", setting)
        assert parse_config(["--base", "x"]).self_check is checked
    monkeypatch.setenv("SUPERPOSE_NO_SELF_CHECK", "maybe")
    with pytest.raises(SystemExit):
        parse_config(["--base", "x"])


# The order of a start.


@pytest.fixture
def order(monkeypatch: Patch) -> list[str]:
    """What a start does, in its order."""
    done: list[str] = []

    def note(holder: Any, name: str) -> None:
        real = getattr(holder, name)

        def noting(*arguments: Any, **more: Any) -> Any:
            done.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(holder, name, noting)

    for name in ("resolve_base", "load_checkpoint", "Tokenizer", "checkpoint_digest"):
        note(loading_room, name)
    note(runtime_room, "AdapterStore")
    for name in ("check_meaning", "expect", "Model"):
        note(loading_room, name)
    note(local_room, "check_weights")
    note(ResidentWeights, "fold")
    note(Engine, "start")
    return done


LOADED = ["resolve_base", "load_checkpoint", "Tokenizer", "checkpoint_digest", "AdapterStore"]


def test_a_start_checks_the_meaning_once_and_the_weights_each_time_before_the_mix(
    loop: LoopThread, gpt2: Family, tmp_path: Path, order: list[str]
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state")
    assert order == [*LOADED, "check_meaning", "expect", "Model", "check_weights", "fold", "start"]
    gpt2.push_all(served.client)
    served.client.set({"a": 1.0, "b": -0.5})
    bits, tokens = served.score_bits(), served.greedy()
    served.stop()

    order.clear()
    again = start(loop, gpt2.base, tmp_path / "state")
    try:
        assert order == [*LOADED, "expect", "Model", "check_weights", "fold", "start"]
        assert again.client.mix().weights == {"a": 1.0, "b": -0.5}
        assert again.client.verify().ok
        assert (again.score_bits(), again.greedy()) == (bits, tokens)
    finally:
        again.stop()

    order.clear()
    start(loop, gpt2.base, tmp_path / "state", self_check=False).stop()
    assert order == [*LOADED, "Model", "fold", "start"]


def test_each_kind_is_checked_for_itself(
    loop: LoopThread, gpt2: Family, llama: Family, tmp_path: Path, order: list[str]
) -> None:
    for family in (gpt2, llama, gpt2, llama):
        start(loop, family.base, tmp_path / family.base.parent.name).stop()
    assert order.count("check_meaning") == 2
    assert order.count("check_weights") == 4


def test_the_checks_leave_no_trace(loop: LoopThread, gpt2: Family, tmp_path: Path) -> None:
    told = {}
    for self_check in (False, True):
        served = start(loop, gpt2.base, tmp_path / "state", self_check=self_check)
        try:
            cache: Any = served.runtime.local.runner.model.cache
            assert not any(store[:-1].any() for store in (*cache._keys, *cache._values))
            assert served.recorder.events == []
            metrics = served.runtime.metrics.registry
            told[self_check] = {
                (sample.name, *sample.labels.values()): sample.value
                for family in metrics.collect()
                for sample in family.samples
                if not re.search("created|timestamp|seconds|process|memory", sample.name)
            }
            assert not any(
                m._forward_hooks for m in served.runtime.local.runner.model.module.modules()
            )
            assert served.client.verify().ok
        finally:
            served.stop()
    assert told[True] == told[False]


def test_a_mixture_of_experts_starts_in_bfloat16(loop: LoopThread, tmp_path: Path) -> None:
    base = save_base(build("mixtral"), tmp_path / "base")
    served = start(loop, base, tmp_path / "state", dtype="bfloat16")
    try:
        assert served.client.verify().ok
        assert len(served.greedy()) == 8
    finally:
        served.stop()


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: Patch) -> None:
    """A machine that has none, and no kernels either."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Unwrapped, so that what this process has loaded already is no help.
    for room in (loading_room, model_room):
        monkeypatch.setattr(room, "load_kernels", load_kernels.__wrapped__)


def test_a_start_that_insists_on_kernels_needs_a_compiler(
    gpt2: Family, tmp_path: Path, no_compiler: None
) -> None:
    config = ServerConfig(str(gpt2.base), state_dir=tmp_path / "s", device="cpu", compile="on")
    with pytest.raises(StartupError, match=r"cannot compile the kernels .*--compile off") as caught:
        Runtime(config)
    assert "base " not in str(caught.value)
    assert "--no-self-check" not in str(caught.value)


def test_without_a_compiler_a_server_serves_without_kernels_and_says_so(
    loop: LoopThread,
    gpt2: Family,
    tmp_path: Path,
    no_compiler: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", device="cpu", compile="auto")
    try:
        assert not served.server.runtime.local.runner.model.packed
        assert served.greedy()
    finally:
        served.stop()
    [line] = [r.message for r in caplog.records if "kernels" in r.message]
    assert line.startswith("serving without kernels, which is slower: ")
    assert line.endswith("install g++ 11 or newer, or pass --compile off")


def test_kernels_that_the_processor_lacks_are_no_reason_to_do_without(
    gpt2: Family, tmp_path: Path, no_compiler: None, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("SUPERPOSE_KERNELS", "mmx")
    config = ServerConfig(str(gpt2.base), state_dir=tmp_path / "state", device="cpu")
    with pytest.raises(StartupError, match=r"^SUPERPOSE_KERNELS is 'mmx': this processor runs "):
        Runtime(config)


@pytest.mark.parametrize("device", ["mps", "meta", "nowhere", "cuda:99"])
def test_other_devices_are_refused_by_name(device: str, gpt2: Family, tmp_path: Path) -> None:
    config = ServerConfig(str(gpt2.base), state_dir=tmp_path / "state", device=device)
    with pytest.raises(StartupError, match=f"^--device {device}"):
        Runtime(config)
