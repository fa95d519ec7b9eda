"""What operators do over HTTP: the same as over gRPC, to the name of a field and of a reason."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from tests.integration.harness import Family, LoopThread, Served, start, wait_until
from tests.integration.http_client import Answer, Http

from superpose_client import CallError
from superpose_server.door.http.page import page_routes

MAX_MIB = 1
LIMIT = (MAX_MIB + 16) << 20  # of an upload, as of a message of gRPC


@pytest.fixture(scope="module")
def server(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("control") / "state",
        http_listen="127.0.0.1:0",
        max_adapter_mib=MAX_MIB,
    )
    gpt2.push_all(served.client)
    yield served
    served.stop()


@pytest.fixture
def served(server: Served) -> Served:
    """The server with a=1 as the default mix."""
    server.client.set("a")
    return server


@pytest.fixture
def http(served: Served) -> Http:
    return Http(served.server.http_address)


def told(value: Any) -> Any:
    """Return what a client's dataclass holds, as JSON would."""
    return json.loads(json.dumps(asdict(value)))


# The default mix.


def test_the_default_mix_is_read_and_set(served: Served, http: Http) -> None:
    before = served.client.mix().generation
    answer = http.ask("PUT", "/v1/mix", {"mix": {"b": 0.5, "a": -1}})
    now = served.client.mix()
    assert now.weights == {"a": -1.0, "b": 0.5}
    assert now.generation == before + 1
    state = {key: told(now)[key] for key in ("generation", "digest", "entries")}
    assert answer.json == {"mix": state}
    read = http.ask("GET", "/v1/mix")
    assert read.json == {"mix": state, "resident": told(now)["resident"]}
    assert answer.headers["etag"] == read.headers["etag"] == f'"{now.generation}"'
    again = http.ask("PUT", "/v1/mix", {"mix": {"a": -1, "b": 0.5}})
    assert again.json == answer.json


def test_the_empty_mix_is_the_base(served: Served, http: Http) -> None:
    assert http.ask("PUT", "/v1/mix", {"mix": {}}).json["mix"]["entries"] == []
    assert served.client.mix().weights == {}


def test_domains_are_added_and_removed(served: Served, http: Http) -> None:
    added = http.ask("POST", "/v1/mix/add", {"domain": "b"})
    assert served.client.mix().weights == {"a": 1.0, "b": 1.0}
    http.ask("POST", "/v1/mix/add", {"domain": "c", "weight": -0.25})
    removed = http.ask("POST", "/v1/mix/remove", {"domain": "a"})
    now = served.client.mix()
    assert now.weights == {"b": 1.0, "c": -0.25}
    assert removed.json["mix"]["digest"] == now.digest
    assert int(added.headers["etag"].strip('"')) == now.generation - 2


