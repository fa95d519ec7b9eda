"""What axe-core finds: names, roles, contrast, order; in both schemes and on a phone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.browser.mixer import Mixer

AXE = Path(sys.prefix) / "node_modules/axe-core/axe.min.js"
# The page's own policy keeps axe out.
SCHEMES = [
    {"color_scheme": "light", "bypass_csp": True},
    {"color_scheme": "dark", "bypass_csp": True},
    {"viewport": {"width": 360, "height": 740}, "bypass_csp": True},
]


@pytest.mark.parametrize("mixer", SCHEMES, indirect=True)
def test_axe_finds_nothing(mixer: Mixer) -> None:
    mixer.slider("medicine").fill("1.5")
    mixer.page.get_by_label("Name this mix").fill("qa")
    mixer.button("Name it").click()
    mixer.write("Question: What is glaucoma ?\nAnswer:")
    mixer.page.get_by_text("Copy as a command or program").click()
    mixer.page.add_script_tag(path=AXE)
    assert violations(mixer) == []
    mixer.button("Make it the default mix").click()
    expect(mixer.page.get_by_role("dialog")).to_be_visible()
    assert violations(mixer) == []


@pytest.mark.parametrize("mixer", SCHEMES, indirect=True)
def test_axe_finds_nothing_in_sections(mixer: Mixer) -> None:
    mixer.slider("medicine").fill("1.5")
    mixer.slider("math").fill("-0.5")
    for section in mixer.page.locator(".foldout > summary").all():
        section.click()
    expect(mixer.page.locator(".heat").first).to_be_visible()
    mixer.page.locator("#curve").get_by_label("Measured on").fill("a b c\nd e f")
    mixer.button("Draw the curve").click()
    expect(mixer.page.locator(".chart")).to_be_visible()
    mixer.page.locator("#fit").get_by_label("Mixes to try").fill("1")
    mixer.button("Fit the weights").click()
    expect(mixer.button("Take these weights")).to_be_visible()
    mixer.page.add_script_tag(path=AXE)
    assert violations(mixer) == []


def violations(mixer: Mixer) -> list[str]:
    found = mixer.page.evaluate("axe.run().then(result => result.violations)")
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]
