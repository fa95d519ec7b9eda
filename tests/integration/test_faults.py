"""A change that fails half-way leaves the old mix, bit for bit, and a server that serves."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.instants import watching
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    Fingerprint,
    LoopThread,
    Served,
    held,
    start,
    wait_until,
)
from tests.integration.http_client import Http

from superpose_client import (
    CallError,
    Client,
    FailedPreconditionError,
    HealthStatus,
    InternalError,
    UnavailableError,
)
from superpose_server.model.batch import Span
from superpose_server.weights.parameter_format import PackedFormat, PlainFormat

SET: Callable[[Client], Any] = lambda client: client.set({"b": 1.0, "c": -0.5})  # noqa: E731
OLD_MIX = {"a": 1.0}
MODULES = 6  # that the adapters of the tiny GPT-2 adapt


@dataclass(frozen=True)
class State:
    """All that a failed change must leave."""

    fingerprint: Fingerprint
    hashes: dict[str, str]
    journal: bytes
    weights: dict[str, float]
    resident: dict[str, float]


def journal(served: Served) -> Path:
    assert served.runtime.config.state_dir is not None
    return served.runtime.config.state_dir / "mix.json"


def state_of(served: Served) -> State:
    mix = served.client.mix()
    return State(
        served.fingerprint(),
        served.hashes(),
        journal(served).read_bytes(),
        mix.weights,
        mix.resident.weights,
    )


def check_serves(served: Served, before: State) -> None:
    """Check that nothing has changed, and that the same change works now."""
    assert state_of(served) == before
    assert served.client.verify().ok
    state = served.client.set({"b": 1.0, "c": -0.5})
    assert state.generation == before.fingerprint.generation + 1
    assert served.greedy() != before.fingerprint.tokens
    assert served.client.verify().ok


def fail_folds(monkeypatch: pytest.MonkeyPatch, which: Callable[[int], bool]) -> list[int]:
    """Let the folds of modules whose number `which` names fail; returns the numbers so far."""
    calls: list[int] = []

    def replace(form: type[PlainFormat | PackedFormat]) -> None:
        real = form.fold

        def failing(self: Any, out: Any, *arguments: Any) -> None:
            calls.append(len(calls))
            if which(calls[-1]):
                out.view(-1)[: out.numel() // 2].fill_(7.0)  # half-way through
                raise MemoryError("no memory")
            real(self, out, *arguments)

        monkeypatch.setattr(form, "fold", failing)

    replace(PlainFormat)
    replace(PackedFormat)
    return calls


@pytest.mark.parametrize("failing", [0, MODULES // 2, MODULES - 1], ids=["first", "middle", "last"])
def test_a_fold_that_fails_leaves_the_old_mix(
    served: Served, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = state_of(served)
    with monkeypatch.context() as patch:
        calls = fail_folds(patch, lambda number: number == failing)
        with pytest.raises(InternalError, match=r"the fold failed.*is served still") as caught:
            SET(served.client)
    assert caught.value.reason == "FOLD_FAILED"
    assert len(calls) == failing + 1 + MODULES  # up to the fault, and the old mix once more
    assert served.recorder.folds[-1].ok is False
    check_serves(served, before)


def test_a_fold_and_a_refold_that_fail_leave_the_base_and_corrected_rows(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(served)
    with monkeypatch.context() as patch:
        fail_folds(patch, lambda number: True)
        with pytest.raises(InternalError, match="the fold failed"):
            SET(served.client)
    mix = served.client.mix()
    assert (mix.generation, mix.weights) == (before.fingerprint.generation, OLD_MIX)
    assert mix.resident.weights == {}
    assert served.client.verify().ok
    assert served.greedy() == before.fingerprint.tokens
    assert served.recorder.steps[-1].corrected == 1
    assert journal(served).read_bytes() == before.journal
    served.client.set("base")
    assert served.client.set(OLD_MIX).digest == before.fingerprint.digest
    assert served.hashes() == before.hashes


def fail_nth(monkeypatch: pytest.MonkeyPatch, where: object, name: str, nth: int) -> None:
    """Let the nth call of `where.name` from now on say that there is no space."""
    real = getattr(where, name)
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [(os, "fsync", 1), (os, "fsync", 2), (Path, "replace", 1), (os, "fsync", 3)],
    ids=["file", "copy", "rename", "folder"],
)
def test_a_journal_that_cannot_be_written_leaves_the_old_mix(
    served: Served, monkeypatch: pytest.MonkeyPatch, where: object, name: str, nth: int
) -> None:
    before = state_of(served)
    with monkeypatch.context() as patch:
        fail_nth(patch, where, name, nth)
        with pytest.raises(
            FailedPreconditionError, match=r"the journal cannot be written \(No space"
        ) as caught:
            SET(served.client)
    assert caught.value.reason == "JOURNAL_WRITE_FAILED"
    check_serves(served, before)


CHANGES: dict[str, Callable[[Client, Family], object]] = {
    "set": lambda client, _: client.set({"b": 1.0, "c": -0.5}),
    "name": lambda client, _: client.name_mix("qa", {"b": 2.0}),
    "push": lambda client, family: client.push("d", family.adapters["a2"]),
    "replace": lambda client, family: client.push("a", family.adapters["a2"], replace=True),
    "merge": lambda client, _: client.merge("d", "b,c=-0.5", method="sum"),
    "delete": lambda client, _: client.delete("c"),
}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=["read only", "not permitted"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_refuses_from_any_call_on_changes_nothing(
    served: Served, gpt2: Family, change: str, code: int
) -> None:
    def state() -> tuple[object, ...]:
        client = served.client
        return client.mix(), client.adapters(), client.named_mixes(), client.info().weights_intact

    before = state()
    for patience in itertools.count():
        calls = itertools.count()

        def refuse(event: str, subject: Any, patience: int = patience, calls: Any = calls) -> None:
            if next(calls) >= patience:
                raise OSError(code, os.strerror(code), str(subject))

        try:
            with watching(refuse):
                CHANGES[change](served.client, gpt2)
        except FailedPreconditionError as error:
            assert os.strerror(code) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            assert state() == before
        else:
            break
    assert patience > 2  # It was refused at some of its calls.
    assert state() != before
    assert served.client.verify().ok


def test_a_replacement_whose_fold_fails_leaves_the_old_adapter(
    served: Served, gpt2: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, adapter = state_of(served), served.client.adapter("a")
    with monkeypatch.context() as patch:
        fail_folds(patch, lambda number: number == 2)
        with pytest.raises(InternalError, match="the fold failed"):
            served.client.push("a", gpt2.adapters["a2"], replace=True)
    assert served.client.adapter("a") == adapter
    assert served.runtime._store.names["a"] == adapter.digest
    check_serves(served, before)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_fault_in_a_step_ends_its_rows_and_no_others(
    served: Served, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    before = state_of(served)
    runner = served.runtime.local.runner
    real = runner.run
    faults = [RuntimeError("secret detail")]

    def fails_once(spans: Sequence[Span], *arguments: Any) -> torch.Tensor:
        if faults and (spans[0].position == 0) == (phase == "prefill"):
            raise faults.pop()
        return real(spans, *arguments)

    monkeypatch.setattr(runner, "run", fails_once)
    with pytest.raises(InternalError, match=r"^internal error$") as caught:
        list(served.client.stream(PROMPT, max_new_tokens=20, ignore_eos=True))
    assert caught.value.reason == "INTERNAL"
    assert served.client.info().running == 0
    check_serves(served, before)


def test_a_fault_outside_of_every_phase_hangs_nobody(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(served)
    engine = served.runtime.local
    stream = served.client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    real = engine._do_slice
    faults = [RuntimeError("secret detail")]

    def fails_once() -> None:
        if faults:
            raise faults.pop()
        real()

    monkeypatch.setattr(engine, "_do_slice", fails_once)
    with pytest.raises(InternalError, match=r"^internal error$"):
        list(stream)
    check_serves(served, before)


def test_an_engine_that_dies_ends_every_call_and_says_that_only_a_new_start_helps(
    loop: LoopThread, gpt2: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is no `Exception`, or by a fault in the handling of one."""
    served = start(loop, gpt2.base, tmp_path / "state", http_listen="127.0.0.1:0")
    http = Http(served.server.http_address)
    stream = served.client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)

    def dies() -> None:
        raise SystemExit("secret detail")

    with ThreadPoolExecutor(2) as pool, held(served.recorder) as goes_on:
        waiting = pool.submit(served.client.set, "base"), pool.submit(served.client.verify)
        monkeypatch.setattr(served.runtime.local, "_do_slice", dies)
        goes_on.set()
        with pytest.raises(InternalError, match=r"^internal error$"):
            list(stream)
        for call in waiting:
            assert call.exception(PATIENCE) is None or isinstance(call.exception(), CallError)
    with pytest.raises(UnavailableError):
        served.client.generate(PROMPT)
    served.wait_for_health("superpose.v1.InferenceService", HealthStatus.NOT_SERVING)
    assert (http.ask("GET", "/healthz").status, http.ask("GET", "/readyz").status) == (200, 503)
    wait_until(served.server.failed.is_set, "the command is told to end")
    assert "died" in served.runtime.integrity.hopeless
    served.stop()


def test_an_unexpected_error_tells_no_more_than_that(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(served.runtime.registry, "all", broken)
        with pytest.raises(InternalError, match=r"^internal error$") as caught:
            served.client.adapters()
    assert caught.value.reason == "INTERNAL"
    assert "secret detail" in caplog.text
    assert len(served.client.adapters()) == 3
