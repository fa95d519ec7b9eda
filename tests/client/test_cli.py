import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console
from tests.client.adapterctl import Ctl, one_line, printed, run_process
from tests.client.fake_server import (
    DEFAULT,
    GENERATION,
    Failure,
    FakeServer,
    Hang,
    adapter,
    analysis,
    default_answers,
    digest_of,
    state,
    verification,
    weights_of,
)
from typer.testing import CliRunner

from superpose_client import results, screens
from superpose_client.cli import app
from superpose_client.connection import DEFAULT_TARGET
from superpose_proto.v1 import adapter_pb2, inference_pb2, mix_pb2

Code = grpc.StatusCode

COMMANDS = [
    "status",
    "top",
    "list",
    "show",
    "push",
    "merge",
    "delete",
    "add",
    "remove",
    "set",
    "mix",
    "watch",
    "name",
    "unname",
    "names",
    "analyze",
    "verify",
    "generate",
    "compare",
    "chat",
    "score",
    "fit",
    "audit",
    "health",
]


OPTIONS = ("density=0.25", "seed=3", "rescale=true", "join=mean")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    return tmp_path


MIX = {
    "generation": GENERATION,
    "digest": digest_of(DEFAULT),
    "entries": [
        {"domain": "math", "weight": 1.0, "adapter_digest": b"math".hex() * 4},
        {"domain": "medicine", "weight": 0.5, "adapter_digest": b"medicine".hex() * 4},
    ],
}


def test_status(ctl: Ctl) -> None:
    lines = ctl("status").stdout.splitlines()
    assert "base           mini" in lines
    assert "server         superpose 0.1.0, up 2:03:04" in lines
    assert "running        3 of 8" in lines
    assert "mix            math=1,medicine=0.5" in lines
    assert "weights        no fault found" in lines
    assert all(line == line.rstrip() for line in lines)


def test_status_json(ctl: Ctl) -> None:
    info = printed(ctl("status", "--json"))
    assert info["mix"] == MIX
    assert info["limits"]["max_adapter_bytes"] == 2**28
    assert info["weights_intact"] is True
    assert info["uptime_seconds"] == 7384.5


def test_status_of_a_damaged_server(ctl: Ctl, server: FakeServer) -> None:
    info: Any = server.answers["GetServerInfo"]
    info.weights_intact = False
    assert "DAMAGED" in ctl("status").stdout


def test_status_shows_replicas(ctl: Ctl, server: FakeServer) -> None:
    info: Any = server.answers["GetServerInfo"]
    info.replicas.add(name="q1w2", node="n0", generation=7, digest="ef" * 32, running=2, waiting=1)
    info.replicas.add(name="e3r4", node="n1", digest="00" * 32, generated_tokens=12345)
    lines = [line.split() for line in ctl("status").stdout.splitlines()]
    assert ["running", "3", "of", "16"] in lines
    assert ["q1w2", "n0", "7", "efefefefefef", "2", "1", "0", "DAMAGED"] in lines
    assert ["e3r4", "n1", "-", "000000000000", "0", "0", "12,345", "DAMAGED"] in lines
    assert [each["name"] for each in printed(ctl("status", "--json"))["replicas"]] == [
        "q1w2",
        "e3r4",
    ]


def test_top_goes_on_until_the_server_does_not(ctl: Ctl, server: FakeServer) -> None:
    info: Any = server.answers["GetServerInfo"]
    asked = 0

    def answer(_request: object) -> Any:
        nonlocal asked
        asked += 1
        return Failure(Code.INTERNAL) if asked == 3 else info

    server.answers["GetServerInfo"] = answer
    result = ctl("top", "--json", "--every=0.1")
    assert result.exit_code == 1
    assert [each["base"] for each in map(json.loads, result.stdout.splitlines())] == ["mini"] * 2


def test_status_of_a_server_that_follows_a_file(ctl: Ctl, server: FakeServer) -> None:
    assert "follows" not in ctl("status").stdout
    assert printed(ctl("status", "--json"))["followed"] is None
    info: Any = server.answers["GetServerInfo"]
    info.followed.name = "/etc/superpose/mixes.json"
    info.followed.reached = True
    assert "follows        /etc/superpose/mixes.json" in ctl("status").stdout.splitlines()
    info.followed.reached, info.followed.problem = False, "it is not JSON"
    told = " ".join(ctl("status").stdout.split())
    assert "follows /etc/superpose/mixes.json, and is NOT at what it says: it is not JSON" in told
    assert printed(ctl("status", "--json"))["followed"] == {
        "name": "/etc/superpose/mixes.json",
        "reached": False,
        "problem": "it is not JSON",
    }


def test_list(ctl: Ctl) -> None:
    header, finance, math, medicine = ctl("list").stdout.splitlines()
    assert header.split() == ["DOMAIN", "WEIGHT", "RANK", "PARAMETERS", "SIZE", "SOURCE", "DIGEST"]
    assert finance.split()[:2] == ["finance_stock_trading", "-"]
    assert math.split() == ["math", "1", "4", "147,456", "592", "kB", "bundled", "6d6174680000"]
    assert medicine.split()[:2] == ["medicine", "0.5"]


def test_list_json(ctl: Ctl) -> None:
    adapters = printed(ctl("list", "--json"))["adapters"]
    assert [adapter["domain"] for adapter in adapters] == [
        "finance_stock_trading",
        "math",
        "medicine",
    ]
    assert adapters[0]["weight"] == 0.0
    assert adapters[1]["bytes"] == 591_872
    assert adapters[1]["source"] == "ADAPTER_SOURCE_BUNDLED"
    assert adapters[1]["modules"] == []


def test_an_empty_list(ctl: Ctl, server: FakeServer) -> None:
    server.answers["ListAdapters"] = adapter_pb2.ListAdaptersResponse()
    assert ctl("list").stdout == "no adapters; push one with: adapterctl push NAME DIR\n"
    assert printed(ctl("list", "--json")) == {"adapters": []}


def test_show(ctl: Ctl, server: FakeServer) -> None:
    shown = ctl("show", "math").stdout
    assert server.request == adapter_pb2.GetAdapterRequest(domain="math")
    assert "size           591.9 kB\n" in shown
    assert "4 modules" in shown
    assert "4 x transformer.h.*.attn.c_attn" in shown
    assert '{"r":4,"lora_alpha":64,"target_modules":["c_attn"]}' in shown
    assert printed(ctl("show", "math", "--json"))["domain"] == "math"
    assert "warning" not in shown


