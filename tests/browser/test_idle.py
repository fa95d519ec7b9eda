"""What the page does by itself: little while it is open, nothing while it is hidden."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect
from tests.browser.mixer import Mixer
from tests.integration.harness import Family, LoopThread, Served, start


def engine_seconds() -> float:
    """Return the processor time that engine threads have used, to the nanosecond."""
    engines = [thread for thread in threading.enumerate() if thread.name == "engine"]
    assert engines
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in engines
        if thread.ident is not None
    )


def polls(page: Page, count: int) -> None:
    """Let so much of the page's time go by that it asks for the load `count` times."""
    for _ in range(count):
        with page.expect_response("**/v1/server"):
            page.clock.fast_forward(2000)


def test_an_open_page_costs_the_engine_nothing(chromium: Any, served: Served) -> None:
    context = chromium.new_context()
    context.clock.install()
    mixer = Mixer(context.new_page(), f"http://{served.server.http_address}/")
    mixer.open()
    polls(mixer.page, 1)
    before = engine_seconds()
    polls(mixer.page, 6)  # The lists are asked for among them.
    assert engine_seconds() == before
    assert mixer.requested.count(mixer.url + "v1/adapters") >= 2
    served.client.generate("a", max_new_tokens=1)
    assert engine_seconds() > before  # It can be seen.
    context.close()


def test_a_hidden_page_asks_for_nothing_and_comes_back(chromium: Any, served: Served) -> None:
    context = chromium.new_context()
    context.clock.install()
    mixer = Mixer(context.new_page(), f"http://{served.server.http_address}/")
    mixer.open()
    show = (
        "value => { Object.defineProperty(document, 'hidden', { value, configurable: true });"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    with mixer.page.expect_event("requestfailed", lambda failed: "events" in failed.url):
        mixer.page.evaluate(show, True)
    asked = len(mixer.requested)
    mixer.page.clock.run_for(20_000)
    served.client.set("math")
    assert len(mixer.requested) == asked
    mixer.page.evaluate(show, False)
    expect(mixer.fact("Default mix")).to_have_text("math=1")
    served.client.set("base")
    expect(mixer.fact("Default mix")).to_have_text("base")
    assert mixer.errors == []
    context.close()


def test_a_server_that_is_lost_is_missed_and_found_again(
    chromium: Any, loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    first = start(loop, gpt2.base, tmp_path / "state", http_listen="127.0.0.1:0")
    address = first.server.http_address
    gpt2.push_all(first.client)
    first.client.set("a")
    context = chromium.new_context()
    mixer = Mixer(context.new_page(), f"http://{address}/")
    mixer.open()
    expect(mixer.mix_text).to_have_value("a=1")
    mixer.slider("b").fill("0.5")
    first.stop()
    expect(mixer.page.get_by_text("server lost, trying again")).to_be_visible()
    mixer.button("Make it the default mix").click()
    mixer.button("Set it").click()
    alert = mixer.page.get_by_role("dialog").get_by_role("alert")
    expect(alert).to_contain_text("the server cannot be reached")
    mixer.button("Cancel").click()
    second = start(loop, gpt2.base, tmp_path / "state", http_listen=address)
    second.client.delete("c")
    try:
        expect(mixer.page.get_by_text("ready", exact=True)).to_be_visible()
        expect(mixer.page.locator(".sliders li")).to_have_count(2)
        expect(mixer.mix_text).to_have_value("a=1,b=0.5")
        expect(mixer.fact("Default mix")).to_have_text("a=1")
    finally:
        context.close()
        second.stop()
