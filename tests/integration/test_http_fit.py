"""Fits over HTTP are those over gRPC, and end with their clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pytest
from tests.integration.harness import PATIENCE, Family, LoopThread, Served, start, wait_until
from tests.integration.http_client import JSON, Http
from tests.makers import make_adapter

ROWS = [(f"why {name}?", f"because of {name[::-1]}") for name in ("sum", "fold", "mix", "row")]
ITEMS = [{"question_answer": {"question": q, "answer": a}} for q, a in ROWS]


@pytest.fixture(scope="module")
def served(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fit")
    server = start(loop, gpt2.base, folder / "state", http_listen="127.0.0.1:0")
    gpt2.push_all(server.client)
    server.client.push("huge", make_adapter(gpt2.model, folder / "huge", 9, size=1e30))
    yield server
    server.stop()


@pytest.fixture
def http(served: Served) -> Http:
    return Http(served.server.http_address)


def test_a_fit_is_that_of_grpc(served: Served, http: Http) -> None:
    before = served.client.mix()
    options: dict[str, Any] = {
        "budget": 9,
        "scope": "answer",
        "max_length": 60,
        "low": -0.5,
        "high": 1.5,
    }
    options |= {"penalty": 0.02, "seed": 3, "sources": [0, 0, 0, 1]}
    answer = http.ask("POST", "/v1/mix/fit", {"items": ITEMS, "domains": ["b", "a"], **options})
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    over_grpc = [asdict(each) for each in served.client.fit(ROWS, ["b", "a"], **options)]
    # One held-out row has no interval: NaN, which JSON has no number for.
    expected = json.loads(json.dumps(over_grpc), parse_constant=lambda _: None)
    assert answer.events == expected
    assert [event["result"] is None for event in answer.events] == [True] * 3 + [False]
    assert served.client.mix() == before


def test_defaults_are_those_of_grpc(served: Served, http: Http) -> None:
    *_, last = http.ask("POST", "/v1/mix/fit", {"items": ITEMS, "domains": ["a"]}).events
    *_, update = served.client.fit(ROWS, ["a"])
    assert update.result is not None
    assert last["result"]["weights"] == [asdict(each) for each in update.result.weights]
    assert last["result"]["evaluations"] == update.result.evaluations


REFUSED: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "no items": ({"items": []}, (400, "BAD_ITEM_COUNT")),
    "too many items": ({"items": ITEMS * 65}, (400, "BAD_ITEM_COUNT")),
    "one row": ({"items": ITEMS[:1]}, (400, "TOO_FEW_ROWS")),
    "an item of two kinds": ({"items": [{"text": "a", "token_ids": [1]}]}, (400, "INVALID_FIELD")),
    "no answer": ({"items": [{"text": "a"}] * 2, "scope": "answer"}, (400, "BAD_SCOPE")),
    "no domains": ({"domains": []}, (400, "BAD_DOMAIN_COUNT")),
    "a domain twice": ({"domains": ["a", "a"]}, (400, "DOMAIN_TWICE")),
    "an unknown domain": ({"domains": ["nobody"]}, (404, "DOMAIN_NOT_FOUND")),
    "bounds the wrong way": ({"low": 1, "high": 0}, (400, "BAD_BOUNDS")),
    "a bound beyond all": ({"high": 1e6}, (400, "BAD_BOUNDS")),
    "a negative penalty": ({"penalty": -1}, (400, "BAD_PENALTY")),
    "a budget beyond all": ({"budget": 513}, (400, "BAD_BUDGET")),
    "sources of other items": ({"sources": [0]}, (400, "BAD_SOURCES")),
    "an unknown field": ({"set": True}, (400, "UNKNOWN_FIELD")),
    "an infinite loss": (
        {"domains": ["huge"], "low": -1e4, "high": 1e4},
        (409, "OUTPUT_NOT_FINITE"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_the_first_event_has_its_status(http: Http, name: str) -> None:
    asked, outcome = REFUSED[name]
    answer = http.ask("POST", "/v1/mix/fit", {"items": ITEMS, "domains": ["a"], **asked})
    assert answer.outcome == outcome


def test_a_fit_ends_with_its_client_and_another_may_begin(served: Served, http: Http) -> None:
    long = {"items": ITEMS, "domains": ["a", "b", "c"], "budget": 512, "penalty": 0}
    with closing(http.connect()) as connection:
        connection.request("POST", "/v1/mix/fit", json.dumps(long), JSON)
        assert b"progress" in connection.getresponse().readline()
        busy = http.ask("POST", "/v1/mix/fit", {"items": ITEMS, "domains": ["a"]})
        assert busy.outcome == (429, "FIT_RUNNING")
        assert int(busy.headers["retry-after"]) >= 1

    def another() -> bool:
        asked = {"items": ITEMS, "domains": ["a"], "budget": 2}
        return http.ask("POST", "/v1/mix/fit", asked).status == 200

    wait_until(another, "the fit that nobody waits for has ended")
    engine = served.runtime.local
    with engine._wake:
        assert engine._wake.wait_for(engine._idle, PATIENCE), "a score runs on"


def test_a_fit_that_fails_on_the_way_says_so_in_its_last_event(served: Served, http: Http) -> None:
    long = {"items": ITEMS, "domains": ["a", "b", "c"], "budget": 512, "penalty": 0}
    with closing(http.connect()) as connection:
        connection.request("POST", "/v1/mix/fit", json.dumps(long), JSON)
        stream = connection.getresponse()
        assert b"progress" in stream.readline()
        served.weights.intact = False
        try:
            _, _, last = stream.read().rpartition(b"data: ")
        finally:
            served.weights.intact = True
    assert json.loads(last)["error"]["code"] == "WEIGHTS_DAMAGED"