def test_warnings_of_an_adapter_are_shown(ctl: Ctl, server: FakeServer, folder: Path) -> None:
    warned = adapter(warnings=["it is another base's"])
    server.answers["GetAdapter"] = adapter_pb2.GetAdapterResponse(adapter=warned)
    server.answers["PushAdapter"] = adapter_pb2.PushAdapterResponse(adapter=warned)
    for command in (["show", "math"], ["push", "math", str(folder)]):
        assert "warning        it is another base's\n" in ctl(*command).stdout
    assert printed(ctl("show", "math", "--json"))["warnings"] == ["it is another base's"]


@pytest.mark.parametrize("replace", [False, True])
def test_push(ctl: Ctl, server: FakeServer, folder: Path, replace: bool) -> None:
    result = ctl("push", "math", str(folder), *["--replace"] * replace, "--json")
    assert server.request == adapter_pb2.PushAdapterRequest(
        domain="math", config=b'{"r": 4}', tensors=b"tensors", replace=replace
    )
    assert printed(result)["generation"] == GENERATION
    assert printed(result)["adapter"]["domain"] == "math"
    assert str(GENERATION) in ctl("push", "math", str(folder)).stdout


def test_push_refuses_a_pickle(ctl: Ctl, server: FakeServer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in one_line(ctl("push", "math", str(folder)))
    assert "is not a folder" in one_line(ctl("push", "math", str(folder / "no")))
    assert server.requests == []


def test_merge(ctl: Ctl, server: FakeServer) -> None:
    words = ["merge", "both", "math=1,medicine=0.5", "--method", "dare"]
    words += [word for option in OPTIONS for word in ("--option", option)]
    shown = ctl(*words, "--replace").stdout
    asked = server.request
    assert (asked.domain, asked.method, asked.replace) == ("both", "dare", True)
    assert {entry.domain: entry.weight for entry in asked.mix.entries} == DEFAULT
    assert dict(asked.options.items()) == {
        "density": 0.25,
        "seed": 3,
        "rescale": True,
        "join": "mean",
    }
    assert "merged by      dare " in shown
    for part in ("density=0.25", "seed=3", "rescale=True", "join=mean"):
        assert part in shown
    assert re.search(r"^medicine +0.5 +6d65", shown, re.MULTILINE)
    assert "deviation      25.00% of the plain sum's norm\n" in shown
    assert "merged in      0.12 s\n" in shown
    result = printed(ctl(*words, "--json"))
    assert result["adapter"]["provenance"]["options"]["seed"] == 3
    assert [part["domain"] for part in result["adapter"]["provenance"]["parts"]] == [*DEFAULT]
    ctl("merge", "both", "--method=sum")
    assert not server.requests[-1].HasField("mix")
    assert not server.requests[-1].replace


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["merge", "both", "math"], "Missing option '--method'"),
        (["merge", "both", "math", "--method=m", "--option=density"], "is no NAME=VALUE"),
        (["merge", "both", "math", "--method=m", *["--option=a=1"] * 2], "'a' is given twice"),
        (["merge", "both", "math=", "--method=m"], "math"),
    ],
)
def test_a_merge_that_is_written_wrongly_is_not_sent(
    ctl: Ctl, server: FakeServer, words: list[str], why: str
) -> None:
    result = ctl(*words)
    assert result.exit_code == 2
    assert why in result.stderr
    assert server.requests == []


