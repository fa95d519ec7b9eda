"""The mixer in Chromium, against a server of the bundled base; `make browser` installs all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from tests.integration.conftest import gpt2, loop
from tests.integration.harness import LoopThread, Served, start

from superpose_adapters.bundled import MINI

__all__ = ["gpt2", "loop"]  # fixtures

# `make test` has no browser, and `make browser` fails if it finds no test.
collect_ignore_glob = [] if find_spec("playwright") else ["test_*.py"]


@pytest.fixture(scope="session")
def served(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of `mini` whose default mix is the base; every test leaves it so.

    Nothing checks its weights meanwhile, so that its engine works for no one but the page.
    """
    state = tmp_path_factory.mktemp("browser") / "state"
    server = start(loop, MINI.name, state, http_listen="127.0.0.1:0", verify_every=0)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, or whatever else goes by that name."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


@pytest.fixture
def mixer(request: pytest.FixtureRequest, chromium: Any, served: Served) -> Iterator[Any]:
    """The page, loaded; a test that needs options of the browser's context gives them as `param`.

    Whatever a test does with it, nothing may be written to the console as an error, and no request
    may leave the server.
    """
    from tests.browser.mixer import Mixer

    context = chromium.new_context(**getattr(request, "param", {}))
    mixer = Mixer(context.new_page(), f"http://{served.server.http_address}/")
    mixer.open()
    yield mixer
    context.close()
    served.client.set("base")
    for named in served.client.named_mixes():
        served.client.unname_mix(named.name)
    assert mixer.errors == []
    assert {url for url in mixer.requested if not url.startswith(mixer.url)} == set()
