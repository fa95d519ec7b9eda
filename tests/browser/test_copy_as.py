"""What the page offers to copy runs as it is, and asks for what the page asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.browser.mixer import Mixer
from tests.integration.harness import PATIENCE, Served

# Everything that a shell, JSON or Python might take for something else.
PROMPT = 'Question: it\'s "5 $HOME `x` \\n" & ä\u2028 ?\nAnswer:'
TEMPLATE = "{% for each in messages %}<{{ each['role'] }}>{{ each['content'] }}{% endfor %}"
MIX = "medicine=1.25,math=-0.1"


def printed(way: str, written: str, folder: Path) -> str:
    """Run what was copied, in a shell or by Python, and return what it prints."""
    if way in ("adapterctl", "curl"):
        command = ["bash", "-c", written]
    else:
        program = folder / "copied.py"
        program.write_text(written)
        command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(mixer: Mixer, way: str) -> str:
    mixer.page.get_by_text("Copy as a command or program").click()
    mixer.button(way).click()
    mixer.button("Copy").click()
    mixer.says(f"Copied, for {way}.")
    text = mixer.page.evaluate("navigator.clipboard.readText()")
    assert text == mixer.page.get_by_label(f"The request, for {way}").text_content()
    return str(text)


CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}


@pytest.mark.parametrize("mixer", [CLIPBOARD], indirect=True)
@pytest.mark.parametrize("way", ["adapterctl", "curl", "Python client", "OpenAI client"])
def test_it_runs_and_makes_the_text_of_the_page(
    mixer: Mixer, served: Served, way: str, tmp_path: Path
) -> None:
    mixer.mix_text.fill(MIX)
    mixer.mix_text.press("Enter")
    mixer.page.get_by_label("Temperature").fill("0.7")
    mixer.write(PROMPT)
    written = copied(mixer, way)
    text = printed(way, written, tmp_path)
    if way == "curl":
        text = json.loads(text)["choices"][0]["text"]
    shown = mixer.text(3).text_content()
    assert shown
    assert text.rstrip("\n") == shown.rstrip("\n")


@pytest.mark.parametrize("mixer", [CLIPBOARD], indirect=True)
@pytest.mark.parametrize("way", ["adapterctl", "curl", "Python client", "OpenAI client"])
def test_so_does_a_conversation_on_a_base_that_takes_them(
    mixer: Mixer, served: Served, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = mixer.page.get_by_role("switch", name="As a conversation")
    expect(switch).to_have_count(0)
    monkeypatch.setattr(served.runtime.tokenizer.inner, "chat_template", TEMPLATE)
    mixer.open()
    switch.check()
    said = PROMPT.replace("\n", " ")
    mixer.write(said)
    answer = served.client.generate(
        [{"role": "user", "content": said}], mix="base", temperature=0, max_new_tokens=12
    )
    assert mixer.text(3).text_content() == answer.text
    written = copied(mixer, way)
    text = printed(way, written, tmp_path)
    if way == "curl":
        text = json.loads(text)["choices"][0]["message"]["content"]
    assert text.strip() == answer.text.strip()


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("adapterctl", "adapterctl generate --server there:1 --tls --mix base "),
        ("Python client", 'Client("there:1", tls=True, token=os.environ["SUPERPOSE_TOKEN"])'),
    ],
)
def test_a_server_that_encrypts_is_asked_so_at_its_other_door(
    mixer: Mixer, way: str, options: str
) -> None:
    program = """async way => {
        const { WAYS } = await import("./mixer/copy_as.js");
        const prompt = { text: "a", chat: false, maxTokens: 1, temperature: 0, seed: 1 };
        const site = new URL("https://there/");
        return WAYS.get(way)({ prompt, mix: new Map(), site, grpc: "there:1", token: true });
    }"""
    assert options in mixer.page.evaluate(program, way)
    assert "tls" not in mixer.page.evaluate(program.replace("https:", "http:"), way)
