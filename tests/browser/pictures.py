"""`make pictures`: takes the pictures in docs/ of the mixer, as it is, on a real base.

Fonts are the machine's: with Roboto (Debian's `fonts-roboto-unhinted`) they look as published.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.serverprocess import ServerProcess
from playwright.sync_api import Browser, sync_playwright
from tests.browser.mixer import Mixer

from superpose_client import Client

PROMPT = "Question: What are the treatments for stress ?\nAnswer:"
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "device_scale_factor": 1.5}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
SCENES: dict[str, dict[str, Any]] = {
    "light": {**DESKTOP, "color_scheme": "light"},
    "dark": {**DESKTOP, "color_scheme": "dark"},
    "phone": {**PHONE, "color_scheme": "light", "has_touch": True},
}


def take(browser: Browser, url: str, picture: Path, scene: dict[str, Any]) -> None:
    """Write three texts under mixes of two domains, and take the whole page."""
    context = browser.new_context(**scene)
    mixer = Mixer(context.new_page(), url)
    mixer.open()
    mixer.mix_text.fill("medicine=0.5,finance=0.5")
    mixer.mix_text.press("Enter")
    mixer.choose(1, "finance")
    mixer.write(PROMPT, tokens=48)
    mixer.page.locator(".said").wait_for(state="hidden")
    mixer.page.screenshot(path=picture, full_page=True)
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.pictures", description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("smollm2"), help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/mixer"), help="default %(default)s")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    server = ServerProcess(args.base, None, ["--http-listen=127.0.0.1:0"])
    try:
        with Client(server.address) as client:
            client.set("medicine")
            client.name_mix("both", "medicine=0.5,finance=0.5")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            for name, scene in SCENES.items():
                take(browser, f"http://{server.http_address}/", args.out / f"{name}.png", scene)
            browser.close()
    finally:
        server.close()


if __name__ == "__main__":
    main()
