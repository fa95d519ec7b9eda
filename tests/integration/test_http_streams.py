"""Who goes away, reads slowly or comes too late: over HTTP as over gRPC."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    Step,
    held,
    start,
    wait_until,
)
from tests.integration.http_client import JSON, Answer, Http

from superpose_server.engine.sequence import FinishReason

TOKENS = 900
BATCH = 4


@pytest.fixture
def served(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Iterator[Served]:
    """A server where four rows may run and one may wait."""
    server = start(
        loop, gpt2.base, tmp_path / "state", http_listen="127.0.0.1:0", max_batch=4, max_queue=1
    )
    yield server
    server.stop()


@pytest.fixture
def http(served: Served) -> Http:
    return Http(served.server.http_address)


def fields(**more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def complete(http: Http, **more: Any) -> Answer:
    return http.ask("POST", "/v1/completions", fields(**more))


def begin(http: Http, **more: Any) -> HTTPConnection:
    """Send a request, and read nothing of its answer."""
    connection = http.connect()
    connection.request("POST", "/v1/completions", json.dumps(fields(**more)), JSON)
    return connection


def tokens(events: list[Any]) -> list[int]:
    return [i for event in events for choice in event["choices"] for i in choice["token_ids"]]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_row_leaves_at_the_next_step_after_its_client(
    served: Served, http: Http, stream: bool
) -> None:
    reached, let_go = threading.Event(), threading.Event()
    steps_after: list[Step] = []

    def gate(step: Step) -> None:
        """Hold the engine in the midst of a text, until its client is gone."""
        if let_go.is_set():
            steps_after.append(step)
        elif len(step.rows[0].tokens) >= 10:
            reached.set()
            assert let_go.wait(PATIENCE)

    served.recorder.gate = gate
    try:
        with closing(begin(http, stream=stream)):
            assert reached.wait(PATIENCE)
        (row,) = served.recorder.steps[-1].rows
        wait_until(lambda: row.cancelled, "the server knows that the client is gone")
    finally:
        let_go.set()
    served.recorder.wait_for(lambda: bool(served.recorder.ends))
    assert served.recorder.ends[0].reason is FinishReason.ABORTED
    assert steps_after == []


def test_a_client_that_goes_while_its_prompt_is_scored_lets_its_row_go(
    served: Served, http: Http
) -> None:
    with held(served.recorder):
        with closing(begin(http, echo=True, logprobs=1)):
            row = served.recorder.submitted.get(timeout=PATIENCE)
        wait_until(lambda: row.cancelled, "the server knows that the client is gone")


def narrow(connection: Any, buffer: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, buffer, 1)


def test_who_does_not_read_holds_up_nobody_and_loses_nothing(served: Served, http: Http) -> None:
    with held(served.recorder) as reads_on:
        slow = begin(http, stream=True)
        served.recorder.submitted.get(timeout=PATIENCE)
        # What a socket and its buffers hold is the whole of a text, unless they are small.
        door: Any = served.server._http
        (sender,) = door._server.server_state.connections
        sender.transport.set_write_buffer_limits(0)
        narrow(sender.transport.get_extra_info("socket"), socket.SO_SNDBUF)
        narrow(slow.sock, socket.SO_RCVBUF)
        reads_on.set()
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(complete, http, stream=True)
            whole = pool.submit(complete, http).result(PATIENCE)
        served.recorder.wait_for(lambda: len(served.recorder.ends) == 3)
    assert {end.reason for end in served.recorder.ends} == {FinishReason.LENGTH}
    (choice,) = whole.json["choices"]
    with closing(slow):
        late = slow.getresponse().read()
    *events, end, empty = late.split(b"\n\n")
    assert (end, empty) == (b"data: [DONE]", b"")
    assert len(events) < TOKENS / 2  # What piled up came together.
    found = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert tokens(found) == tokens(stream.result().events) == choice["token_ids"]
    assert "".join(event["choices"][0]["text"] for event in found) == choice["text"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_error_comes_behind_the_text_that_was_made_before_it(
    served: Served, http: Http, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(step: Step) -> None:
        (row,) = step.rows
        if len(row.tokens) == 50:
            monkeypatch.setattr(row, "append", broken)

    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    served.recorder.gate = gate
    with closing(begin(http, stream=stream)) as connection:
        response = connection.getresponse()
        text = response.read()
    assert response.status == (200 if stream else 500)
    *events, last, _ = text.split(b"\n\n") if stream else (text, b"")
    told = json.loads(last.removeprefix(b"data: "))["error"]
    assert (told["code"], told["message"]) == ("INTERNAL", "internal error")
    assert b"secret" not in text
    assert b"[DONE]" not in text
    if stream:
        found = [json.loads(event.removeprefix(b"data: ")) for event in events]
        served.recorder.gate = lambda step: None
        assert tuple(tokens(found)) == served.greedy(tokens=50)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_text_that_fails_ends_the_others_of_its_request(
    served: Served, http: Http, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    def gate(step: Step) -> None:
        if len(step.rows) == 2:
            monkeypatch.setattr(step.rows[0], "append", broken)

    served.recorder.gate = gate
    with closing(begin(http, prompt=["a", "b"], stream=stream)) as connection:
        assert b'"INTERNAL"' in connection.getresponse().read()
    served.recorder.wait_for(lambda: len(served.recorder.ends) == 2)
    failed, other = (end.reason for end in served.recorder.ends)
    assert isinstance(failed, Exception)
    assert other is FinishReason.ABORTED


def test_when_all_places_are_taken_a_client_is_told_when_to_come_again(
    served: Served, http: Http
) -> None:
    with ThreadPoolExecutor(BATCH) as pool, held(served.recorder):
        running = [pool.submit(complete, http, max_tokens=5) for _ in range(BATCH)]
        for _ in running:
            served.recorder.submitted.get(timeout=PATIENCE)
        # One of the two could wait. Both or none.
        refused = complete(http, prompt=["a", "b"])
        assert refused.outcome == (429, "QUEUE_FULL")
        assert int(refused.headers["retry-after"]) >= 1
        assert served.recorder.submitted.get(timeout=PATIENCE).cancelled
    assert [each.result().status for each in running] == [200] * BATCH
    refused = complete(http, prompt=["a"] * (BATCH + 2))
    assert refused.outcome == (400, "BAD_ITEM_COUNT")


def test_what_runs_ends_whole_and_what_is_new_is_refused_while_the_server_ends(
    served: Served, http: Http
) -> None:
    assert http.document  # Answers are held against it, and the last ones come at the very end.
    with ThreadPoolExecutor(3) as pool, held(served.recorder) as let_go:
        running = [pool.submit(complete, http, max_tokens=9, stream=each) for each in (True, False)]
        for _ in running:
            served.recorder.submitted.get(timeout=PATIENCE)
        ending = pool.submit(served.stop, PATIENCE)
        wait_until(served.runtime.ending.is_set, "the server ends")
        refused = complete(http)
        assert refused.outcome == (503, "SHUTTING_DOWN")
        let_go.set()
        stream, whole = (each.result(PATIENCE) for each in running)
        ending.result(PATIENCE)
    (choice,) = whole.json["choices"]
    assert choice["finish_reason"] == "length"
    assert tokens(stream.events) == choice["token_ids"]


def test_a_text_that_the_server_ends_early_says_so(served: Served, http: Http) -> None:
    assert http.document  # As above.
    both_sent, both_run, let_go = threading.Event(), threading.Event(), threading.Event()

    def gate(step: Step) -> None:
        assert both_sent.wait(PATIENCE)  # Else the first may have ended before the second begins.
        if len(step.rows) == 2:
            both_run.set()
            assert let_go.wait(PATIENCE)

    served.recorder.gate = gate
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(complete, http, stream=each) for each in (True, False)]
        for _ in running:
            served.recorder.submitted.get(timeout=PATIENCE)
        both_sent.set()
        assert both_run.wait(PATIENCE)
        ending = pool.submit(served.stop)
        wait_until(served.runtime.ending.is_set, "the server ends")
        let_go.set()
        stream, whole = (each.result(PATIENCE) for each in running)
        ending.result(PATIENCE)
    (choice,) = whole.json["choices"]
    assert choice["finish_reason"] == "abort"
    assert len(choice["token_ids"]) < TOKENS
    assert stream.events[-1]["choices"][0]["finish_reason"] == "abort"


def test_nothing_is_served_from_damaged_weights(served: Served, http: Http) -> None:
    served.weights.intact = False
    assert complete(http).outcome == (500, "WEIGHTS_DAMAGED")
    assert http.ask("GET", "/v1/models").status == 200
