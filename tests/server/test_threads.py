"""The engine computes with all its threads, whatever other threads of the process do before it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from tests.server.helpers import bound, random_adapter

from superpose_adapters.mix import BoundMix
from superpose_server.config import ServerConfig
from superpose_server.engine.observer import EngineObserver
from superpose_server.model.threads import compute_with, thread_of_one_core
from superpose_server.runtime import Runtime


class Threads(EngineObserver):
    """Notes how many threads torch computes with on the engine thread."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        self.counts.append(torch.get_num_threads())


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (1, 1)])
@pytest.mark.parametrize("compile", ["off", "auto"])  # auto: the fold is the kernels' own.
def test_the_operators_number_of_threads_does_not_become_the_engines(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compile: Literal["off", "auto"],
    threads: int | None,
    expected: int,
) -> None:
    # Passes need no graph here, which would take most of a minute on a machine that has none yet.
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    seen = Threads()
    config = ServerConfig(base=str(base), state_dir=tmp_path, compile=compile, threads=threads)
    runtime = Runtime(config, observer=seen)
    try:
        digest = runtime.base.digest
        mix = bound((random_adapter(runtime.base.layout, 1), 1.0), base_digest=digest)
        # Before the engine has computed anything.
        counts = asyncio.run(runtime.operate(lambda operator: torch.get_num_threads()))
        prepared = asyncio.run(runtime.operate(lambda operator: operator.prepare(mix)))
        runtime.local.fold(prepared).result(60)
    finally:
        runtime.close()
    assert counts == 1
    assert seen.counts == [expected]


@pytest.mark.usefixtures("three_threads")
def test_a_number_that_another_thread_sets_later_changes_nothing() -> None:
    counts = []
    ready, go = threading.Event(), threading.Event()

    def work() -> None:
        compute_with(2)
        ready.set()
        go.wait()
        torch.ones(4).sum()
        counts.append(torch.get_num_threads())

    worker = threading.Thread(target=work)
    worker.start()
    ready.wait()
    other = threading.Thread(target=compute_with, args=(1,))
    other.start()
    other.join()
    go.set()
    worker.join()
    assert counts == [2]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.skipif(sys.platform != "linux", reason="priorities are of processes elsewhere")
def test_a_thread_that_yields_does_so_alone() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    here = priority()
    with thread_of_one_core("prompt") as prompt, thread_of_one_core("late", yields=True) as late:
        assert prompt.submit(priority).result() == here
        assert late.submit(priority).result() == max(here, 10)
    assert priority() == here
