"""The real `adapterctl` against a real server of the bundled base: every command once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import LoopThread, Served, start
from typer.testing import CliRunner, Result

from superpose_adapters.bundled import DOMAINS, MINI
from superpose_client.cli import app

SENTENCE = "Two and two are four."
PROMPT = "Question: What is glaucoma ?\nAnswer:"
STATE = {"generation", "digest", "entries"}


@pytest.fixture(scope="module")
def mini(loop: LoopThread, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start(loop, "mini", tmp_path_factory.mktemp("mini") / "state")
    yield served
    served.stop()


@pytest.fixture(autouse=True)
def base_mix(mini: Served) -> None:
    mini.client.set("base")


def adapterctl(served: Served, *arguments: str, stdin: str | None = None) -> Result:
    environment = {"SUPERPOSE_SERVER": served.address}
    return CliRunner().invoke(app, arguments, input=stdin, env=environment)


def output(served: Served, *arguments: str, stdin: str | None = None) -> Any:
    """Run a command with --json and return the one object that it prints."""
    result = adapterctl(served, *arguments, "--json", stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def weights(state: Any) -> dict[str, float]:
    return {entry["domain"]: entry["weight"] for entry in state["entries"]}


def test_fit(mini: Served, tmp_path: Path) -> None:
    rows = [MINI.held_out(domain).read_text().splitlines()[:8] for domain in DOMAINS]
    files = [tmp_path / f"{domain}.jsonl" for domain in DOMAINS]
    for file, lines in zip(files, rows, strict=True):
        file.write_text("\n".join(lines))
    domains = ",".join(DOMAINS)
    flags = ("--domains", domains, "--max-length", "32", "--budget", "14", "--set")
    result = adapterctl(mini, "fit", *map(str, files), *flags, "--json")
    assert result.exit_code == 0, result.stderr
    fitted, state = map(json.loads, result.stdout.splitlines())
    found = {each["domain"]: each["weight"] for each in fitted["weights"]}
    assert weights(state) == {name: weight for name, weight in found.items() if weight}
    assert mini.client.mix().weights == weights(state)
    assert fitted["evaluations"] <= 14
    candidates = [(weights(c["mix"]), c) for c in fitted["candidates"]]
    _, best = candidates[0]
    others = {tuple(sorted(mix.items())): c for mix, c in candidates[1:]}
    # Three whole deltas interfere, and one alone helps one domain's rows.
    assert best["fitted_loss"] < min(c["fitted_loss"] for c in others.values())
    assert others[tuple((name, 1) for name in sorted(DOMAINS))]["excess"]["low"] > 0
    half = others[tuple((name, 0.5) for name in sorted(DOMAINS))]
    assert best["held_out_loss"]["value"] <= half["held_out_loss"]["value"]


def test_status(mini: Served) -> None:
    status = output(mini, "status")
    assert status["base"] == "mini"
    assert status["base_digest"] == mini.client.info().base_digest
    assert (status["dtype"], status["device"], status["adapters"]) == ("float32", "cpu", 3)
    assert (status["running"], status["waiting"], status["weights_intact"]) == (0, 0, True)
    assert status["limits"]["max_queue"] == 256
    assert set(status["mix"]) == STATE


def test_list_and_show(mini: Served) -> None:
    listed = output(mini, "list")["adapters"]
    assert [adapter["domain"] for adapter in listed] == sorted(DOMAINS)
    assert {adapter["source"] for adapter in listed} == {"ADAPTER_SOURCE_BUNDLED"}
    shown = output(mini, "show", "math")
    assert shown["digest"] == next(a["digest"] for a in listed if a["domain"] == "math")
    assert len(shown["modules"]) > 0
    assert json.loads(shown["config_json"])["r"] == shown["rank"]


def test_push_add_and_delete(mini: Served) -> None:
    folder = str(MINI.adapters()["math"])
    pushed = output(mini, "push", "sums", folder)
    assert pushed["adapter"]["source"] == "ADAPTER_SOURCE_PUSHED"
    assert pushed["adapter"]["digest"] == output(mini, "show", "math")["digest"]
    other = str(MINI.adapters()["medicine"])
    refused = adapterctl(mini, "push", "sums", other)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("adapterctl: sums names another adapter")
    assert output(mini, "push", "sums", other, "--replace")["generation"] == pushed["generation"]
    assert output(mini, "delete", "sums") == {}
    gone = adapterctl(mini, "show", "sums")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("adapterctl: no adapter is loaded as 'sums'")


def test_merge_and_show(mini: Served) -> None:
    arguments = ("merge", "both", "math=1,medicine=0.5", "--method=svd", "--option=rank=4")
    merged = output(mini, *arguments)
    assert merged["adapter"]["rank"] == 4
    assert 0 < merged["deviation"] < 1
    assert output(mini, "show", "both") == merged["adapter"]
    made = merged["adapter"]["provenance"]
    assert (made["method"], made["options"]) == ("svd", {"rank": 4})
    assert {part["domain"]: part["weight"] for part in made["parts"]} == {
        "math": 1.0,
        "medicine": 0.5,
    }
    refused = adapterctl(mini, "merge", "none", "math", "--method=magic")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("adapterctl: no method is called 'magic': use sum, ")
    assert output(mini, "delete", "both") == {}


def test_add_set_mix_and_remove(mini: Served) -> None:
    generation = output(mini, "mix")["generation"]
    added = output(mini, "add", "math")
    assert set(added) == STATE
    assert weights(added) == {"math": 1.0}
    assert weights(output(mini, "add", "finance", "--weight", "-0.5")) == {
        "math": 1.0,
        "finance": -0.5,
    }
    assert weights(output(mini, "remove", "math")) == {"finance": -0.5}
    state = output(mini, "set", "math,medicine=0.5")
    assert weights(state) == {"math": 1.0, "medicine": 0.5}
    assert state["generation"] == generation + 4
    shown = output(mini, "mix")
    assert {name: shown[name] for name in STATE} == state
    assert shown["resident"] == state
    late = adapterctl(mini, "set", "base", "--expected-generation", str(generation))
    assert late.exit_code == 1
    assert late.stderr.startswith(f"adapterctl: generation {generation} was expected, but")
    assert weights(output(mini, "set", "base")) == {}


def test_name_names_and_unname(mini: Served) -> None:
    assert output(mini, "name", "qa", "math=1;medicine=0.5")["name"] == "qa"
    assert output(mini, "names")["named_mixes"] == [
        {
            "name": "qa",
            "entries": [
                {"domain": "math", "weight": 1.0},
                {"domain": "medicine", "weight": 0.5},
            ],
        }
    ]
    asked = ("generate", "Question:", "--max-new-tokens", "2", "--mix")
    assert weights(output(mini, *asked, "qa")["mix"]) == {"math": 1.0, "medicine": 0.5}
    assert weights(output(mini, *asked, "qa=2,finance")["mix"]) == {
        "math": 2.0,
        "medicine": 1.0,
        "finance": 1.0,
    }
    assert weights(output(mini, "set", "qa")) == {"math": 1.0, "medicine": 0.5}
    assert output(mini, *asked, "default")["mix"] == {
        name: output(mini, "mix")[name] for name in STATE
    }
    assert output(mini, "unname", "qa") == {}
    gone = adapterctl(mini, *asked, "qa")
    assert gone.exit_code == 1
    assert "no adapter is loaded as 'qa'" in gone.stderr


def test_analyze_and_verify(mini: Served) -> None:
    analysis = output(mini, "analyze", "math,medicine=0.5")
    assert {d["domain"]: d["weight"] for d in analysis["domains"]} == {"math": 1, "medicine": 0.5}
    assert len(analysis["pairs"]) == 1
    assert 0 < analysis["pairs"][0]["random_floor"] < 1
    assert -1 <= analysis["interference_ratio"] <= 1
    assert analysis["folded"] is True
    verified = output(mini, "verify")
    assert verified["ok"] is True
    assert verified["mix"] == {name: output(mini, "mix")[name] for name in STATE}
    assert len(verified["resident_hash"]) == 64


def test_generate(mini: Served) -> None:
    asked = ("generate", "Question: What is 2 + 3?\nAnswer:", "--max-new-tokens", "8")
    whole = output(mini, *asked, "--mix", "math=1,medicine=0.5", "--ignore-eos")
    assert set(whole) == {
        *("text", "token_ids", "finish_reason", "usage", "mix", "request_id"),
        *("logprobs", "top_logprobs"),
    }
    assert whole["usage"]["completion_tokens"] == len(whole["token_ids"]) == 8
    assert whole["finish_reason"] == "FINISH_REASON_LENGTH"
    assert weights(whole["mix"]) == {"math": 1.0, "medicine": 0.5}
    streamed = adapterctl(
        mini, *asked, "--mix", "math=1,medicine=0.5", "--ignore-eos", "--stream", "--json"
    )
    chunks = [json.loads(line) for line in streamed.stdout.splitlines()]
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    plain = adapterctl(mini, *asked, "--mix", "math=1,medicine=0.5", "--ignore-eos")
    assert plain.stdout == whole["text"] + "\n"


def test_compare_makes_the_texts_of_each_mix_alone(mini: Served) -> None:
    mixes = ("base", "medicine", "math=1,medicine=0.5")
    drawn = ("--temperature", "0.8", "--seed", "11", "--max-new-tokens", "8", "--ignore-eos")
    asked = [argument for mix in mixes for argument in ("--mix", mix)]
    compared = output(mini, "compare", PROMPT, *asked, *drawn)
    assert compared["seed"] == 11
    for mix, made in zip(mixes, compared["texts"], strict=True):
        alone = output(mini, "generate", PROMPT, "--mix", mix, *drawn)
        assert made["token_ids"] == alone["token_ids"]
        assert made["text"] == alone["text"]
        assert made["mix"] == alone["mix"]
        assert made.keys() == alone.keys()
    assert len({made["text"] for made in compared["texts"]}) == 3
    plain = adapterctl(mini, "compare", PROMPT, *asked, *drawn).stdout
    parts = [f"==> {m} <==\n{t['text']}" for m, t in zip(mixes, compared["texts"], strict=True)]
    assert plain == "\n\n".join(parts) + "\n"


def test_chat_goes_on_with_a_text_under_the_mix_of_the_moment(mini: Served) -> None:
    lines = f"Question: What is glaucoma ?\n/mix medicine\nAnswer:\n/score {SENTENCE}\n"
    options = ("--max-new-tokens", "4", "--ignore-eos")
    chatted = adapterctl(mini, "chat", *options, "--json", stdin=lines)
    assert chatted.exit_code == 0
    assert "no chat template" in chatted.stderr
    first, _, second, scores = (json.loads(line) for line in chatted.stdout.splitlines())
    asked = "Question: What is glaucoma ?"
    for mix, made in (("base", first), ("medicine", second)):
        alone = output(mini, "generate", asked, "--mix", mix, *options)
        assert made["token_ids"] == alone["token_ids"]
        assert made["mix"] == alone["mix"]
        asked += alone["text"] + "\nAnswer:"
    for mix, score in zip(("medicine", "base"), scores["scores"], strict=True):
        assert score == output(mini, "score", "-", "--mix", mix, stdin=SENTENCE)


def test_chat_puts_the_conversation_into_the_template_of_the_base(
    mini: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = mini.runtime.tokenizer.inner
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    mini.recorder.forget()
    chatted = adapterctl(
        mini, "chat", "--max-new-tokens", "4", "--ignore-eos", "--json", stdin="What ?\nAnd ?\n"
    )
    assert (chatted.exit_code, chatted.stderr) == (0, "")
    answers = [json.loads(line)["text"] for line in chatted.stdout.splitlines()]
    first, second = (list(mini.recorder.submitted.get().prompt) for _ in range(2))
    assert first == tokenizer.encode("user: What ?\nassistant:")
    turns = f"user: What ?\nassistant: {answers[0]}\nuser: And ?\nassistant:"
    assert second == tokenizer.encode(turns)


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_adapter_lowers_the_perplexity_of_its_domain_by_a_fifth(
    mini: Served, domain: str
) -> None:
    rows = str(MINI.held_out(domain))
    without = output(mini, "score", rows, "--mix", "base")
    own = output(mini, "score", rows, "--mix", domain)
    assert own["tokens"] == without["tokens"] > 1000
    assert own["perplexity"] <= 0.8 * without["perplexity"]
    # Resident, it is the same model.
    mini.client.set(domain)
    resident = output(mini, "score", rows)
    assert resident["mix"]["digest"] == own["mix"]["digest"]
    assert resident["perplexity"] == pytest.approx(own["perplexity"], rel=1e-4)


def test_every_command_has_a_screen_for_people(mini: Served, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Two and two are four.\n")
    for arguments, word in (
        (("status",), "mini"),
        (("list",), "medicine"),
        (("show", "math"), "bundled"),
        (("add", "math"), "math"),
        (("mix",), "generation"),
        (("set", "math,medicine"), "medicine"),
        (("remove", "math"), "medicine"),
        (("name", "qa", "math,medicine"), "math=1,medicine=1"),
        (("names",), "qa  math=1,medicine=1"),
        (("unname", "qa"), "qa"),
        (("analyze", "math,medicine"), "interference"),
        (("verify",), "ok"),
        (("generate", "Question: What", "--max-new-tokens", "2"), "\n"),
        (
            ("compare", "Question: What", "--mix=base", "--mix=math", "--max-new-tokens=2"),
            "==> math <==",
        ),
        (("chat",), ""),
        (("score", str(texts)), "perplexity"),
        (("health",), "SERVING"),
        (("push", "sums", str(MINI.adapters()["math"])), "sums"),
        (("delete", "sums"), "deleted sums"),
        (("merge", "sums", "math,medicine", "--method=sum"), "merged by      sum"),
        (("show", "sums"), "merged by      sum"),
        (("delete", "sums"), "deleted sums"),
    ):
        result = adapterctl(mini, *arguments)
        assert (result.exit_code, result.stderr) == (0, ""), arguments
        assert word in result.stdout, arguments


def test_a_mix_that_is_wrongly_written_is_wrong_usage(mini: Served) -> None:
    for mix in (
        "math=",
        "math=x",
        "Math",
        "math,math",
        "math,,",
        "",
        "math=1e300",
        "math=nan",
        "base=1",
    ):
        result = adapterctl(mini, "set", mix)
        assert result.exit_code == 2, mix
        assert result.stderr.startswith("adapterctl: "), mix
        assert result.stderr.count("\n") == 1, mix


def test_a_server_that_is_not_there_is_one_line_and_exit_1(mini: Served) -> None:
    result = CliRunner().invoke(app, ["status", "--server", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr.startswith("adapterctl: cannot reach a server at 127.0.0.1:1")
    assert result.stderr.count("\n") == 1


def test_watch_prints_an_object_a_change(mini: Served) -> None:
    """In a process of its own, as people run it: it goes on until it is stopped."""
    process = subprocess.Popen(
        [sys.executable, "-m", "superpose_client.cli", "watch", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "SUPERPOSE_SERVER": mini.address,
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert process.stdout is not None
    try:
        first = json.loads(process.stdout.readline())
        assert set(first) == STATE
        assert weights(first) == {}
        state = mini.client.set({"math": 0.25})
        second = json.loads(process.stdout.readline())
        assert (second["generation"], second["digest"]) == (state.generation, state.digest)
        assert weights(second) == {"math": 0.25}
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
