"""Clients of others, which `make clients` installs, against a server of the bundled base."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from tests.integration.harness import LoopThread, Served, start

from superpose_adapters.bundled import MINI

# `make test` has none of them, and `make clients` fails if it finds no test.
_NEEDED = ("openai", "lm_eval", "schemathesis")
collect_ignore_glob = [] if all(map(find_spec, _NEEDED)) else ["test_*.py"]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of `mini` with medicine in the default mix, and the mix qa."""
    loop = LoopThread()
    server = start(
        loop, MINI.name, tmp_path_factory.mktemp("clients") / "state", http_listen="127.0.0.1:0"
    )
    server.client.add("medicine")
    server.client.name_mix("qa", "math=1,medicine=0.5")
    yield server
    server.stop()
    loop.close()
