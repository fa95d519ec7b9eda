"""`make pictures`: takes the pictures in docs/ of the mixer, as it is, on a real base.

Fonts are the machine's: with Roboto (Debian's `fonts-roboto-unhinted`) they look as published.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.serverprocess import ServerProcess
from playwright.sync_api import Locator, Page, expect, sync_playwright
from tests.browser.mixer import Mixer

from superpose_adapters.bundled import BUNDLES, Bundle
from superpose_adapters.qa import read_rows
from superpose_client import Client

PROMPT = "Question: What are the treatments for stress ?\nAnswer:"
# Of the curve: held-out rows of each of two domains, and tokens of each row.
ROWS, TOKENS = 3, 48
SLOWEST = 600_000  # ms that a picture may take to come about on a machine that does other work too
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 1.5, "has_touch": True}
SCENES: dict[str, dict[str, Any]] = {
    "light": {**DESKTOP, "color_scheme": "light"},
    "dark": {**DESKTOP, "color_scheme": "dark"},
    "phone": {**PHONE, "color_scheme": "light"},
}


def show_texts(mixer: Mixer) -> None:
    """Write three texts under mixes of two domains."""
    mixer.mix_text.fill("medicine=0.5,finance=0.5")
    mixer.mix_text.press("Enter")
    mixer.choose(1, "finance")
    for _ in range(2):  # The first texts share the cores with a browser that still starts.
        mixer.write(PROMPT, tokens=48)


def show_sections(mixer: Mixer, bundle: Bundle) -> None:
    """Open interference, and a curve over a weight on held-out rows of two domains."""
    page = mixer.page
    interference = page.locator("#interference")
    interference.locator("summary").first.click()
    expect(interference.get_by_role("table").first).to_be_visible(timeout=SLOWEST)
    page.locator("#curve summary").first.click()
    rows = [
        row
        for domain in ("medicine", "finance")
        for row in islice(read_rows(bundle.held_out(domain)), ROWS)
    ]
    lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in rows]
    curve = page.locator("#curve")
    curve.get_by_label("Measured on").fill("\n".join(lines))
    curve.get_by_label("Tokens kept of a row").fill(str(TOKENS))
    curve.get_by_label("Over the weight of").select_option("medicine")
    mixer.button("Draw the curve").click()
    expect(curve.get_by_role("slider")).to_be_visible(timeout=SLOWEST)


def take(target: Page | Locator, picture: Path) -> None:
    """Take a picture once what was said on the page is gone."""
    page = target if isinstance(target, Page) else target.page
    page.locator(".said").wait_for(state="hidden")
    page.mouse.move(0, 0)
    target.screenshot(path=picture, **({"full_page": True} if target is page else {}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.pictures", description=__doc__)
    parser.add_argument("--base", choices=BUNDLES, default="smollm2", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/mixer"), help="default %(default)s")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    bundle = BUNDLES[args.base]
    server = ServerProcess(Path(bundle.name), None, ["--http-listen=127.0.0.1:0"])
    try:
        with Client(server.address) as client:
            client.set("medicine")
            client.name_mix("both", "medicine=0.5,finance=0.5")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            for name, scene in SCENES.items():
                context = browser.new_context(**scene)
                mixer = Mixer(context.new_page(), f"http://{server.http_address}/")
                mixer.open()
                show_texts(mixer)
                take(mixer.page, args.out / f"{name}.png")
                if name == "light":
                    show_sections(mixer, bundle)
                    for section in ("interference", "curve"):
                        take(mixer.page.locator(f"#{section}"), args.out / f"{section}.png")
                context.close()
            browser.close()
    finally:
        server.close()


if __name__ == "__main__":
    main()
