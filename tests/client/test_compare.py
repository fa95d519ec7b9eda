import json
import re
import threading
from typing import Any

import grpc
import pytest
from tests.client.adapterctl import Ctl, one_line, printed
from tests.client.fake_server import (
    DEFAULT,
    Failure,
    FakeServer,
    Hang,
    chunks,
    digest_of,
    state,
    weights_of,
)
from tests.client.terminal import Terminal

from superpose_proto.v1 import inference_pb2

MATH_OR_BASE = ("compare", "x", "--mix", "math", "--mix", "base")


def by_mix(answers: dict[str, Any]) -> Any:
    """An answer of its own for each mix: by its first domain, or `base`."""
    return lambda request: answers[next(iter(weights_of(request.mix)), "base")]


def said(text: str, **fields: Any) -> inference_pb2.GenerateStreamResponse:
    return inference_pb2.GenerateStreamResponse(text=text, **fields)


def the_end(reason: Any = inference_pb2.FINISH_REASON_STOP) -> Any:
    usage = inference_pb2.Usage(prompt_tokens=9, completion_tokens=3)
    return said("", finish_reason=reason, usage=usage, mix=state())


def test_a_pipe_gets_one_text_behind_the_other(ctl: Ctl, server: FakeServer) -> None:
    server.answers["GenerateStream"] = by_mix(
        {"math": [said("One"), said(" two."), the_end()], "base": [said("Three."), the_end()]}
    )
    result = ctl(*MATH_OR_BASE)
    assert result.stdout == "==> math <==\nOne two.\n\n==> base <==\nThree.\n"
    assert result.stderr == ""
    assert {request.prompt for request in server.requests} == {"x"}
    assert all(request.HasField("mix") for request in server.requests)
    asked = sorted(list(weights_of(request.mix).items()) for request in server.requests)
    assert asked == [[], [("math", 1.0)]]


def test_only_the_mix_differs(ctl: Ctl, server: FakeServer) -> None:
    seeds = set()
    for _ in range(2):
        server.requests.clear()
        ctl(*MATH_OR_BASE, "--mix", "default", "--temperature", "0.5")
        one, other, third = (request.options for request in server.requests)
        assert one == other == third
        assert (one.HasField("seed"), one.temperature) == (True, 0.5)
        seeds.add(one.seed)
    assert len(seeds) == 2
    server.requests.clear()
    ctl(*MATH_OR_BASE, "--seed", "7", "--max-new-tokens", "9", "--stop", "a")
    assert all(
        request.options
        == inference_pb2.GenerateOptions(seed=7, max_new_tokens=9, stop=["a"], temperature=0)
        for request in server.requests
    )


def test_json_is_one_object(ctl: Ctl) -> None:
    made = printed(
        ctl("compare", "x", "--mix", "math", "--mix", "default", "--seed", "5", "--json")
    )
    assert made["seed"] == 5
    one, other = made["texts"]
    assert one == {
        "text": "The sum is 5.",
        "token_ids": [464, 2160, 318],
        "finish_reason": "FINISH_REASON_LENGTH",
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
        "mix": one["mix"],
        "logprobs": [],
        "top_logprobs": [],
        "request_id": "r-1",
    }
    assert one["mix"]["digest"] == digest_of({"math": 1.0})
    assert other["mix"]["digest"] == digest_of(DEFAULT)


def test_the_texts_are_made_at_once(ctl: Ctl, server: FakeServer) -> None:
    all_there = threading.Barrier(3)

    def answer(request: Any) -> Any:
        all_there.wait(20)
        return chunks(request)

    server.answers["GenerateStream"] = answer
    assert ctl(*MATH_OR_BASE, "--mix", "default").exit_code == 0


def test_a_prompt_from_standard_input(ctl: Ctl, server: FakeServer) -> None:
    ctl("compare", "-", "--mix", "math", "--mix", "base", stdin="two\nlines\n")
    assert [request.prompt for request in server.requests] == ["two\nlines"] * 2


@pytest.mark.parametrize(
    "options", [[], ["--mix", "base"], ["--mix", "a", "--mix", "b", "--logprobs"]]
)
def test_wrong_usage(ctl: Ctl, server: FakeServer, options: list[str]) -> None:
    result = ctl("compare", "x", *options)
    assert result.exit_code == 2
    assert ("--logprobs" if "--logprobs" in options else "--mix") in result.stderr
    assert server.requests == []


