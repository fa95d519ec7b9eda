from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseServer
from typing import Any

import pytest
from tests.integration.harness import Family, LoopThread, Served, start
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_llama
from torch import nn

from superpose_server.errors import ServerError

# The thread of a server's metrics looks up twice a second whether it shall end; with a server a
# test, most of the time would go into waiting for that.
BaseServer.serve_forever.__defaults__ = (0.01,)


ROOT = Path(__file__).parents[2]
# Where things lie here, and what a stack trace holds.
PLACES = (tempfile.gettempdir(), sys.prefix, str(ROOT), str(Path.home()))
TELLTALE = re.compile("|".join((*map(re.escape, PLACES), "Traceback", 'File "')))


@pytest.fixture(scope="session")
def errors_made() -> Iterator[list[str]]:
    """All that errors say which servers in this process make; each may be told to a client."""
    made: list[str] = []
    init = ServerError.__init__

    def noting(self: ServerError, message: str, reason: str, **more: Any) -> None:
        init(self, message, reason, **more)
        made.append(f"{message} {self.metadata}")

    ServerError.__init__ = noting  # type: ignore[method-assign]
    yield made
    ServerError.__init__ = init  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_error_tells_of_this_machine(errors_made: list[str]) -> Iterator[None]:
    """Check it on every way to an error that any test here goes."""
    errors_made.clear()
    yield
    assert [each for each in errors_made if TELLTALE.search(each)] == []


@pytest.fixture(scope="session")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def _family(model: nn.Module, folder: Path) -> Family:
    seeds = {"a": 1, "b": 2, "c": 3, "a2": 4}
    return Family(
        model,
        save_base(model, folder / "base"),
        {
            name: make_adapter(model, folder / "adapters" / name, seed, size=0.3)
            for name, seed in seeds.items()
        },
    )


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny GPT-2 with a context of 1024."""
    return _family(tiny_gpt2(n_positions=1024), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Llama with a context of 512."""
    return _family(tiny_llama(n_positions=512), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def served(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Iterator[Served]:
    """A server of the tiny GPT-2 with `a`, `b` and `c` pushed and `a` in the default mix."""
    server = start(loop, gpt2.base, tmp_path / "state")
    try:
        gpt2.push_all(server.client)
        server.client.add("a")
        server.recorder.forget()
        yield server
    finally:
        server.stop()
