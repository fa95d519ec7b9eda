"""What a person does on the page, and what the server then holds."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from playwright.sync_api import expect
from tests.browser.mixer import Mixer
from tests.integration.harness import PATIENCE, Served, Step

PROMPT = "Question: What is glaucoma ?\nAnswer:"
PHONE = {"viewport": {"width": 360, "height": 740}}


def weights(served: Served) -> dict[str, float]:
    """The default mix, as another client sees it."""
    return dict(served.client.mix().weights)


def make_default(mixer: Mixer) -> None:
    mixer.button("Make it the default mix").click()
    mixer.button("Set it").click()


def test_a_weight_is_set_by_slider_keys_number_and_text(mixer: Mixer) -> None:
    mixer.slider("medicine").fill("1.2")
    expect(mixer.weight("medicine")).to_have_value("1.2")
    mixer.slider("math").press("ArrowLeft")
    expect(mixer.weight("math")).to_have_value("-0.05")
    expect(mixer.mix_text).to_have_value("medicine=1.2,math=-0.05")
    mixer.weight("finance").fill("37.5")  # beyond the slider, and as good
    expect(mixer.mix_text).to_have_value("medicine=1.2,math=-0.05,finance=37.5")
    mixer.weight("finance").fill("10001")
    expect(mixer.weight("finance")).to_have_attribute("aria-invalid", "true")
    mixer.weight("finance").blur()
    expect(mixer.weight("finance")).to_have_value("37.5")
    mixer.mix_text.fill("math;finance=-0.5")
    mixer.mix_text.press("Enter")
    assert [mixer.slider(name).input_value() for name in ("finance", "math", "medicine")] == [
        *("-0.5", "1", "0")
    ]
    mixer.mix_text.fill("law=1")
    mixer.mix_text.press("Enter")
    expect(mixer.page.get_by_role("alert")).to_contain_text("law is neither a domain")
    expect(mixer.weight("math")).to_have_value("1")
    mixer.slider("medicine").fill("1")
    expect(mixer.mix_text).to_have_value("math=1,finance=-0.5,medicine=1")
    expect(mixer.page.get_by_role("alert")).to_have_count(0)


def test_a_number_is_typed_key_by_key_and_what_is_none_goes(mixer: Mixer) -> None:
    temperature = mixer.page.get_by_label("Temperature")
    temperature.clear()
    temperature.press_sequentially("0.05")
    expect(temperature).to_have_value("0.05")
    temperature.fill("7")
    assert temperature.evaluate("e => e.matches(':invalid')")
    temperature.press_sequentially("-")
    temperature.blur()
    expect(temperature).to_have_value("0.05")
    assert temperature.evaluate("e => e.validity.valid")


def test_three_texts_are_those_of_the_server(mixer: Mixer, served: Served) -> None:
    served.client.set("math")
    expect(mixer.fact("Default mix")).to_have_text("math=1")
    mixer.slider("medicine").fill("1.5")
    mixer.write(PROMPT)
    for number, mix in enumerate(("base", "math=1", "medicine=1.5"), 1):
        expected = served.client.generate(PROMPT, mix=mix, temperature=0, max_new_tokens=12)
        assert mixer.text(number).text_content() == expected.text
        article = mixer.page.get_by_role("article", name=f"Text {number}")
        expect(article.locator(".under")).to_have_text(mix)
        expect(article.locator(".figures")).to_contain_text("12 tokens")
        expect(article.locator(".figures")).to_contain_text("max tokens reached")


def test_the_same_seed_draws_the_same_in_every_column(mixer: Mixer) -> None:
    mixer.button("Two columns").click()
    mixer.choose(1, "medicine")
    mixer.choose(2, "medicine")
    mixer.page.get_by_label("Temperature").fill("1.3")
    mixer.write(PROMPT)
    first = mixer.text(1).text_content()
    assert first == mixer.text(2).text_content()
    assert mixer.page.locator("mark").count() == 0
    mixer.page.get_by_label("Seed").fill("2")
    mixer.write(PROMPT)
    assert mixer.text(1).text_content() != first


def test_words_are_marked_that_differ(mixer: Mixer) -> None:
    mixer.choose(2, "medicine")
    mixer.choose(3, "medicine")
    mixer.write(PROMPT, tokens=24)
    unmarked = [
        mixer.text(number).evaluate(
            "e => [...e.childNodes].filter(n => n.nodeName !== 'MARK').map(n => n.textContent)"
            ".join('').split(/\\s+/).filter(Boolean)"
        )
        for number in (1, 2, 3)
    ]
    assert unmarked[0] == unmarked[1] == unmarked[2]
    assert mixer.text(1).locator("mark.alone").count() > 0
    assert mixer.text(2).locator("mark.rare").count() > 0
    assert mixer.text(2).locator("mark.alone").count() == 0


def test_texts_that_are_too_long_to_compare_are_said_to_be(mixer: Mixer) -> None:
    written = [4001 * "a ", 4001 * "b ", 4001 * "c "]

    def write(route: Any) -> None:
        event = json.dumps({"choices": [{"text": written.pop(), "finish_reason": "stop"}]})
        route.fulfill(content_type="text/event-stream", body=f": kept\n\ndata: {event}\n\n")

    mixer.page.route("**/v1/completions", write)
    mixer.write(PROMPT)
    expect(mixer.page.get_by_text("more than 4000 words are not compared")).to_be_visible()
    assert mixer.page.locator("mark").count() == 0
    assert len((mixer.text(2).text_content() or "").split()) == 4001


def test_texts_appear_while_they_are_written_and_can_be_stopped(
    mixer: Mixer, served: Served
) -> None:
    let_go, stepped = threading.Event(), 0

    def gate(_: Step) -> None:
        nonlocal stepped
        stepped += 1
        if stepped >= 8:
            assert let_go.wait(PATIENCE)

    served.recorder.forget()
    served.recorder.gate = gate
    try:
        mixer.begin_to_write(PROMPT, 500)
        for number in (1, 2, 3):  # The engine is held within them, and they are there so far.
            expect(mixer.text(number)).not_to_be_empty()
        mixer.button("Stop").click()
        mixer.says("Stopped.")
    finally:
        let_go.set()
        served.recorder.gate = lambda _: None
    served.recorder.wait_for(lambda: len(served.recorder.ends) == 3)
    assert all(len(end.row.tokens) < 100 for end in served.recorder.ends)
    expect(mixer.page.locator(".figures").first).to_contain_text("stopped")


def test_the_default_mix_is_changed_once_the_change_was_seen(mixer: Mixer, served: Served) -> None:
    before = served.client.mix().generation
    mixer.slider("math").fill("0.5")
    mixer.button("Make it the default mix").click()
    expect(mixer.page.get_by_role("row", name="math absent 0.5")).to_be_visible()
    assert weights(served) == {}
    changes = held_changes(mixer)
    with mixer.page.expect_request(lambda request: request.method == "PUT"):
        mixer.button("Set it").click()
    dialog = mixer.page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    (change,) = changes
    answer = change.fetch()
    # The page is told of it before it is answered, and that is nobody else.
    expect(mixer.fact("Generation")).to_have_text(str(before + 1))
    expect(dialog.get_by_role("alert")).to_have_count(0)
    change.fulfill(response=answer)
    expect(dialog).to_have_count(0)
    expect(mixer.fact("Default mix")).to_have_text("math=0.5")
    expect(mixer.fact("Generation")).to_have_text(str(before + 1))
    expect(mixer.fact("Digest").locator("code")).to_have_attribute(
        "title", served.client.mix().digest
    )
    assert weights(served) == {"math": 0.5}
    expect(mixer.button("Make it the default mix")).to_be_disabled()


def test_undo_and_redo_go_through_what_was_watched(mixer: Mixer, served: Served) -> None:
    expect(mixer.button("Undo")).to_be_disabled()
    mixer.slider("math").fill("0.5")
    make_default(mixer)
    expect(mixer.fact("Default mix")).to_have_text("math=0.5")
    served.client.add("finance", weight=2)  # somebody else
    expect(mixer.fact("Default mix")).to_have_text("finance=2,math=0.5")
    for button, expected in (
        ("Undo", {"math": 0.5}),
        ("Undo", {}),
        ("Redo", {"math": 0.5}),
        ("Redo", {"math": 0.5, "finance": 2.0}),
    ):
        generation = served.client.mix().generation
        mixer.button(button).click()
        expect(mixer.fact("Generation")).to_have_text(str(generation + 1))
        assert weights(served) == expected
    expect(mixer.button("Redo")).to_be_disabled()
    generation = served.client.mix().generation
    changes = held_changes(mixer)
    with mixer.page.expect_request(lambda request: request.method == "PUT"):
        mixer.button("Undo").click()
    mixer.button("Undo").click()  # before the first press is answered
    expect(mixer.button("Undo")).to_be_focused()
    for change in changes:
        change.continue_()
    mixer.says(f"The default mix is math=0.5 now, generation {generation + 1}.")
    assert len(changes) == 1
    expect(mixer.page.get_by_role("alert")).to_have_count(0)


def held_changes(mixer: Mixer) -> list[Any]:
    """Hold changes of the default mix on their way; each goes on with `continue_`."""
    held: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.method == "PUT":
            held.append(route)
        else:
            route.continue_()

    mixer.page.route("**/v1/mix", hold)
    return held


def test_whoever_is_first_wins_and_the_other_is_told(mixer: Mixer, served: Served) -> None:
    mixer.slider("math").fill("0.5")
    mixer.button("Make it the default mix").click()
    served.client.set("finance")
    dialog = mixer.page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text("Somebody else has changed it meanwhile")
    # Who overlooks that has decided on a mix that is the default mix no more.
    mixer.errors_of_status(412)
    mixer.button("Set it").click()
    expect(dialog).to_contain_text("Nothing was changed: somebody else was first.")
    assert weights(served) == {"finance": 1}
    mixer.button("Compare with that").click()
    expect(mixer.page.get_by_role("row", name="finance 1 absent")).to_be_visible()
    mixer.button("Set it").click()
    expect(mixer.fact("Default mix")).to_have_text("math=0.5")


def test_a_mix_is_named_used_and_its_name_taken_away(mixer: Mixer, served: Served) -> None:
    mixer.slider("math").fill("0.5")
    mixer.slider("medicine").fill("0.5")
    mixer.page.get_by_label("Name this mix").fill("qa")
    mixer.button("Name it").click()
    mixer.says("qa now stands for math=0.5,medicine=0.5.")
    assert dict(served.client.named_mixes()[0].weights) == {"math": 0.5, "medicine": 0.5}
    mixer.button("base").click()
    expect(mixer.mix_text).to_have_value("base")
    mixer.button("qa").click()
    expect(mixer.mix_text).to_have_value("math=0.5,medicine=0.5")
    mixer.mix_text.fill("qa=2,math=-0.5")
    mixer.mix_text.press("Enter")
    expect(mixer.mix_text).to_have_value("math=0.5,medicine=1")
    mixer.choose(1, "qa")
    mixer.button("Take the name qa away").click()
    mixer.says("qa stands for nothing any more.")
    assert served.client.named_mixes() == ()
    mixer.begin_to_write(PROMPT, 1)
    expect(mixer.page.get_by_role("article", name="Text 1")).to_contain_text(
        "qa names no mix any more: choose another"
    )
    mixer.says("The texts are written.")
    assert mixer.text(1).text_content() == ""
    assert mixer.text(3).text_content() != ""
    mixer.errors_of_status(400)
    mixer.page.get_by_label("Name this mix").fill("No Name")
    mixer.button("Name it").click()
    alert = mixer.page.locator("#mix").get_by_role("alert")
    expect(alert).to_contain_text("'No Name' is not a valid name")


def test_everything_is_done_with_keys_alone(mixer: Mixer, served: Served) -> None:
    keys = mixer.page.keyboard
    mixer.tab_to(mixer.slider("math"))
    for _ in range(3):
        keys.press("ArrowRight")
    expect(mixer.weight("math")).to_have_value("0.15")
    mixer.tab_to(mixer.button("Make it the default mix"))
    keys.press("Enter")
    expect(mixer.page.get_by_role("dialog")).to_be_visible()
    keys.press("Escape")
    expect(mixer.page.get_by_role("dialog")).to_have_count(0)
    assert weights(served) == {}
    mixer.tab_to(mixer.button("Make it the default mix"))
    keys.press("Enter")
    mixer.tab_to(mixer.button("Set it"))
    keys.press("Enter")
    expect(mixer.fact("Default mix")).to_have_text("math=0.15")
    mixer.tab_to(mixer.prompt)
    keys.type("2 + 2 =")
    keys.press("Control+Enter")
    mixer.says("The texts are written.")
    assert mixer.text(3).text_content() == mixer.text(2).text_content() != ""


@pytest.mark.parametrize("mixer", [PHONE], indirect=True)
def test_a_phone_shows_it_without_sideways_scrolling(mixer: Mixer) -> None:
    mixer.slider("medicine").fill("1.25")
    mixer.write(PROMPT + " " + 100 * "long", tokens=8)
    mixer.page.get_by_text("Copy as a command or program").click()
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert mixer.page.evaluate(sideways) == 0
    mixer.button("Make it the default mix").click()
    assert mixer.page.evaluate(sideways) == 0


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def test_what_others_write_stays_text(mixer: Mixer, served: Served) -> None:
    """From everywhere that a text may come: prompt, model, names, errors."""
    page = mixer.page

    def hostile_lists(route: Any) -> None:
        answer = route.fetch()
        lists = answer.json()
        for each in lists.get("adapters", []):
            each["domain"] += HOSTILE
        lists.get("named_mixes", []).append(
            {"name": HOSTILE, "entries": [{"domain": HOSTILE, "weight": 2.0}]}
        )
        route.fulfill(response=answer, json=lists)

    written = HOSTILE + " <b>bold</b>"
    event = json.dumps({"choices": [{"text": written, "finish_reason": "stop"}]})
    page.route("**/v1/adapters", hostile_lists)
    page.route("**/v1/mix/names", hostile_lists)
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {event}\n\ndata: [DONE]\n\n"
        ),
    )
    mixer.open()
    mixer.button(HOSTILE).click()
    mixer.write(HOSTILE)
    assert mixer.text(1).text_content() == written
    expect(page.get_by_label("math" + HOSTILE, exact=True)).to_be_visible()
    page.get_by_text("Copy as a command or program").click()
    assert HOSTILE in (page.locator("pre").text_content() or "")
    mixer.button("Make it the default mix").click()
    assert page.locator("img, b:text('bold'), body script").count() == 0
    mixer.errors_of_status(400)
    mixer.button("Set it").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("<img")
    assert page.locator("img").count() == 0


def test_a_merged_adapter_says_what_it_was_merged_from(mixer: Mixer, served: Served) -> None:
    merged = served.client.merge("blend", "math=1,finance=-0.5", method="svd", options={"rank": 2})
    try:
        mixer.open()
        made = merged.adapter.provenance
        assert made is not None
        mix = ",".join(f"{part.domain}={part.weight:g}" for part in made.parts)
        row = mixer.page.locator(".sliders li", has_text="blend")
        expect(row.locator(".merged")).to_have_text(f"svd rank=2 of {mix}")
        expect(mixer.page.locator(".sliders .merged")).to_have_count(1)
    finally:
        served.client.delete("blend")
