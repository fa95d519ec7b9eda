"""The page as a person uses it: what is on it, by the names that it is called."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Locator, Page, expect
from tests.integration.harness import PATIENCE

expect.set_options(timeout=PATIENCE * 1000)


class Mixer:
    """An open page.

    Attributes:
        page: Playwright's.
        url: Of the server, with a slash.
        errors: What was written to the console as an error or warning, or thrown, or alerted.
        requested: The URL of every request so far.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.requested: list[str] = []
        self._refusal = ""
        page.set_default_timeout(PATIENCE * 1000)
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        page.on("console", lambda message: self._hear(message.type, message.text))

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not (self._refusal and self._refusal in text):
            self.errors.append(text)

    def errors_of_status(self, status: int) -> None:
        """Expect refusals of this status from now on, which browsers write to the console."""
        self._refusal = f"the server responded with a status of {status}"

    def open(self) -> None:
        """Load the page and wait until it has heard of the server."""
        self.page.goto(self.url)
        expect(self.page.get_by_text("ready", exact=True)).to_be_visible()
        expect(self.page.locator(".sliders li").first).to_be_visible()

    def slider(self, domain: str) -> Locator:
        return self.page.get_by_role("slider", name=domain, exact=True)

    def weight(self, domain: str) -> Locator:
        return self.page.get_by_role("textbox", name=f"Weight of {domain}", exact=True)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Prompt", exact=True)

    @property
    def mix_text(self) -> Locator:
        """The mix of the sliders, written out."""
        return self.page.get_by_label("As text")

    def fact(self, name: str) -> Locator:
        """What the live strip says of something."""
        return self.page.locator("dl.live div", has_text=name).locator("dd")

    def says(self, text: str) -> None:
        expect(self.page.locator(".said")).to_contain_text(text)

    def write(self, prompt: str, tokens: int = 12) -> None:
        """Have the texts written, whole."""
        self.begin_to_write(prompt, tokens)
        self.says("The texts are written.")

    def begin_to_write(self, prompt: str, tokens: int) -> None:
        self.prompt.fill(prompt)
        self.page.get_by_label("Max tokens").fill(str(tokens))
        self.page.get_by_role("button", name="Write").click()

    def choose(self, number: int, mix: str) -> None:
        """Pick the mix of a text."""
        self.page.get_by_label(f"Mix of text {number}").select_option(label=mix)

    def text(self, number: int) -> Locator:
        return self.page.get_by_label(f"What text {number} says")

    def tab_to(self, wanted: Locator) -> None:
        """Press Tab until `wanted` has the focus."""
        self._press_until("Tab", lambda: bool(wanted.evaluate("e => e === document.activeElement")))

    def _press_until(self, key: str, done: Callable[[], bool]) -> None:
        for _ in range(100):
            if done():
                return
            self.page.keyboard.press(key)
        raise AssertionError(f"{key} did not get there")
