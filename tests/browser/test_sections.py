"""Interference, curve and fit on the page: the server's own figures, and what is done with them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, expect
from tests.browser.mixer import Mixer
from tests.integration.harness import Served, wait_until

from superpose_client import QueueFullError, ScoreText
from superpose_client.score_file import ScoreFileError, read_texts

ROWS = [
    ("What is glaucoma ?", "A group of diseases that damage the optic nerve ."),
    ("What is 2 + 3 ?", "the sum is 2 + 3 = 5 answer is 5"),
    ("What is a bond ?", "A loan that an investor makes to a company ."),
    ("Why do prices rise ?", "Because more is asked for than is made ."),
]
JSONL = "\n".join(json.dumps({"question": q, "answer": a}) for q, a in ROWS)


def opened(mixer: Mixer, name: str) -> Locator:
    section = mixer.page.locator(f"#{name}")
    section.locator("summary").first.click()
    return section


def asked(mixer: Mixer, path: str) -> int:
    return sum(url == mixer.url + path for url in mixer.requested)


def cells(table: Locator) -> dict[str, list[str]]:
    """Return what stands in a table, {head of the row: its cells}."""
    return {
        row.get_by_role("rowheader").inner_text(): row.get_by_role("cell").all_inner_texts()
        for row in table.locator("tbody tr").all()
    }


def test_a_curve_is_what_one_score_of_many_mixes_says(mixer: Mixer, served: Served) -> None:
    mixer.weight("medicine").fill("0.5")
    curve = opened(mixer, "curve")
    curve.get_by_label("Measured on").fill(JSONL)
    curve.get_by_label("Over the weight of").select_option("math")
    mixer.button("Draw the curve").click()
    chart = curve.get_by_role("slider", name="Perplexity over the weight of math")
    expect(chart).to_be_visible()
    assert asked(mixer, "v1/score") == 1

    weights = [-1 + place / 8 for place in range(25)]
    mixes = [{"math": weight, "medicine": 0.5} for weight in weights]
    others = [{}, {"math": 1.0}, {"medicine": 1.0}, {"finance": 1.0}]
    expected = [block.perplexity for block in served.client.score(ROWS, mixes=mixes + others).mixes]
    best = weights[min(range(25), key=expected.__getitem__)]
    curve.get_by_text("As a table").click()
    shown = cells(curve.get_by_role("table"))
    names = [f"{weight:g}" + (" (best)" if weight == best else "") for weight in weights]
    names += ["base", "math alone", "medicine alone", "finance alone"]
    assert set(shown) == set(names)
    for name, perplexity in zip(names, expected, strict=True):
        assert float(shown[name][0].replace(",", "")) == pytest.approx(perplexity, rel=1e-3)

    expect(chart).to_have_attribute("aria-valuenow", f"{best:g}")
    chart.press("Home")
    expect(chart).to_have_attribute("aria-valuenow", "-1")
    chart.press("ArrowRight")
    expect(curve.locator(".reading")).to_contain_text(
        f"math -0.875: perplexity {shown['-0.875'][0]}"
    )
    expect(curve.get_by_text("slider 0", exact=True)).to_be_visible()
    mixer.button(f"Take the best weight, {best:g}").click()
    expect(mixer.weight("math")).to_have_value(f"{best:g}")
    expect(curve.get_by_text(f"slider {best:g}", exact=True)).to_be_visible()
    mixer.weight("medicine").fill("0.6")
    expect(curve).to_contain_text("The other sliders have moved since")
    assert served.client.mix().weights == {}


def test_a_fit_is_followed_and_applied_and_sets_nothing(
    mixer: Mixer, served: Served, tmp_path: Path
) -> None:
    files = [tmp_path / "one.jsonl", tmp_path / "two.txt"]
    files[0].write_text(JSONL)
    files[1].write_text("The sum of two deltas is a delta .\n\nA share is a part of a company .\n")
    fit = opened(mixer, "fit")
    fit.get_by_label("Choose files").set_input_files(files)
    expect(fit.locator(".sources")).to_contain_text("one.jsonl 4 rows")
    fit.get_by_label("finance", exact=True).uncheck()
    fit.get_by_label("Mixes to try").fill("9")
    fit.get_by_label("Tokens kept of a row").fill("24")
    mixer.button("Fit the weights").click()
    take = mixer.button("Take these weights")
    expect(take).to_be_visible()

    texts: list[ScoreText] = [*ROWS, *filter(None, files[1].read_text().splitlines())]
    sources = [0, 0, 0, 0, 1, 1]
    *_, last = served.client.fit(
        texts, ["math", "medicine"], budget=9, max_length=24, sources=sources
    )
    assert last.result is not None
    losses = cells(fit.get_by_role("region", name="Losses").get_by_role("table"))
    found = {weight.domain: weight.weight for weight in last.result.weights if weight.weight}
    assert {"math=1, medicine=1", "math=1", "medicine=1", "base"} <= set(losses)
    for candidate, row in zip(last.result.candidates, losses.values(), strict=True):
        assert float(row[0]) == pytest.approx(candidate.fitted_loss, abs=2e-3)
        held_out, *_ = row[1].split()
        assert float(held_out) == pytest.approx(candidate.held_out_loss.value, abs=2e-3)
    apart = fit.get_by_role("region", name="Held out, by source").get_by_role("columnheader")
    assert apart.all_inner_texts() == ["mix", "one.jsonl", "two.txt"]
    expect(fit.get_by_label("Warnings")).to_contain_text("tells little of other rows")

    take.click()
    for domain in ("math", "medicine", "finance"):
        expect(mixer.weight(domain)).to_have_value(f"{found.get(domain, 0):g}")
    assert served.client.mix().weights == {}


def test_a_fit_that_is_stopped_leaves_nothing_running(mixer: Mixer, served: Served) -> None:
    fit = opened(mixer, "fit")
    fit.get_by_label("Measured on").fill(JSONL)
    fit.get_by_label("Mixes to try").fill("512")
    fit.get_by_label("Penalty of a unit").fill("0")
    mixer.button("Fit the weights").click()
    expect(fit.get_by_text("best so far")).to_be_visible()
    mixer.button("Stop").last.click()
    expect(mixer.button("Fit the weights")).to_be_enabled()
    expect(fit.get_by_role("progressbar")).to_have_count(0)

    def another() -> bool:
        try:
            return len(list(served.client.fit(ROWS, ["math"], budget=1, max_length=8))) > 0
        except QueueFullError:
            return False

    wait_until(another, "the fit that nobody follows has ended")


def test_a_perplexity_beyond_numbers_is_no_point_of_a_curve(mixer: Mixer) -> None:
    def overflow(route: Any) -> None:
        answer = route.fetch()
        scores = answer.json()
        scores["mixes"][2]["perplexity"] = None
        route.fulfill(response=answer, json=scores)

    mixer.page.route("**/v1/score", overflow)
    curve = opened(mixer, "curve")
    curve.get_by_label("Measured on").fill("a b c")
    curve.get_by_label("Over the weight of").select_option("math")
    mixer.button("Draw the curve").click()
    expect(curve.get_by_role("alert")).to_contain_text("the perplexity under math=-0.75 is larger")
    expect(curve.get_by_role("slider")).to_have_count(0)


def test_many_domains_and_layers_stay_in_reach(mixer: Mixer) -> None:
    """Two dozen domains on four dozen layers, of which a server tells."""
    names = [f"d{number}" for number in range(24)]
    types = ["mlp.down", "mlp.up", "self_attn.o", "self_attn.q"]
    modules = [f"model.layers.{layer}.{kind}" for layer in range(48) for kind in types]
    pair = {
        "cosine_rms": 0.1,
        "random_floor": 0.01,
        "module_types": [{"module_type": kind, "cosine_rms": 0.1} for kind in types],
        "modules": [{"module": module, "cosine": -0.1} for module in modules],
    }
    size = {"weight": 1, "delta_norm": 1.0, "relative_norm": None}  # of a base that is 0 there
    analysis = {
        "domains": [{"domain": name, **size} for name in names],
        "pairs": [{"first": a, "second": b, **pair} for a, b in combinations(names, 2)],
        "warnings": [],
        "interference_ratio": 0.0,
        "fold_error": None,
        "folded": True,
    }

    def many(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={"adapters": [{"domain": name} for name in names]})

    page = mixer.page
    page.route("**/v1/adapters", many)
    page.route("**/v1/mix/analyze", lambda route: route.fulfill(json=analysis))
    mixer.open()
    mixer.mix_text.fill("d3,d5")
    mixer.mix_text.press("Enter")
    section = opened(mixer, "interference")
    heat = section.get_by_role("region", name="Cosines between deltas, by module type")
    expect(heat.locator("tbody tr")).to_have_count(276)
    assert heat.evaluate("e => e.clientHeight") < 600
    mixer.button("d22, d23").click()
    expect(section.get_by_role("region", name="d22, d23, layer by layer")).to_be_visible()
    heat.scroll_into_view_if_needed()
    expect(heat.get_by_role("columnheader", name="pair")).to_be_in_viewport()
    fit = opened(mixer, "fit")
    expect(fit.get_by_role("checkbox")).to_have_count(24)
    expect(fit.get_by_role("checkbox", checked=True)).to_have_count(2)


def test_interference_is_that_of_analyze_and_only_asked_for_when_it_is_seen(
    mixer: Mixer, served: Served
) -> None:
    mixer.mix_text.fill("math=1,medicine=0.5")
    mixer.mix_text.press("Enter")
    section = opened(mixer, "interference")
    heat = section.get_by_role("region", name="Cosines between deltas, by module type")
    expect(heat).to_be_visible()
    (pair,) = served.client.analyze({"math": 1, "medicine": 0.5}).pairs
    types = [f"{each.cosine_rms:.3f}" for each in pair.module_types]
    rest = [f"{pair.cosine_rms:.3f}", f"{pair.random_floor:.3f}"]
    assert cells(heat)["math, medicine"] == types + rest
    layers = cells(section.get_by_role("region", name="math, medicine, layer by layer"))
    modules = {each.module: f"{each.cosine:.3f}" for each in pair.modules}
    assert layers["attn.c_attn"] == [modules[f"transformer.h.{i}.attn.c_attn"] for i in range(4)]
    expect(section.locator(".sizes tbody tr")).to_have_count(2)

    before = asked(mixer, "v1/mix/analyze")
    mixer.slider("finance").press("ArrowRight")
    mixer.slider("finance").press("ArrowRight")
    expect(heat.locator("tbody tr")).to_have_count(3)
    assert asked(mixer, "v1/mix/analyze") == before + 1
    mixer.mix_text.fill("base")
    mixer.mix_text.press("Enter")
    expect(section).to_contain_text("there is no delta in the base")
    section.locator("summary").first.click()
    mixer.slider("finance").press("ArrowRight")
    opened(mixer, "curve")  # which asks for nothing by itself
    for _ in range(2):  # Longer than it would wait.
        with mixer.page.expect_response("**/v1/server"):
            pass
    assert asked(mixer, "v1/mix/analyze") == before + 1
    assert asked(mixer, "v1/score") == 0


XSS = "<img src=x onerror=alert(1)>"


def test_rows_that_cannot_be_read_are_named_and_stay_text(mixer: Mixer, tmp_path: Path) -> None:
    bad = {
        "table.csv": (b"question,answer\na,b\n", "tables are not read"),
        "latin.txt": (b"Stra\xdfe", "not a text in UTF-8"),
        "empty.jsonl": (b"\n\n", "holds no text"),
        "broken.jsonl": (
            b'{"question": "a", "answer": "b"}\n{"question": "a"',
            "line 2 is not JSON",
        ),
        "plain.jsonl": (b"1\n2\n", 'needs the texts "question" and "ans'),
        "nan.jsonl": (b'{"question": NaN, "answer": "b"}', "line 1 is not JSON"),
        "numbers.jsonl": (b'{"question": 1, "answer": "b"}', 'needs the texts "question" and "ans'),
        f"{XSS}.jsonl".replace("/", ""): (b"[]", "holds no text"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    curve = opened(mixer, "curve")
    curve.get_by_label("Choose files").set_input_files([tmp_path / name for name in bad])
    expect(curve.get_by_role("alert")).to_have_count(len(bad))
    for line, (name, (_, words)) in zip(
        curve.get_by_role("alert").all_inner_texts(), bad.items(), strict=True
    ):
        assert line.startswith(name)
        assert words in line
    expect(mixer.button("Draw the curve")).to_be_disabled()
    curve.get_by_label("Measured on").fill(f'{XSS}\n{{"text": "a"}}')
    expect(curve.get_by_role("alert").first).to_contain_text("line 2 is a row among texts")
    curve.get_by_label("Measured on").fill(f"{XSS}\n{XSS} and more")
    mixer.button("Draw the curve").click()
    expect(curve.get_by_role("slider")).to_be_visible()
    mixer.errors_of_status(400)
    curve.get_by_label("Measured on").fill("a" * 9)
    curve.get_by_label("Tokens kept of a row").fill("100000")
    mixer.button("Draw the curve").click()
    expect(curve.get_by_role("alert").last).to_contain_text("max_length is 100000")


CONTENTS = [
    *(
        "",
        "\n \n",
        "one",
        " one\r\n\r\ntwo ",
        "\ufeffone",
        "[1] is a reference",
        "[] and text",
        "1",
    ),
    *(JSONL, JSONL.replace("\n", "\r\n\r\n"), f"[{JSONL.replace(chr(10), ',')}]", "[\n]"),
    *('{"text": "a", "more": 1}\n', '{"text": "a"}\nb', 'a\n{"text": "b"}', "a\n{b", "[[1]]"),
    *('{"question": 1, "answer": "a"}', '{"question": NaN, "answer": "a"}', '{"text": null}', "{"),
]


def test_rows_are_read_as_adapterctl_reads_them(mixer: Mixer, tmp_path: Path) -> None:
    program = """async content => {
        const { readRows } = await import("./mixer/rows.js");
        try {
            return readRows(content).map(row =>
                row.text ?? [row.question_answer.question, row.question_answer.answer]);
        } catch {
            return null;
        }
    }"""
    for content in CONTENTS:
        (tmp_path / "rows").write_bytes(content.encode())
        expected: list[str | tuple[str, str]] | None
        try:
            expected = [each.text for each in read_texts(str(tmp_path / "rows"))]
        except ScoreFileError as error:
            expected = [] if "holds no text" in str(error) else None
        found = mixer.page.evaluate(program, content)
        assert found == json.loads(json.dumps(expected)), content