CHANGES = {
    "set": ("PUT", "/v1/mix", {"mix": {"b": 1}}),
    "add": ("POST", "/v1/mix/add", {"domain": "b"}),
    "remove": ("POST", "/v1/mix/remove", {"domain": "a"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_may_name_the_generation_that_it_was_decided_on(
    served: Served, http: Http, change: str
) -> None:
    method, path, value = CHANGES[change]
    before = served.client.mix()
    stale = {"If-Match": f'"{before.generation - 1}"'}
    refused = http.ask(method, path, value, headers=stale)
    assert refused.outcome == (412, "GENERATION_MISMATCH")
    assert refused.json["error"]["metadata"] == {
        "generation": str(before.generation),
        "digest": before.digest,
    }
    assert served.client.mix() == before
    current = http.ask("GET", "/v1/mix").headers["etag"]
    assert http.ask(method, path, value, headers={"If-Match": current}).status == 200
    assert served.client.mix().generation == before.generation + 1


def test_any_state_matches_a_star(served: Served, http: Http) -> None:
    assert http.ask("PUT", "/v1/mix", {"mix": {"b": 1}}, headers={"If-Match": "*"}).status == 200


@pytest.mark.parametrize("value", ["3", 'W/"3"', '"3", "4"', '"x"', '"-1"', '"' + "9" * 40 + '"'])
def test_other_conditions_are_refused(served: Served, http: Http, value: str) -> None:
    before = served.client.mix()
    answer = http.ask("PUT", "/v1/mix", {"mix": {"b": 1}}, headers={"If-Match": value})
    assert answer.outcome == (400, "BAD_IF_MATCH")
    assert served.client.mix() == before


def test_two_conditions_are_refused(served: Served, http: Http) -> None:
    """The second would be passed over, and it is the one that fails."""
    before = served.client.mix()
    with closing(http.connect()) as connection:
        connection.putrequest("PUT", "/v1/mix")
        for name, value in (
            ("Content-Type", "application/json"),
            ("Content-Length", "17"),
            ("If-Match", "*"),
            ("If-Match", f'"{before.generation - 1}"'),
        ):
            connection.putheader(name, value)
        connection.endheaders(b'{"mix": {"b": 1}}')
        answer = connection.getresponse()
        assert answer.status == 400
        assert json.loads(answer.read())["error"]["code"] == "HEADER_REPEATED"
    assert served.client.mix() == before


def test_a_condition_is_refused_where_it_means_nothing(http: Http) -> None:
    answer = http.ask("DELETE", "/v1/adapters/b", headers={"If-Match": '"1"'})
    assert answer.outcome == (400, "IF_MATCH_NOT_SUPPORTED")
    assert http.ask("GET", "/v1/adapters/b").status == 200


SAME_ERRORS: dict[str, tuple[int, Callable[[Served], Any], tuple[str, str, Any]]] = {
    "an unknown domain": (
        404,
        lambda s: s.client.set({"nobody": 1}),
        ("PUT", "/v1/mix", {"mix": {"nobody": 1}}),
    ),
    "a domain that is there": (
        409,
        lambda s: s.client.add("a"),
        ("POST", "/v1/mix/add", {"domain": "a"}),
    ),
    "a weight of 0": (
        400,
        lambda s: s.client.add("b", 0),
        ("POST", "/v1/mix/add", {"domain": "b", "weight": 0}),
    ),
    "a domain that is not there": (
        404,
        lambda s: s.client.remove("b"),
        ("POST", "/v1/mix/remove", {"domain": "b"}),
    ),
    "an adapter in use": (
        409,
        lambda s: s.client.delete("a"),
        ("DELETE", "/v1/adapters/a", None),
    ),
    "an unknown adapter": (
        404,
        lambda s: s.client.adapter("nobody"),
        ("GET", "/v1/adapters/nobody", None),
    ),
    "an unknown named mix": (
        404,
        lambda s: s.client.unname_mix("nobody"),
        ("DELETE", "/v1/mix/names/nobody", None),
    ),
    "a name that a domain has": (
        409,
        lambda s: s.client.name_mix("a", "b"),
        ("PUT", "/v1/mix/names/a", {"mix": {"b": 1}}),
    ),
    "a merge of nothing": (
        400,
        lambda s: s.client.merge("x", "base", method="sum"),
        ("POST", "/v1/adapters/x/merge", {"mix": {}, "method": "sum"}),
    ),
    "a merge by no method": (
        400,
        lambda s: s.client.merge("x", "a,b", method="magic"),
        ("POST", "/v1/adapters/x/merge", {"mix": {"a": 1, "b": 1}, "method": "magic"}),
    ),
    "a merge of an unknown domain": (
        404,
        lambda s: s.client.merge("x", "nobody", method="sum"),
        ("POST", "/v1/adapters/x/merge", {"mix": {"nobody": 1}, "method": "sum"}),
    ),
    "a merge in the place of an adapter": (
        409,
        lambda s: s.client.merge("c", "a,b", method="sum"),
        ("POST", "/v1/adapters/c/merge", {"mix": {"a": 1, "b": 1}, "method": "sum"}),
    ),
}


@pytest.mark.parametrize("name", SAME_ERRORS)
def test_errors_are_those_of_grpc(served: Served, http: Http, name: str) -> None:
    status, call, (method, path, value) = SAME_ERRORS[name]
    with pytest.raises(CallError) as caught:
        call(served)
    answer = http.ask(method, path, value)
    assert answer.outcome == (status, caught.value.reason)
    assert answer.json["error"]["message"] == caught.value.message


# Questions, and names.


def test_an_analysis_is_that_of_grpc(served: Served, http: Http) -> None:
    mix = {"a": 1.0, "b": -0.5}
    answer = http.ask("POST", "/v1/mix/analyze", {"mix": mix}).json
    expected = told(served.client.analyze(mix))
    for analysis in (answer, expected):
        assert analysis.pop("longest_stall_seconds") >= 0
    assert answer == expected
    assert http.ask("POST", "/v1/mix/analyze", {}).json["mix"] == answer["mix"] | {
        key: told(served.client.mix())[key] for key in ("digest", "entries")
    }


def test_a_verification_is_that_of_grpc(served: Served, http: Http) -> None:
    answer = http.ask("POST", "/v1/mix/verify", {}).json
    expected = told(served.client.verify())
    for found in (answer, expected):
        assert found.pop("longest_stall_seconds") >= 0
    assert answer == expected
    assert answer["ok"] is True


def test_mixes_are_named_listed_used_and_unnamed(served: Served, http: Http) -> None:
    answer = http.ask("PUT", "/v1/mix/names/qa", {"mix": {"b": 0.5, "a": 1}})
    entries = [{"domain": "a", "weight": 1.0}, {"domain": "b", "weight": 0.5}]
    named = {"name": "qa", "entries": entries}
    assert answer.json == {"named_mix": named}
    http.ask("PUT", "/v1/mix/names/now", {})  # the default mix
    listed = http.ask("GET", "/v1/mix/names").json["named_mixes"]
    assert listed == [{"name": "now", "entries": entries[:1]}, named]
    http.ask("PUT", "/v1/mix", {"mix": {"qa": 2}})
    assert served.client.mix().weights == {"a": 2.0, "b": 1.0}
    for name in ("qa", "now"):
        assert http.ask("DELETE", f"/v1/mix/names/{name}").json == {}
    assert http.ask("GET", "/v1/mix/names").json == {"named_mixes": []}


def test_the_server_tells_what_it_tells_over_grpc(served: Served, http: Http) -> None:
    answer = http.ask("GET", "/v1/server").json
    expected = told(served.client.info())
    assert answer.pop("uptime_seconds") <= expected.pop("uptime_seconds")
    assert answer == expected


# Watching.


def read_event(stream: HTTPResponse) -> dict[str, Any]:
    """Return the next event: its fields, `data` read as JSON."""
    fields: dict[str, Any] = {}
    while line := stream.readline().decode().rstrip("\n"):
        name, _, value = line.partition(": ")
        fields[name] = value
    fields["data"] = json.loads(fields["data"])
    return fields


def test_a_watcher_sees_the_current_mix_and_every_change(served: Served, http: Http) -> None:
    with closing(http.connect()) as connection:
        connection.request("GET", "/v1/mix/events")
        stream = connection.getresponse()
        assert stream.headers["content-type"].partition(";")[0] == "text/event-stream"
        first = read_event(stream)
        assert first["data"]["mix"]["entries"] == told(served.client.mix())["entries"]
        for weight in (2.0, 3.0):
            served.client.set({"a": weight})
            event = read_event(stream)
            assert event["data"] == {"mix": state_of(served)}
            assert event["id"] == str(served.client.mix().generation)
    served.client.set("b")  # Nobody reads it: this tells the server that the watcher is gone.
    wait_until(lambda: len(served.runtime.default_mix._watchers) == 1, "the watch has ended")


def test_a_watcher_that_does_not_read_is_ended_and_holds_up_nobody(
    served: Served, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpose_server.control.watch._MAX_BEHIND", 2)
    door: Any = served.server._http
    with closing(http.connect()) as connection:
        connection.request("GET", "/v1/mix/events")
        stream = connection.getresponse()
        read_event(stream)
        # What a socket and its buffers hold is many changes, unless they are small.
        (sender,) = door._server.server_state.connections
        sender.transport.set_write_buffer_limits(0)
        narrow(sender.transport.get_extra_info("socket"), socket.SO_SNDBUF)
        narrow(connection.sock, socket.SO_RCVBUF)
        for weight in range(1, 80):
            served.client.set({"b": weight})
        *_, end, empty = stream.read().split(b"\n\n")
    assert empty == b""
    error = json.loads(end.removeprefix(b"data: "))["error"]
    assert error["code"] == "WATCH_BEHIND"
    wait_until(lambda: len(served.runtime.default_mix._watchers) == 1, "the watch has ended")


def narrow(connection: Any, buffer: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, buffer, 1)


def state_of(served: Served) -> Any:
    return {key: told(served.client.mix())[key] for key in ("generation", "digest", "entries")}


# Adapters.


def form(*parts: tuple[str, bytes], file: bool = True) -> tuple[bytes, dict[str, str]]:
    """Return a multipart body and its headers."""
    body = b"".join(
        b'--cut\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="x"' if file else b"", content)
        for name, content in parts
    )
    return body + b"--cut--\r\n", {"Content-Type": "multipart/form-data; boundary=cut"}


def files(folder: Path) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    config, tensors = "adapter_config.json", "adapter_model.safetensors"
    return (config, (folder / config).read_bytes()), (tensors, (folder / tensors).read_bytes())


def push(http: Http, path: str, *parts: tuple[str, bytes], file: bool = True) -> Answer:
    body, headers = form(*parts, file=file)
    return http.ask("PUT", path, body=body, headers=headers)


def test_adapters_are_told_as_over_grpc(served: Served, http: Http) -> None:
    listed = http.ask("GET", "/v1/adapters").json
    assert listed == {"adapters": [told(adapter) for adapter in served.client.adapters()]}
    one = http.ask("GET", "/v1/adapters/a").json
    assert one == {"adapter": told(served.client.adapter("a"))}
    assert one["adapter"]["modules"]


def test_adapters_are_pushed_replaced_and_deleted(served: Served, http: Http, gpt2: Family) -> None:
    pushed = push(http, "/v1/adapters/new", *files(gpt2.adapters["a"]))
    assert pushed.json["adapter"] == told(served.client.adapter("new"))
    assert pushed.json["adapter"]["digest"] == served.client.adapter("a").digest
    assert push(http, "/v1/adapters/new", *files(gpt2.adapters["a"])).json == pushed.json
    other = files(gpt2.adapters["a2"])
    assert push(http, "/v1/adapters/new", *other).outcome == (409, "ADAPTER_EXISTS")
    refused = push(http, "/v1/adapters/new?replace=false", *other)
    assert refused.outcome == (409, "ADAPTER_EXISTS")
    served.client.set({"new": 1})
    generation = served.client.mix().generation
    replaced = push(http, "/v1/adapters/new?replace=true", *other).json
    assert replaced["generation"] == generation + 1
    assert replaced["adapter"]["digest"] == served.client.mix().entries[0].adapter_digest
    served.client.set("a")
    assert http.ask("DELETE", "/v1/adapters/new").json == {}
    assert http.ask("GET", "/v1/adapters/new").outcome == (404, "DOMAIN_NOT_FOUND")


def test_adapters_are_merged_as_over_grpc(served: Served, http: Http) -> None:
    asked = {"mix": {"a": 1, "b": -0.5}, "method": "svd", "options": {"rank": 3}}
    answer = http.ask("POST", "/v1/adapters/both/merge", asked).json
    expected = told(
        served.client.merge("both", {"a": 1, "b": -0.5}, method="svd", options={"rank": 3})
    )
    for merged in (answer, expected):
        assert merged.pop("seconds") > 0
    assert answer == expected
    made = answer["adapter"]["provenance"]
    assert (made["method"], made["options"]) == ("svd", {"rank": 3})
    parts = sorted(made["parts"], key=lambda part: str(part["domain"]))
    assert parts == told(served.client.analyze({"a": 1, "b": -0.5}).mix)["entries"]
    assert http.ask("GET", "/v1/adapters/both").json["adapter"] == answer["adapter"]
    default = http.ask("POST", "/v1/adapters/now/merge", {"method": "sum"}).json["adapter"]
    weights = {part["domain"]: part["weight"] for part in default["provenance"]["parts"]}
    assert weights == served.client.mix().weights
    other = asked | {"options": {"rank": 2}}
    refused = http.ask("POST", "/v1/adapters/both/merge", other)
    assert refused.outcome == (409, "ADAPTER_EXISTS")
    replaced = http.ask("POST", "/v1/adapters/both/merge", other | {"replace": True}).json
    assert replaced["adapter"]["rank"] == 2
    for name in ("both", "now"):
        served.client.delete(name)


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ([], (400, "INVALID_FIELD")),
        ({"rank": None}, (400, "INVALID_FIELD")),
        ({"rank": [2]}, (400, "INVALID_FIELD")),
        ({"rank": 10**400}, (400, "INVALID_FIELD")),
        ({"rank": 2**53 + 1}, (400, "INVALID_METHOD")),
        ({"rank": 2.5}, (400, "INVALID_METHOD")),
        ({"rank": True}, (400, "INVALID_METHOD")),
        ({"rank": "2"}, (400, "INVALID_METHOD")),
        ({"rnak": 2}, (400, "INVALID_METHOD")),
    ],
)
def test_options_that_a_method_cannot_have_are_refused(
    served: Served, http: Http, options: Any, outcome: tuple[int, str]
) -> None:
    before = served.client.adapters()
    asked = {"mix": {"a": 1, "b": 1}, "method": "svd", "options": options}
    answer = http.ask("POST", "/v1/adapters/both/merge", asked)
    assert answer.outcome == outcome
    assert answer.json["error"]["param"].startswith("options")
    assert served.client.adapters() == before


def test_how_an_adapter_was_trained_may_be_sent_along(
    served: Served, http: Http, gpt2: Family
) -> None:
    training = ("training.json", json.dumps({"special_tokens": True}).encode())
    answer = push(http, "/v1/adapters/new", *files(gpt2.adapters["a"]), training)
    served.client.delete("new")
    assert answer.status == 200


def test_uploads_that_are_no_adapter_are_refused(served: Served, http: Http, gpt2: Family) -> None:
    config, tensors = files(gpt2.adapters["a"])
    before = served.client.adapters()
    whole, headers = form(config, tensors)
    refused = {
        "nothing": push(http, "/v1/adapters/new"),
        "no tensors": push(http, "/v1/adapters/new", config),
        "an unknown part": push(http, "/v1/adapters/new", config, tensors, ("x", b"")),
        "a part twice": push(http, "/v1/adapters/new", config, config, tensors),
        "too many parts": push(http, "/v1/adapters/new", *[config] * 9),
        "texts": push(http, "/v1/adapters/new", config, tensors, file=False),
        "cut off": http.ask("PUT", "/v1/adapters/new", body=whole[:-20], headers=headers),
        "no parts": http.ask("PUT", "/v1/adapters/new", body=b"x" * 100, headers=headers),
        "no boundary": http.ask(
            "PUT",
            "/v1/adapters/new",
            body=whole,
            headers={"Content-Type": "multipart/form-data"},
        ),
        "names in a charset that cannot be read": http.ask(
            "PUT",
            "/v1/adapters/new",
            body=whole,
            headers={"Content-Type": "multipart/form-data; boundary=cut; charset=undefined"},
        ),
        "a bad switch": push(http, "/v1/adapters/new?replace=1", config, tensors),
        "a switch twice": push(
            http, "/v1/adapters/new?replace=true&replace=false", config, tensors
        ),
        "an unknown switch": push(http, "/v1/adapters/new?force=true", config, tensors),
    }
    assert {name: answer.status for name, answer in refused.items()} == dict.fromkeys(refused, 400)
    assert {answer.reason for answer in refused.values()} == {
        *("MISSING_FIELD", "UNKNOWN_FIELD", "FIELD_TWICE", "REQUEST_UNREADABLE", "INVALID_FIELD")
    }
    json_body = http.ask("PUT", "/v1/adapters/new", {"mix": {}})
    assert json_body.outcome == (415, "MEDIA_TYPE_NOT_SUPPORTED")
    broken = push(http, "/v1/adapters/new", config, (tensors[0], b"\x80\x02pickle"))
    assert broken.status == 409
    assert served.client.adapters() == before


def test_an_upload_is_bounded_while_it_arrives(served: Served, http: Http, gpt2: Family) -> None:
    config, tensors = files(gpt2.adapters["a"])
    too_large = (tensors[0], bytes(2 << 20))
    answer = push(http, "/v1/adapters/new", config, too_large)  # told by the adapter's own check
    assert answer.outcome == (409, "TOO_LARGE")
    body, headers = form(config, (tensors[0], bytes(LIMIT)))
    declared = http.ask("PUT", "/v1/adapters/new", body=body, headers=headers)
    assert declared.outcome == (413, "BODY_TOO_LARGE")
    parts = (body[at : at + (1 << 20)] for at in range(0, len(body), 1 << 20))
    chunked = http.ask("PUT", "/v1/adapters/new", body=parts, headers=headers)
    assert chunked.outcome == (413, "BODY_TOO_LARGE")


# Probes, and the document.


def test_probes_follow_what_is_served(served: Served, http: Http) -> None:
    serving, not_serving = {"status": "SERVING"}, {"status": "NOT_SERVING"}
    assert http.ask("GET", "/readyz").json == serving
    served.weights.intact = False
    try:
        answer = http.ask("GET", "/readyz")
        assert (answer.status, answer.json) == (503, not_serving)
        assert http.ask("GET", "/healthz").json == serving
    finally:
        served.weights.intact = True
    assert http.ask("GET", "/readyz").status == 200
    assert http.ask("HEAD", "/healthz").body == b""


def test_the_document_is_openapi_and_has_every_route(served: Served, http: Http) -> None:
    answer = http.ask("GET", "/openapi.json")
    document = answer.json
    assert document["openapi"].startswith("3.1.")
    validate(document)
    door: Any = served.server._http
    page = {route.path for route in page_routes()}  # It is for people, and no API.
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in door._server.config.app.routes
        if route.path not in page
        for method in route.methods - {"HEAD"}
    }
    described = {
        (path, method) for path, operations in document["paths"].items() for method in operations
    }
    assert described == routes
    assert ("/v1/mix", "put") in routes


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"logprobs": 0},
        {"logprobs": 2, "echo": True, "return_token_ids": True},
        {"prompt": ["a", "b"], "echo": True, "max_tokens": 0},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_document_says_of_texts_is_what_is_sent(
    http: Http, asked: dict[str, Any], stream: bool
) -> None:
    asked = {"prompt": "The sum", "max_tokens": 3, "temperature": 0, "stream": stream, **asked}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    answer = http.ask("POST", "/v1/completions", asked)
    assert answer.status == 200
    assert answer.events[-1]["usage"] if stream else answer.json["usage"]