def test_a_mix_that_is_none_is_found_before_anything_is_asked(ctl: Ctl, server: FakeServer) -> None:
    assert "mix 'math='" in one_line(ctl("compare", "x", "--mix", "base", "--mix", "math="), 2)
    assert server.requests == []


def test_the_failure_of_one_text_ends_all(ctl: Ctl, server: FakeServer) -> None:
    began = threading.Event()

    def base() -> Any:
        began.set()
        return [said("Three"), Hang()]

    def math() -> Any:
        assert began.wait(20)
        return Failure(grpc.StatusCode.NOT_FOUND, "no adapter is loaded as 'math'", "R")

    server.answers["GenerateStream"] = lambda request: math() if weights_of(request.mix) else base()
    result = ctl(*MATH_OR_BASE)
    assert one_line(result) == "no adapter is loaded as 'math'"
    assert result.stdout == ""
    assert server.cancelled.wait(10)


@pytest.mark.parametrize("end", [[the_end(inference_pb2.FINISH_REASON_ABORTED)], []])
def test_a_text_that_ends_early_fails(ctl: Ctl, server: FakeServer, end: list[Any]) -> None:
    server.answers["GenerateStream"] = by_mix(
        {"math": [said("One"), *end], "base": [said("Two"), the_end()]}
    )
    result = ctl(*MATH_OR_BASE)
    assert one_line(result) == "the server ended the text before its end"
    assert result.stdout == "==> math <==\nOne\n\n==> base <==\nTwo\n"


def growing(server: FakeServer) -> None:
    """A text that ends, and one that goes on until it is cancelled."""
    server.answers["GenerateStream"] = by_mix(
        {"math": [said("a man or a dog"), the_end()], "base": [said("a man and a "), Hang()]}
    )


def test_a_terminal_shows_the_texts_while_they_grow(server: FakeServer) -> None:
    growing(server)
    with Terminal(server, *MATH_OR_BASE) as terminal:
        terminal.see("a man and a")
        terminal.see("[9 + 3 tokens, stop")
        frames = terminal.shown.count("a man or") + terminal.shown.count("a man \x1b[1;33mor")
        assert frames >= 1
        terminal.interrupt()
        assert terminal.end() == 130
    assert server.cancelled.wait(10)
    # What there was stays on the screen.
    last = terminal.plain.rindex("math ")
    assert re.match(r"math +base\s*\na man or a dog +a man and a\s", terminal.plain[last:])
    assert "Traceback" not in terminal.plain


@pytest.mark.parametrize("width", [80, 30])
def test_a_terminal_keeps_the_whole_texts(server: FakeServer, width: int) -> None:
    lines = [f"line{i}\n" for i in range(60)]
    server.answers["GenerateStream"] = [*map(said, lines), the_end()]
    options = ("--temperature", "1", "--seed", "77")
    with Terminal(server, *MATH_OR_BASE, *options, columns=width, lines=10) as terminal:
        assert terminal.end() == 0
    # The last screen begins with the first heading; no later one wipes any of it away.
    _, _, last = terminal.shown.rpartition("\x1b[2K")
    for line in lines:
        assert last.count(line.strip()) >= 2
    assert "[seed 77]" in last


def test_no_color_leaves_bold(server: FakeServer) -> None:
    server.answers["GenerateStream"] = by_mix(
        {"math": [said("one two"), the_end()], "base": [said("one three"), the_end()]}
    )
    with Terminal(server, *MATH_OR_BASE, NO_COLOR="1") as terminal:
        assert terminal.end() == 0
    assert "one \x1b[1mtwo\x1b[0m" in terminal.shown
    assert "one \x1b[1mthree\x1b[0m" in terminal.shown


def test_a_terminal_keeps_no_empty_columns(server: FakeServer) -> None:
    server.answers["GenerateStream"] = Failure(grpc.StatusCode.NOT_FOUND, "no adapter", "R")
    with Terminal(server, *MATH_OR_BASE) as terminal:
        assert terminal.end() == 1
    _, _, last = terminal.shown.rpartition("\x1b[2K")
    assert "base" not in last
    assert "adapterctl: no adapter" in last


def test_json_on_a_terminal_draws_nothing(server: FakeServer) -> None:
    with Terminal(server, *MATH_OR_BASE, "--json") as terminal:
        assert terminal.end() == 0
    assert len(json.loads(terminal.shown)["texts"]) == 2