def test_delete(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("delete", "math").stdout == "deleted math\n"
    assert server.request == adapter_pb2.DeleteAdapterRequest(domain="math")
    assert printed(ctl("delete", "math", "--json")) == {}


def test_add(ctl: Ctl, server: FakeServer) -> None:
    shown = ctl("add", "finance", "--weight", "-0.5", "--expected-generation", "7").stdout
    assert server.request == mix_pb2.AddDomainRequest(
        domain="finance", weight=-0.5, expected_generation=7
    )
    assert "finance=-0.5,math=1,medicine=0.5" in shown


def test_add_leaves_the_weight_to_the_server(ctl: Ctl, server: FakeServer) -> None:
    ctl("add", "finance")
    assert server.request == mix_pb2.AddDomainRequest(domain="finance")


def test_remove(ctl: Ctl, server: FakeServer) -> None:
    removed = printed(ctl("remove", "medicine", "--json", "--expected-generation", "0"))
    assert server.request == mix_pb2.RemoveDomainRequest(domain="medicine", expected_generation=0)
    assert removed["generation"] == GENERATION
    assert removed["entries"] == MIX["entries"][:1]  # type: ignore[index]


def test_set(ctl: Ctl, server: FakeServer) -> None:
    assert printed(ctl("set", "math,medicine=0.5", "--json", "--expected-generation", "3")) == MIX
    assert weights_of(server.request.mix) == DEFAULT
    assert server.request.expected_generation == 3
    assert "mix            base" in ctl("set", "base").stdout


def test_mix(ctl: Ctl, server: FakeServer) -> None:
    mix = printed(ctl("mix", "--json"))
    assert mix.pop("resident") == {
        "generation": GENERATION,
        "digest": digest_of({}),
        "entries": [],
    }
    assert mix == MIX
    assert "requests under other mixes are corrected" in ctl("mix").stdout
    server.answers["GetMix"] = mix_pb2.GetMixResponse(mix=state(), resident=state())
    assert "resident" not in ctl("mix").stdout


def test_watch(ctl: Ctl) -> None:
    assert ctl("watch").stdout.splitlines() == [
        f"generation 7  {digest_of({})[:12]}  base",
        f"generation 8  {digest_of(DEFAULT)[:12]}  math=1,medicine=0.5",
    ]
    states = [json.loads(line) for line in ctl("watch", "--json").stdout.splitlines()]
    assert states[1] == {**MIX, "generation": 8}


def test_name(ctl: Ctl, server: FakeServer) -> None:
    assert printed(ctl("name", "qa", "math;medicine=0.5", "--json")) == {
        "name": "qa",
        "entries": [{"domain": "math", "weight": 1.0}, {"domain": "medicine", "weight": 0.5}],
    }
    assert server.request.name == "qa"
    assert weights_of(server.request.mix) == DEFAULT
    shown = ctl("name", "qa", "math=-2").stdout.splitlines()
    assert [line.split() for line in shown] == [["name", "qa"], ["mix", "math=-2"]]


@pytest.mark.parametrize("arguments", [[], ["default"]])
def test_name_without_a_mix_takes_the_default_one(
    ctl: Ctl, server: FakeServer, arguments: list[str]
) -> None:
    assert "math=1,medicine=0.5" in ctl("name", "qa", *arguments).stdout
    assert server.request == mix_pb2.NameMixRequest(name="qa")


def test_unname(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("unname", "qa").stdout == "no mix is named qa any more\n"
    assert server.request == mix_pb2.UnnameMixRequest(name="qa")
    assert printed(ctl("unname", "qa", "--json")) == {}


def test_names(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("names").stdout == "half   math=0.5\nplain  base\n"
    assert printed(ctl("names", "--json"))["named_mixes"] == [
        {"name": "half", "entries": [{"domain": "math", "weight": 0.5}]},
        {"name": "plain", "entries": []},
    ]
    server.answers["ListNamedMixes"] = mix_pb2.ListNamedMixesResponse()
    assert ctl("names").stdout == "no named mixes; name one with: adapterctl name NAME MIX\n"


def test_analyze(ctl: Ctl, server: FakeServer) -> None:
    shown = ctl("analyze", "math,medicine=0.5").stdout
    assert weights_of(server.request.mix) == DEFAULT
    assert "+0.118: the deltas reinforce each other" in shown
    assert "0.00042: small enough to fold" in shown
    assert re.search(r"warning +math and medicine reinforce each other", shown)
    assert re.search(r"math, medicine +all +0\.1234 +0\.0013\n +attn\.c_attn +0\.1510", shown)


def test_analyze_without_a_mix_takes_the_default_one(ctl: Ctl, server: FakeServer) -> None:
    report = printed(ctl("analyze", "--json"))
    assert not server.request.HasField("mix")
    assert report["mix"] == MIX
    assert report["pairs"][0]["modules"][0]["cosine"] == -0.1
    assert report["folded"] is True


def test_analyze_of_what_cannot_be_folded(ctl: Ctl, server: FakeServer) -> None:
    report = analysis(state())
    report.folded = False
    report.warnings.clear()
    server.answers["AnalyzeMix"] = report
    shown = ctl("analyze").stdout
    assert "served by correction" in shown
    assert "warning" not in shown


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(0.0, "hardly"), (0.049, "hardly"), (-0.04, "hardly"), (0.05, "reinforce"), (-0.3, "cancel")],
)
def test_interference_in_words(ratio: float, words: str) -> None:
    assert words in screens.interference_words(ratio)


def test_verify(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("verify").stdout.startswith("ok: ")
    assert printed(ctl("verify", "--json"))["ok"] is True


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failed_verification_is_printed_and_fails(
    ctl: Ctl, server: FakeServer, options: list[str]
) -> None:
    server.answers["VerifyWeights"] = verification(ok=False)
    result = ctl("verify", *options)
    assert "the weights are not what they should be" in one_line(result)
    assert "transformer.h.0.attn.c_attn.weight" in result.stdout
    assert "transformer.wte.weight" in result.stdout
    assert "ef" * 32 in result.stdout
    if options:
        assert json.loads(result.stdout)["ok"] is False


def test_generate_prints_the_text_and_nothing_else(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("generate", "What is 2 + 3?").stdout == "The sum is 5.\n"
    assert isinstance(server.request, inference_pb2.GenerateStreamRequest)
    assert server.request.prompt == "What is 2 + 3?"
    assert not server.request.HasField("mix")
    assert [f.name for f, _ in server.request.options.ListFields()] == ["temperature"]
    assert server.request.options.temperature == 0


def test_generate_without_stream(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("generate", "x", "--no-stream").stdout == "The sum is 5.\n"
    assert isinstance(server.request, inference_pb2.GenerateRequest)


def test_every_option_of_generate(ctl: Ctl, server: FakeServer) -> None:
    options = """
        --mix math=-1 --max-new-tokens 9 --min-new-tokens 2 --temperature 0.5 --top-k 4 --top-p 0.9
        --min-p 0.05
        --seed 18446744073709551615 --stop a --stop b --ignore-eos --logprobs --top-logprobs 2
        --repetition-penalty 1.2 --frequency-penalty -0.5 --presence-penalty 0.25
        --logit-bias 3=-100 --logit-bias 464=1.5
    """
    ctl("generate", "x", *options.split())
    assert weights_of(server.request.mix) == {"math": -1.0}
    assert server.request.options == inference_pb2.GenerateOptions(
        max_new_tokens=9,
        min_new_tokens=2,
        temperature=0.5,
        top_k=4,
        top_p=0.9,
        min_p=0.05,
        seed=2**64 - 1,
        stop=["a", "b"],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        presence_penalty=0.25,
        logit_bias={3: -100.0, 464: 1.5},
    )


@pytest.mark.parametrize("pair", ["3", "=1", "x=1", "3=x", "-1=1", "4294967296=1"])
def test_a_bias_that_is_none_is_wrong_usage(ctl: Ctl, pair: str) -> None:
    result = ctl("generate", "x", "--logit-bias", pair)
    assert result.exit_code == 2
    assert "--logit-bias" in result.stderr


def test_generate_json_is_one_object(ctl: Ctl, server: FakeServer) -> None:
    made = printed(ctl("generate", "x", "--json", "--logprobs"))
    assert isinstance(server.request, inference_pb2.GenerateRequest)
    assert made == {
        "text": "The sum is 5.",
        "token_ids": [464, 2160, 318],
        "finish_reason": "FINISH_REASON_STOP",
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
        "mix": MIX,
        "logprobs": [-0.25, -1.5, "-Infinity"],
        "top_logprobs": [],
        "request_id": "r-1",
    }


def test_generate_stream_json_is_an_object_a_line(ctl: Ctl) -> None:
    result = ctl("generate", "x", "--json", "--stream")
    first, second, last = (json.loads(line) for line in result.stdout.splitlines())
    assert first["text"] + second["text"] + last["text"] == "The sum is 5."
    assert first["finish_reason"] == "FINISH_REASON_UNSPECIFIED"
    assert (first["usage"], first["mix"]) == (None, None)
    assert last["finish_reason"] == "FINISH_REASON_LENGTH"
    assert last["mix"] == MIX


def test_generate_shows_logprobs(ctl: Ctl) -> None:
    lines = ctl("generate", "x", "--no-stream", "--logprobs").stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["TOKEN", "LOGPROB"],
        ["464", "-0.2500"],
        ["2160", "-1.5000"],
        ["318", "-inf"],
    ]


def test_generate_shows_the_likeliest_tokens(ctl: Ctl) -> None:
    asked = ("generate", "x", "--no-stream", "--top-logprobs", "2")
    lines = ctl(*asked).stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["TOKEN", "LIKELIEST"],
        ["464", "7", "-0.1250", "464", "-0.2500"],
        ["2160", "7", "-0.1250", "2160", "-0.2500"],
        ["318", "7", "-0.1250", "318", "-0.2500"],
    ]
    lines = ctl(*asked, "--logprobs").stdout.splitlines()
    assert lines[1].split() == ["TOKEN", "LOGPROB", "LIKELIEST"]
    assert lines[3].split() == ["2160", "-1.5000", "7", "-0.1250", "2160", "-0.2500"]


def test_a_prompt_from_standard_input(ctl: Ctl, server: FakeServer) -> None:
    ctl("generate", "-", stdin="two\nlines\n\n")
    assert server.request.prompt == "two\nlines\n"


def test_a_text_that_the_server_aborts_fails(ctl: Ctl, server: FakeServer) -> None:
    server.answers["GenerateStream"] = [
        inference_pb2.GenerateStreamResponse(
            text="The", finish_reason=inference_pb2.FINISH_REASON_ABORTED
        )
    ]
    result = ctl("generate", "x")
    assert "before its end" in one_line(result)
    assert result.stdout == "The\n"


def test_a_stream_that_fails_half_way_ends_its_line(ctl: Ctl, server: FakeServer) -> None:
    server.answers["GenerateStream"] = [
        inference_pb2.GenerateStreamResponse(text="The"),
        Failure(Code.UNAVAILABLE, "the server is shutting down", "SHUTTING_DOWN"),
    ]
    result = ctl("generate", "x")
    assert one_line(result) == "the server is shutting down"
    assert result.stdout == "The\n"


ROWS = '{"question": "q1", "answer": "a1", "split": "test"}\n\n{"question": "q2", "answer": "a2"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ROWS.encode()),
        ("rows.jsonl.gz", gzip.compress(ROWS.encode(), mtime=0)),
    ],
)
def test_score_pairs(
    ctl: Ctl, server: FakeServer, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    scored = printed(
        ctl(*f"score {tmp_path / name} --mix base --max-length 9 --scope answer --json".split())
    )
    pairs = [item.question_answer for item in server.request.items]
    assert [(pair.question, pair.answer) for pair in pairs] == [("q1", "a1"), ("q2", "a2")]
    assert server.request.HasField("mix")
    assert weights_of(server.request.mix) == {}
    assert server.request.max_length == 9
    assert server.request.scope == inference_pb2.SCORE_SCOPE_ANSWER
    assert scored["perplexity"] == 2.0
    assert scored["tokens"] == 4
    assert len(scored["items"]) == 2
    assert scored["mix"]["entries"] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "one\n\n two\u2028still two\r\nthree".encode()),
        ("texts.txt", "\ufeffone\n two\u2028still two\nthree\n".encode()),
        ("texts.gz", gzip.compress("one\n two\u2028still two\nthree\n".encode(), mtime=0)),
        ("t.jsonl", b'{"text": "one"}\n{"text": " two\\u2028still two"}\n{"text": "three"}'),
    ],
)
def test_score_texts(
    ctl: Ctl, server: FakeServer, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    shown = ctl("score", str(tmp_path / name)).stdout
    assert [item.text for item in server.request.items] == ["one", " two\u2028still two", "three"]
    assert server.request.scope == inference_pb2.SCORE_SCOPE_ALL
    assert "perplexity     2.0000\n" in shown
    assert "texts          3\n" in shown


ARRAY = json.dumps([json.loads(line) for line in ROWS.split("\n") if line.strip()], indent=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", ARRAY.encode()),
        ("rows.json", ROWS.encode()),
        ("rows.JSONL", ROWS.encode()),
        ("rows.txt", ROWS.encode()),
        ("rows", b"\xef\xbb\xbf" + ROWS.encode()),
        ("rows.gz", gzip.compress(ARRAY.encode(), mtime=0)),
        ("rows.jsonl", ROWS.replace("\n", "\r\n\r\n").encode()),
    ],
)
@pytest.mark.parametrize("piped", [False, True], ids=["file", "standard input"])
def test_rows_are_told_by_what_they_are(
    ctl: Ctl, server: FakeServer, tmp_path: Path, name: str, content: bytes, piped: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    if piped:
        ctl("score", "-", stdin=content)
    else:
        ctl("score", str(tmp_path / name))
    pairs = [item.question_answer for item in server.request.items]
    assert [(pair.question, pair.answer) for pair in pairs] == [("q1", "a1"), ("q2", "a2")]


def test_score_standard_input(ctl: Ctl, server: FakeServer) -> None:
    ctl("score", "-", stdin="one\ntwo\n")
    assert [item.text for item in server.request.items] == ["one", "two"]


@pytest.mark.parametrize(
    "line", ["[1] A footnote", "[1, 2]", "5", "null", '"quoted"', "a {b}", "[a]", "[ ] to do"]
)
def test_a_text_that_json_could_be_is_a_text(ctl: Ctl, server: FakeServer, line: str) -> None:
    ctl("score", "-", stdin=f"{line}\nsecond\n")
    assert [item.text for item in server.request.items] == [line, "second"]


TEXT_ROW = b'{"text": "a"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"}\n', "a.jsonl:2: needs"),
        ("a.jsonl", b'{"question": "q", "answer": 5}\n', "a.jsonl:1: needs"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: needs"),
        ("a.jsonl", b"\n{\n", "a.jsonl:2: not JSON"),
        ("a.jsonl", b"one\n", "a.jsonl:1: not JSON"),
        ("a.txt", b"{not rows}\n", "a.txt:1: not JSON"),
        ("a.txt", TEXT_ROW + b"\nplain\n", "a.txt:2: not JSON"),
        ("a.txt", b"plain\n\n" + TEXT_ROW, "a.txt:3: a row among texts"),
        ("a.txt", b'plain\n{"prompt": "q", "completion": "a"}', "a.txt:2: a row among texts"),
        ("a.txt", b"[]\n", "a.txt holds no text"),
        ("a.txt", b'plain\n[{"text": "a"}]', "a.txt:2: a row among texts"),
        ("a.txt", TEXT_ROW + b" " + TEXT_ROW, "a.txt:1: not JSON: more than one value"),
        ("a.txt", b'{"text": "a}\n{"text": "b"}', "a.txt:1: not JSON: Invalid control character"),
        ("a.txt", b'{"data": [1]}', "a.txt:1: needs"),
        ("a.json", b'["a text"]', "a.json:1: needs"),
        ("a.json", b"[\n" + TEXT_ROW + b",\n {}]", "a.json:3: needs"),
        ("a.json", b"[\n" + TEXT_ROW + b"\n" + TEXT_ROW + b"]", "a.json:2: not JSON: no comma"),
        ("a.json", b"[" + TEXT_ROW, "a.json:1: not JSON: no comma or closing bracket"),
        ("a.json", b"[" + TEXT_ROW + b",", "a.json: not JSON: the array is not closed"),
        ("a.json", b"[" + TEXT_ROW + b"]\n[", "a.json: not JSON: the array is not closed, or not"),
        ("a.json", b"[" * 100_000, "a.json:1: not JSON: "),
        ("a.json", b"[]", "a.json holds no text"),
        ("a.json", b'{"text": "\\ud83d"}', "a.json:1: half a character"),
        ("a.csv", b"question,answer\nq,a\n", "a.csv: .csv is not read"),
        ("a.txt", b"one\n\xff\n", "a.txt:2: not UTF-8"),
        ("a.txt", b"\n\n", "a.txt holds no text"),
        ("a.txt.gz", b"plain", "a.txt.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
        (
            "a.txt.gz",
            gzip.compress(b"a\nb", mtime=0)[:12] + b"\xff" * 20,
            "a.txt.gz: not a whole gzip",
        ),
    ],
)
def test_score_names_the_line_at_fault(
    ctl: Ctl, server: FakeServer, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in one_line(ctl("score", str(tmp_path / name)))
    assert server.requests == []


@pytest.mark.parametrize("batch", [0, 1])
def test_what_the_server_refuses_of_a_file_is_told_by_its_line(
    ctl: Ctl, server: FakeServer, tmp_path: Path, batch: int
) -> None:
    """The second text of the first or of the second request; each stands on every other line."""
    (tmp_path / "texts").write_text("\n\n".join(["one"] * 300), "utf-8")
    refusal = Failure(
        Code.INVALID_ARGUMENT,
        "items[1] holds token 7 ('[PAD]'): leave it out",
        reason="TOKEN_OUT_OF_RANGE",
        violations={"items[1]": "items[1] holds token 7 ('[PAD]'): leave it out"},
    )
    whole = inference_pb2.ScoreResponse(
        items=[inference_pb2.ItemScore(tokens=1, logprob=-1)] * 256, tokens=256, mix=state()
    )
    server.answers["Score"] = lambda _: refusal if len(server.requests) > batch else whole
    said = one_line(ctl("score", str(tmp_path / "texts")))
    line = 2 * (256 * batch + 1) + 1
    assert said.endswith(f"{tmp_path}/texts:{line} holds token 7 ('[PAD]'): leave it out")


def test_texts_without_a_token_that_counts_are_told(
    ctl: Ctl, server: FakeServer, tmp_path: Path
) -> None:
    def answer(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        items = [
            inference_pb2.ItemScore(
                tokens=len(item.text) - 1,
                logprob=1.0 - len(item.text),
                perplexity=math.e if len(item.text) > 1 else math.nan,
            )
            for item in request.items
        ]
        tokens = sum(item.tokens for item in items)
        return inference_pb2.ScoreResponse(
            items=items, tokens=tokens, perplexity=math.e if tokens else math.nan, mix=state()
        )

    server.answers["Score"] = answer
    shown = ctl("score", "-", stdin="a\nbcd\ne\n")
    assert shown.exit_code == 0
    assert "perplexity     2.7183\n" in shown.stdout
    assert "texts          3, 2 of them without a token that counts\n" in shown.stdout
    nothing = ctl("score", "-", "--json", stdin="a\nb\n")
    assert nothing.exit_code == 1
    assert nothing.stderr == "adapterctl: nothing to score: no text has a token that counts\n"
    scored = json.loads(nothing.stdout)
    assert (scored["tokens"], scored["perplexity"]) == (0, "NaN")
    assert [item["perplexity"] for item in scored["items"]] == ["NaN", "NaN"]


def test_fit(ctl: Ctl, server: FakeServer) -> None:
    texts = "a\nb\nc\nd\ne\n"
    shown = ctl("fit", "-", "--domains", "math, law", "--bounds", "-1.5,3", stdin=texts)
    assert (shown.exit_code, shown.stderr) == (0, "")
    request = server.request
    assert list(request.domains) == ["math", "law"]
    assert (request.low, request.high) == (-1.5, 3)
    for words in (
        "law=0.25",
        "5 rows, 1,234 tokens",
        "3 rows, 456 tokens",
        "too few rows",
        "3.0000 to 3.5000",
        "+0.7500  -0.1250 to +1.0000",
        "3 different rows are held out",
    ):
        assert words in shown.stdout
    assert "BY FILE" not in shown.stdout


def test_fit_tells_the_losses_of_several_files_apart(
    ctl: Ctl, server: FakeServer, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    for file, texts in zip(files, ("a\nb\n", "c\n", "d\ne\n"), strict=True):
        file.write_text(texts)
    shown = ctl("fit", *map(str, files), "--domains", "math,law")
    assert [item.text for item in server.request.items] == ["a", "b", "c", "d", "e"]
    assert list(server.request.sources) == [0, 0, 1, 2, 2]
    header, fitted, base = shown.stdout.splitlines()[-3:]
    assert header.split() == ["HELD", "OUT,", "BY", "FILE", "one.txt", "two.txt", "three.txt"]
    # Of the texts 0, 3 and 4: -3 over 2 tokens; and -11.5 over 8.
    assert fitted.split() == ["law=0.25", "1.5000", "no", "row", "1.4375"]
    assert base.split() == ["base", "2.0000", "no", "row", "2.0000"]


def test_files_of_one_name_are_told_apart_by_their_folders(ctl: Ctl, tmp_path: Path) -> None:
    files = [tmp_path / folder / "rows.txt" for folder in ("x", "y")]
    for file in files:
        file.parent.mkdir()
        file.write_text("a\nb\nc\n")
    shown = ctl("fit", *map(str, files), "--domains", "math,law").stdout
    assert all(str(file) in shown for file in files)


def test_fit_sets_and_names_what_it_found_when_told_to(ctl: Ctl, server: FakeServer) -> None:
    lines = ctl(
        *("fit", "-", "--domains", "math,law", "--set", "--name", "best", "--json"),
        stdin="a\nb\nc\nd\ne\n",
    ).stdout.splitlines()
    _, named, changed = server.requests
    assert (named.name, weights_of(named.mix)) == ("best", {"law": 0.25})
    assert (weights_of(changed.mix), changed.expected_generation) == ({"law": 0.25}, GENERATION)
    fitted, name, state = map(json.loads, lines)
    assert fitted["held_out"] == [0, 3, 4]
    assert fitted["candidates"][0]["held_out_items"][1]["logprob"] == -5
    assert fitted["candidates"][0]["held_out_loss"] == {"value": 2.5, "low": "NaN", "high": "NaN"}
    assert (name["name"], state["generation"]) == ("best", GENERATION)


def test_an_adapter_that_is_replaced_during_a_fit_is_told(ctl: Ctl, server: FakeServer) -> None:
    server.answers["SetMix"] = mix_pb2.SetMixResponse(mix=state({"law": 0.5}))
    said = ctl("fit", "-", "--domains", "math,law", "--set", stdin="a\nb\nc\nd\ne\n")
    assert said.exit_code == 1
    assert "an adapter was replaced during the fit" in said.stderr


@pytest.mark.parametrize("bounds", ["1", "a,b", "1,2,3"])
def test_bounds_that_are_none_are_wrong_usage(ctl: Ctl, server: FakeServer, bounds: str) -> None:
    result = ctl("fit", "-", "--domains", "a", "--bounds", bounds)
    assert result.exit_code == 2
    assert "LOW,HIGH" in result.stderr
    assert server.requests == []


def test_a_missing_file_is_named(ctl: Ctl, tmp_path: Path) -> None:
    assert one_line(ctl("score", str(tmp_path / "no"))).endswith("/no: No such file or directory")
    assert "Is a directory" in one_line(ctl("score", str(tmp_path)))


def test_health(ctl: Ctl, server: FakeServer) -> None:
    assert ctl("health").stdout == "SERVING\n"
    assert ctl("health").exit_code == 0
    assert printed(ctl("health", "--json")) == {"status": "SERVING"}
    assert {each.service for each in server.requests} == {"superpose.v1.InferenceService"}
    assert all(left is not None and left < 6 for left in server.seconds_left)


@pytest.mark.parametrize("status", [0, 2])
def test_a_server_that_does_not_serve_is_unhealthy(
    ctl: Ctl, server: FakeServer, status: int
) -> None:
    answer: Any = default_answers()["Check"]
    answer.status = status
    server.answers["Check"] = answer
    result = ctl("health")
    assert result.stdout in ("UNKNOWN\n", "NOT_SERVING\n")
    assert "does not take requests" in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        "set math=",
        "set math,math",
        "analyze Math",
        "generate x --mix base,math",
        "score FILE --mix math=nan",
    ],
)
def test_bad_mix_syntax_is_wrong_usage(
    ctl: Ctl, server: FakeServer, tmp_path: Path, arguments: str
) -> None:
    (tmp_path / "texts").write_text("one\n")
    result = ctl(*arguments.replace("FILE", str(tmp_path / "texts")).split())
    assert "mix" in one_line(result, 2)
    assert server.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "frobnicate",
        "add",
        "generate x --seed -1",
        "generate x --max-new-tokens 4294967296",
        "generate x --top-k many",
        "remove math --expected-generation -1",
        "mix --timeout -1",
        "mix --timeout nan",
        "score x --scope question",
        "status --frobnicate",
    ],
)
def test_wrong_usage(ctl: Ctl, server: FakeServer, arguments: str) -> None:
    result = ctl(*arguments.split())
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert server.requests == []


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (Failure(Code.NOT_FOUND, "no adapter\nas 'x'", "R"), "no adapter as 'x'"),
        (Failure(Code.NOT_FOUND, "\x1b[31mred", "R"), "[31mred"),
        (
            Failure(Code.INVALID_ARGUMENT, "bad weight", "R", violations={"weight": "be finite"}),
            "bad weight; weight: be finite",
        ),
        (
            Failure(Code.INVALID_ARGUMENT, "w: be finite", "R", violations={"w": "be finite"}),
            "w: be finite",
        ),
        (Failure(Code.INTERNAL, "internal error", "INTERNAL"), "internal error"),
        (Failure(Code.UNAVAILABLE, "shutting down", "SHUTTING_DOWN"), "shutting down"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_failure_is_one_line(
    ctl: Ctl, server: FakeServer, failure: Failure, line: str, options: list[str]
) -> None:
    server.answers["AddDomain"] = failure
    result = ctl("add", "x", *options)
    assert one_line(result) == line
    assert result.stdout == ""


def test_no_answer_in_time(ctl: Ctl, server: FakeServer) -> None:
    server.answers.update(GetMix=Hang(), AddDomain=Hang())
    assert "in time; see --timeout" in one_line(ctl("mix", "--timeout", "0.05"))
    assert "may still take place" in one_line(ctl("--timeout", "0.05", "add", "x"))


def test_an_unreachable_server_is_named(ctl: Ctl, server: FakeServer) -> None:
    server.__exit__(None, None, None)
    assert f"cannot reach a server at {server.address}" in one_line(ctl("status"))
    assert f"cannot reach a server at {server.address}" in one_line(ctl("generate", "x"))


def test_text_that_is_not_utf8_is_refused(ctl: Ctl, server: FakeServer) -> None:
    assert "UTF-8" in one_line(ctl("generate", "\udcff"))
    assert "UTF-8" in one_line(ctl("generate", "-", stdin=b"\xff"))
    assert server.requests == []


@pytest.mark.parametrize(
    ("before", "after", "variable"),
    [
        ("{}", None, None),
        (None, "{}", None),
        (None, None, "{}"),
        ("localhost:1", "{}", "localhost:1"),
        ("{}", None, "localhost:1"),
        ("{}", None, ""),
    ],
)
def test_where_the_server_is(
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    after: str | None,
    variable: str | None,
) -> None:
    if variable is not None:
        monkeypatch.setenv("SUPERPOSE_SERVER", variable.format(server.address))
    arguments = ["mix"]
    if before is not None:
        arguments = ["--server", before.format(server.address), *arguments]
    if after is not None:
        arguments += ["--server", after.format(server.address)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(server.requests) == 1


def test_the_default_address_is_that_of_the_client() -> None:
    from superpose_client.common_options import DEFAULT_SERVER

    assert DEFAULT_SERVER == DEFAULT_TARGET


def test_json_and_timeout_may_stand_before_the_command(ctl: Ctl, server: FakeServer) -> None:
    assert printed(ctl("--json", "--timeout", "7", "mix"))["generation"] == GENERATION
    (left,) = server.seconds_left
    assert left is not None
    assert left < 8


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_common_options(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"]).stdout
    for option in ("--server", "--json", "--timeout"):
        assert option in text


def test_the_commands_are_those_of_the_design() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    listed = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == [*COMMANDS, "token"]
    assert text.count("...") == text.count("[ARGS]...")


@pytest.mark.parametrize("before", [True, False])
def test_tokens_are_made_listed_and_revoked_in_a_file(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "tokens.json"

    def token(*words: str) -> Any:
        arguments = ["--json", "token", *words] if before else ["token", *words, "--json"]
        result = CliRunner().invoke(app, arguments, env={"SUPERPOSE_TOKENS": str(path)})
        return printed(result)

    made = token("new", "ci", "--scope=inference", "--rate=60", "--domains=math, law")
    secret = made.pop("token")
    assert made == {
        "name": "ci",
        "scope": "inference",
        "expires": None,
        "rate": 60,
        "concurrency": None,
        "domains": ["law", "math"],
    }
    stored = json.loads(path.read_text())["tokens"]["ci"]
    assert stored["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert token("list") == {"tokens": [made]}
    assert token("revoke", "ci") == {}
    assert token("list") == {"tokens": []}


@pytest.mark.parametrize(
    ("expires", "expected"),
    [
        ("2030-01-31", "2030-01-31T00:00:00Z"),
        ("2030-01-31T12:00+02:00", "2030-01-31T10:00:00Z"),
    ],
)
def test_a_token_is_shown_once_and_says_when_it_ends(
    tmp_path: Path, expires: str, expected: str
) -> None:
    file = f"--tokens={tmp_path / 'tokens.json'}"
    made = CliRunner().invoke(
        app, ["token", "new", "ops", "--scope=admin", f"--expires={expires}", file]
    )
    assert made.exit_code == 0
    secret = made.stdout.strip()
    listed = CliRunner().invoke(app, ["token", "list", file])
    assert listed.stdout.split() == ["ops", "admin", "expires", expected]
    assert secret not in listed.output + (tmp_path / "tokens.json").read_text()


@pytest.mark.parametrize(("period", "seconds"), [("30d", 30 * 86400), ("12h", 12 * 3600)])
def test_a_token_may_end_after_a_while(tmp_path: Path, period: str, seconds: int) -> None:
    path = tmp_path / "tokens.json"
    now = datetime.now(UTC)
    CliRunner().invoke(
        app, ["token", "new", "a", "--scope=admin", f"--expires={period}", f"--tokens={path}"]
    )
    ends = datetime.fromisoformat(json.loads(path.read_text())["tokens"]["a"]["expires"])
    assert abs((ends - now).total_seconds() - seconds) < 60


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("new", "ci", "--scope=root"), 2, "'inference', 'admin'"),
        (("new", "ci"), 2, "--scope"),
        (("new", "ci", "--scope=admin", "--expires=soon"), 2, "no 30d, 12h, 2030-01-31"),
        (("new", "Ci", "--scope=admin"), 1, "not a valid name"),
        (("new", "ci", "--scope=admin", "--rate=0"), 1, "rate is 0"),
        (("new", "ci", "--scope=admin", "--domains=math"), 1, "domains bind no admin"),
        (("new", "ops", "--scope=admin"), 1, "there is a token ops already: revoke it first"),
        (("revoke", "ci"), 1, "there is no token 'ci'"),
    ],
)
def test_what_no_token_can_be_leaves_the_file_as_it_was(
    tmp_path: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    path = tmp_path / "tokens.json"
    env = {"SUPERPOSE_TOKENS": str(path)}
    CliRunner().invoke(app, ["token", "new", "ops", "--scope=admin"], env=env)
    before = path.read_bytes()
    result = CliRunner().invoke(app, ["token", *words], env=env)
    assert result.exit_code == status
    assert said in " ".join(result.stderr.split())
    assert path.read_bytes() == before


@pytest.mark.parametrize("words", [("new", "x", "--scope=admin"), ("list",), ("revoke", "x")])
def test_the_file_of_tokens_is_named(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["token", *words], env={"SUPERPOSE_TOKENS": None})
    assert result.exit_code == 2
    assert "SUPERPOSE_TOKENS" in result.stderr


def test_changes_are_listed_with_who_made_them(ctl: Ctl) -> None:
    lines = ctl("audit").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["ops", "anonymous"]
    assert "set math=1,medicine=0.5" in lines[0]
    assert f"{GENERATION - 1} -> {GENERATION}" in lines[0]
    assert printed(ctl("audit", "--limit=7", "--json"))["changes"][1]["what"] == "delete law"


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"adapterctl (\d+\.\d+\.\d+|from a source tree)\n", result.stdout)


def responses() -> list[Any]:
    answers: Any = default_answers()
    named = mix_pb2.Mix(
        entries=[mix_pb2.DomainWeight(domain=n, weight=w) for n, w in DEFAULT.items()]
    )
    adapter = answers["GetAdapter"](adapter_pb2.GetAdapterRequest(domain="finance_stock_trading"))
    score = answers["Score"](
        inference_pb2.ScoreRequest(items=[inference_pb2.ScoreItem(text="one")], mix=named)
    )
    merged = answers["MergeAdapters"](
        adapter_pb2.MergeAdaptersRequest(domain="both", mix=named, method="core-ties")
    )
    listed = answers["ListAdapters"].adapters
    listed[0].source = adapter_pb2.ADAPTER_SOURCE_DIRECTORY
    return [
        results.ServerInfo.from_proto(answers["GetServerInfo"]),
        results.CurrentMix.from_proto(answers["GetMix"]),
        results.NamedMix.from_proto(answers["ListNamedMixes"].named_mixes[0]),
        tuple(results.AdapterInfo.from_proto(adapter) for adapter in listed),
        results.AdapterInfo.from_proto(adapter.adapter),
        results.MergeResult.from_proto(merged),
        results.Analysis.from_proto(analysis(state())),
        results.Verification.from_proto(verification(ok=False)),
        results.ScoreResult.from_proto(score),
    ]


def wide_list() -> tuple[results.AdapterInfo, ...]:
    """Adapters with the longest of what a list may show."""
    weights = {"finance_stock_trading_in_europe_since_2024": -1234.5678, "math": 1e-300}
    return tuple(
        dataclasses.replace(
            results.AdapterInfo.from_proto(adapter(domain, weight)),
            parameters=11_059_200_000,
            bytes=999_000_000,
            rank=256,
        )
        for domain, weight in weights.items()
    )


@pytest.mark.parametrize("width", [48, 55, 60, 66, 76, 80, 120])
@pytest.mark.parametrize(
    "result", [*responses(), wide_list()], ids=lambda result: type(result).__name__
)
def test_screens_fit_and_lose_nothing(result: Any, width: int) -> None:
    """A terminal shows every word of what a pipe gets, unbroken where a line has the room."""
    shown, whole = io.StringIO(), io.StringIO()
    for file, columns in ((shown, width), (whole, 10_000)):
        Console(file=file, width=columns, markup=False, highlight=False).print(
            screens.screen(result)
        )
    assert max(len(line) for line in shown.getvalue().splitlines()) <= width
    assert "…" not in shown.getvalue()
    words = shown.getvalue().lower().split()
    for word in whole.getvalue().lower().split():
        if len(word) <= width - len("longest stall  "):
            assert word in words
        else:
            assert word in "".join(words)


def test_a_table_that_is_too_wide_is_shown_row_after_row() -> None:
    _, math = wide_list()
    for width, lines in ((200, 2), (60, 7)):
        file = io.StringIO()
        Console(file=file, width=width).print(screens.screen((math,)))
        assert len(file.getvalue().splitlines()) == lines
    assert "parameters     11,059,200,000" in [
        line.rstrip() for line in file.getvalue().split("\n")
    ]


def test_a_process_flushes_each_change_and_ends_at_ctrl_c(server: FakeServer) -> None:
    server.answers["WatchMix"] = [mix_pb2.WatchMixResponse(mix=state()), Hang()]
    with run_process(server, "watch", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == MIX
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert out == ""
    assert server.cancelled.wait(10)


def test_a_closed_pipe_ends_quietly(server: FakeServer) -> None:
    server.answers["WatchMix"] = [mix_pb2.WatchMixResponse(mix=state())] * 50_000
    with run_process(server, "watch") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("generation")
        process.stdout.close()
        error = process.stderr.read()
        process.wait(timeout=20)
    assert process.returncode == 1
    assert error == ""


@pytest.mark.parametrize(
    ("arguments", "redirection", "status", "line"),
    [
        ("list", ">&-", 1, "standard output is closed: redirect it to /dev/null instead"),
        ("add math", ">&-", 1, "standard output is closed: redirect it to /dev/null instead"),
        ("--help", ">&-", 1, "standard output is closed: redirect it to /dev/null instead"),
        ("list", ">/dev/full", 1, "No space left on device"),
        ("generate x", ">/dev/full", 1, "No space left on device"),
        ("--version", ">/dev/full", 1, "No space left on device"),
        ("list", "2>&-", 0, None),
        ("generate -", "<&-", 0, None),
        ("generate x", ">&- 2>&-", 1, None),
    ],
)
def test_standard_streams_that_cannot_be_used(
    server: FakeServer, arguments: str, redirection: str, status: int, line: str | None
) -> None:
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    with run_process(server, *arguments.split(), shell=shell) as process:
        _, error = process.communicate(timeout=20)
    assert process.returncode == status
    assert error == ("" if line is None else f"adapterctl: {line}\n")
    if redirection.startswith(">&-"):  # Nothing was done whose outcome nobody would see.
        assert server.requests == []


def test_a_process_that_fails_prints_one_line(server: FakeServer) -> None:
    server.answers["GetMix"] = Failure(Code.INTERNAL, "internal error", "INTERNAL")
    with run_process(server, "mix") as process:
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (1, "", "adapterctl: internal error\n")


def test_a_terminal_that_cannot_write_a_character(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    server.answers["GenerateStream"] = [inference_pb2.GenerateStreamResponse(text="5 €")]
    with run_process(server, "generate", "x") as process:
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out, error) == (0, "5 ?\n", "")


def on_a_terminal(server: FakeServer, *arguments: str, term: str = "dumb") -> str:
    """What a terminal gets."""
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    environment = {
        **os.environ,
        "SUPERPOSE_SERVER": server.address,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TERM": term,
        "COLUMNS": "120",
    }
    command = [sys.executable, "-m", "superpose_client.cli", *arguments]
    subprocess.run(
        command, stdout=terminal, stderr=terminal, env=environment, check=True, timeout=30
    )
    os.close(terminal)
    shown = os.read(controller, 10_000).decode().replace("\r\n", "\n")
    os.close(controller)
    return shown


def test_a_terminal_is_told_the_mix_and_spared_control_characters(server: FakeServer) -> None:
    usage = inference_pb2.Usage(prompt_tokens=9, completion_tokens=3)
    server.answers["GenerateStream"] = [
        inference_pb2.GenerateStreamResponse(text="5\x1b[2J.\n", usage=usage, mix=state())
    ]
    shown = on_a_terminal(server, "generate", "x")
    assert shown.startswith("5[2J.\n\n[9 + 3 tokens, ")
    assert "mix math=1,medicine=0.5" in shown


def test_a_long_score_tells_a_terminal_how_far_it_is(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("one\n" * 600)
    arguments = ("score", str(tmp_path / "texts"))
    raw = on_a_terminal(server, *arguments, term="xterm")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    assert "600/600 texts" in shown
    assert re.search(r"texts +600 *\n", shown)
    # Nothing of it is left on the screen.
    assert raw.index("600/600") < raw.rindex("\x1b[2K") < raw.index("perplexity")
    assert "600/600" not in on_a_terminal(server, *arguments)