@pytest.mark.parametrize("asked", [{}, {"logprobs": True, "top_logprobs": 2}])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_document_says_of_conversations_is_what_is_sent(
    served: Served,
    http: Http,
    asked: dict[str, Any],
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(served.runtime.tokenizer.inner, "chat_template", template)
    messages = [{"role": "user", "content": "abc"}]
    answer = http.ask(
        "POST",
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 3, "stream": stream, **asked},
    )
    assert answer.status == 200


def test_what_the_document_says_of_models_and_scores_is_what_is_sent(http: Http) -> None:
    for path in ("/v1/models", "/v1/models/a", "/v1/models/default"):
        assert http.ask("GET", path).status == 200
    scored = http.ask("POST", "/v1/score", {"items": [{"text": "abc"}, {"text": "a"}]}).json
    assert scored["items"][1] == {"tokens": 0, "logprob": 0, "perplexity": None, "logprobs": []}


def test_what_the_document_says_of_a_body_is_what_is_read(http: Http) -> None:
    """Bodies that its schemas allow are not refused as fields, and those that they do not are."""
    schemas = http.document["components"]["schemas"]
    for name, path, good, bad in (
        ("SetMixRequest", "/v1/mix", {"mix": {"a": 1}}, {}),
        ("SetMixRequest", "/v1/mix", {"mix": {}}, {"mix": [1]}),
        ("SetMixRequest", "/v1/mix", {"mix": {}}, {"mix": {}, "more": 1}),
        ("NameMixRequest", "/v1/mix/names/x", {}, {"mix": {"a": "1"}}),
    ):
        validator = Draft202012Validator(schemas[name])
        assert (validator.is_valid(good), validator.is_valid(bad)) == (True, False)
        assert http.ask("PUT", path, good).status == 200
        assert http.ask("PUT", path, bad).status == 400
    http.ask("DELETE", "/v1/mix/names/x")
