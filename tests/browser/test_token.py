"""A server that asks for a token: the page asks for it, keeps it for its tab, and tells nobody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.browser.mixer import Mixer
from tests.integration.harness import LoopThread, Served, start
from typer.testing import CliRunner

from superpose_adapters.bundled import MINI
from superpose_client.cli import app


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens") / "tokens.json"


def new_token(tokens: Path, name: str, scope: str, *limits: str) -> str:
    """Make a token as an operator does."""
    options = ["--json", "--scope", scope, "--tokens", str(tokens), *limits]
    result = CliRunner().invoke(app, ["token", "new", name, *options])
    assert result.exit_code == 0, result.stderr
    return str(json.loads(result.stdout)["token"])


@pytest.fixture(scope="module")
def user(tokens: Path) -> str:
    return new_token(tokens, "user", "inference")


@pytest.fixture(scope="module")
def operator(tokens: Path) -> str:
    return new_token(tokens, "operator", "admin")


@pytest.fixture(scope="module")
def guarded(
    loop: LoopThread,
    tokens: Path,
    user: str,
    operator: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("guarded") / "state"
    server = start(loop, MINI.name, state, http_listen="127.0.0.1:0", tokens=tokens)
    yield server
    server.stop()


@pytest.fixture
def mixer(chromium: Any, guarded: Served) -> Iterator[Mixer]:
    """The page, loaded, which has no token yet."""
    context = chromium.new_context()
    mixer = Mixer(context.new_page(), f"http://{guarded.server.http_address}/")
    mixer.errors_of_status(401)
    mixer.page.goto(mixer.url)
    expect(mixer.page.get_by_text("token needed", exact=True)).to_be_visible()
    yield mixer
    context.close()
    assert mixer.errors == []


def give(mixer: Mixer, token: str) -> None:
    mixer.page.get_by_label("Token", exact=True).fill(token)
    mixer.button("Use it").click()


def is_ready(mixer: Mixer) -> None:
    expect(mixer.page.get_by_text("ready", exact=True)).to_be_visible()
    expect(mixer.slider("math")).to_be_visible()
    expect(mixer.page.get_by_label("Token", exact=True)).to_have_count(0)


def test_a_token_is_asked_for_and_kept_for_the_tab(mixer: Mixer, user: str) -> None:
    alert = mixer.page.get_by_role("alert")
    expect(alert).to_contain_text("this server asks for a token")
    give(mixer, "tök\u00e9n")  # which no header field can hold
    give(mixer, "nonsense")
    expect(alert).to_contain_text("this token is not known here")
    give(mixer, f" {user}\n")
    is_ready(mixer)
    mixer.write("Question: What is glaucoma ?\nAnswer:", tokens=4)
    mixer.page.reload()
    is_ready(mixer)
    assert not any(user in url for url in mixer.requested)
    assert mixer.page.context.cookies() == []
    assert user not in mixer.page.content()
    another = mixer.page.context.new_page()
    another.goto(mixer.url)
    expect(another.get_by_text("token needed", exact=True)).to_be_visible()


def test_until_then_the_server_is_left_alone(mixer: Mixer) -> None:
    asked = len(mixer.requested)
    mixer.page.clock.install()
    mixer.page.clock.run_for(20_000)
    assert len(mixer.requested) == asked


def test_what_the_token_does_not_allow_is_told(mixer: Mixer, user: str, operator: str) -> None:
    mixer.errors_of_status(403)
    give(mixer, user)
    is_ready(mixer)
    mixer.slider("math").fill("1")
    mixer.button("Make it the default mix").click()
    mixer.button("Set it").click()
    alert = mixer.page.get_by_role("dialog").get_by_role("alert")
    expect(alert).to_contain_text("token user has scope inference, and this call needs admin")


def test_a_token_of_too_few_calls_is_told_and_no_loss(mixer: Mixer, tokens: Path) -> None:
    mixer.errors_of_status(429)
    give(mixer, new_token(tokens, "single", "inference", "--concurrency", "1"))
    readiness = mixer.page.locator(".readiness")
    expect(readiness).to_contain_text("token single has 1 calls under way, of 1 that it may")


def test_what_is_copied_does_not_hold_it(mixer: Mixer, user: str) -> None:
    give(mixer, user)
    is_ready(mixer)
    mixer.page.get_by_text("Copy as a command or program").click()
    for way, held in (
        ("curl", '-H "Authorization: Bearer $SUPERPOSE_TOKEN"'),
        ("Python client", 'token=os.environ["SUPERPOSE_TOKEN"]'),
        ("OpenAI client", 'api_key=os.environ["SUPERPOSE_TOKEN"]'),
    ):
        mixer.button(way).click()
        shown = mixer.page.get_by_label(f"The request, for {way}")
        expect(shown).to_contain_text(held)
        assert user not in str(shown.text_content())


def test_a_token_that_is_revoked_is_asked_for_again(
    mixer: Mixer, tokens: Path, operator: str
) -> None:
    token = new_token(tokens, "passing", "inference")
    give(mixer, token)
    is_ready(mixer)
    revoked = CliRunner().invoke(app, ["token", "revoke", "passing", "--tokens", str(tokens)])
    assert revoked.exit_code == 0
    expect(mixer.page.get_by_text("token needed", exact=True)).to_be_visible()
    give(mixer, operator)
    is_ready(mixer)
