"""Who gets in, through both doors: tokens, scopes, and the limits of a token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from starlette.applications import Starlette
from starlette.routing import Route
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    held,
    start,
    wait_until,
)
from tests.integration.http_client import Http

import superpose_proto.v1
from superpose_proto.v1 import (
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
)
from superpose_server.door.access.access import Access

Tokens = dict[str, dict[str, Any]]

TOKENS: Tokens = {
    "user": {"scope": "inference"},
    "ops": {"scope": "admin"},
    "ended": {"scope": "admin", "expires": "2020-01-01T00:00:00Z"},
    "only-a": {"scope": "inference", "domains": ["a"]},
    "seldom": {"scope": "inference", "rate": 2},
    "single": {"scope": "inference", "concurrency": 1},
}
ADMIN = {
    "FitMix",
    "AddDomain",
    "RemoveDomain",
    "SetMix",
    "NameMix",
    "UnnameMix",
    "PushAdapter",
    "DeleteAdapter",
    "MergeAdapters",
    "ListChanges",
}
ADMIN_ENDPOINTS = {
    ("POST", "/v1/mix/fit"),
    ("PUT", "/v1/mix"),
    ("POST", "/v1/mix/add"),
    ("POST", "/v1/mix/remove"),
    ("PUT", "/v1/mix/names/{name}"),
    ("DELETE", "/v1/mix/names/{name}"),
    ("PUT", "/v1/adapters/{domain}"),
    ("DELETE", "/v1/adapters/{domain}"),
    ("POST", "/v1/adapters/{domain}/merge"),
    ("GET", "/v1/audit"),
    ("HEAD", "/v1/audit"),
}
HEALTH = {"/healthz", "/readyz"}


def write_tokens(path: Path, tokens: Tokens) -> None:
    path.touch(mode=0o600)
    held = {
        name: {"sha256": hashlib.sha256(secret(name).encode()).hexdigest(), **fields}
        for name, fields in tokens.items()
    }
    path.write_text(json.dumps({"format": 1, "tokens": held}))


def secret(name: str) -> str:
    return f"secret-of-{name}"


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {secret(token)}"),)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    write_tokens(path, TOKENS)
    return path


@pytest.fixture(scope="module")
def server(
    loop: LoopThread, gpt2: Family, tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with tokens, whose folder has `a` and `b`; nothing is in its default mix."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("a", "b"):
        shutil.copytree(gpt2.adapters[name], root / name)
    server = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("access") / "state",
        http_listen="127.0.0.1:0",
        tokens=tokens,
        adapter_dir=root,
    )
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def as_before(tokens: Path) -> Iterator[None]:
    yield
    write_tokens(tokens, TOKENS)


# Every method of every service, and every route.


def methods() -> list[str]:
    """Return the paths of all methods of the contract and of reflection."""
    names = [module.name for module in iter_modules(superpose_proto.v1.__path__)]
    files = [import_module(f"superpose_proto.v1.{name}") for name in names if name.endswith("_pb2")]
    contract = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    pool = descriptor_pool.Default()
    others = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
    return [
        f"/{service.full_name}/{method.name}"
        for service in (*contract, *map(pool.FindServiceByName, others))
        for method in service.methods
    ]


def raw(server: Served) -> Any:
    """Return its channel, for calls of bytes, which the types do not know."""
    return server.channel


def outcome(server: Served, method: str, token: str | None, request: bytes) -> tuple[str, str]:
    """Call a method, whatever it is, with these bytes; return status and reason."""
    call = raw(server).unary_stream(method)(request, metadata=bearer(token), timeout=PATIENCE)
    try:
        next(call, None)
    except grpc.RpcError as error:
        return error.code().name, reason(error)
    call.cancel()
    return "OK", ""


def reason(error: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return str(info.reason)


def test_every_method_refuses_who_may_not_call_it(server: Served) -> None:
    found = methods()
    assert {path.rpartition("/")[2] for path in found} >= ADMIN
    for method in found:
        # What is no message shows that nothing was read before.
        for request in (b"", b"\xff"):
            for token, expected in (
                (None, ("UNAUTHENTICATED", "TOKEN_MISSING")),
                ("nobody", ("UNAUTHENTICATED", "TOKEN_UNKNOWN")),
                ("ended", ("UNAUTHENTICATED", "TOKEN_EXPIRED")),
            ):
                assert outcome(server, method, token, request) == expected, method
        refused = outcome(server, method, "user", b"") == ("PERMISSION_DENIED", "SCOPE_MISSING")
        assert refused is (method.rpartition("/")[2] in ADMIN), method


def test_every_method_lets_in_who_may_call_it(server: Served) -> None:
    for method in methods():
        admin = method.rpartition("/")[2] in ADMIN
        for token in ("ops",) if admin else ("ops", "user"):
            code, _ = outcome(server, method, token, b"")
            assert code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"), method


def test_health_and_what_does_not_exist_ask_for_nothing(server: Served) -> None:
    health = health_pb2_grpc.HealthStub(raw(server))
    assert health.Check(health_pb2.HealthCheckRequest()).status == 1
    assert next(health.Watch(health_pb2.HealthCheckRequest())).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        raw(server).unary_unary("/superpose.v1.MixService/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_token_is_sent_once(server: Served) -> None:
    twice = (*bearer("user"), *bearer("user"))
    with pytest.raises(grpc.RpcError) as caught:
        raw(server).unary_unary("/superpose.v1.MixService/GetMix")(b"", metadata=twice)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def routes(server: Served) -> list[tuple[str, str]]:
    """Return the method and the path of all that the HTTP door answers."""
    door: Any = server.server._http
    app = door._server.config.app
    assert isinstance(app, Starlette)
    found = []
    for route in app.routes:
        assert isinstance(route, Route)
        found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


def is_page(path: str) -> bool:
    """Return whether a path is a file of the page, which anybody may load."""
    return path == "/" or path.startswith("/mixer/")


def asked(
    server: Served, method: str, path: str, token: str | None, value: Any = None
) -> tuple[int, str, dict[str, str]]:
    """Return status, reason and header fields; of a good answer nothing more is read."""
    # Without a value a body that is none, which shows what is read before the token.
    body = b"\xff" if value is None else json.dumps(value).encode()
    headers = {"content-type": "application/json", **dict(bearer(token))}
    with closing(HTTPConnection(server.server.http_address, timeout=PATIENCE)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read() if answer.status >= 400 else b""
    found = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, json.loads(text)["error"]["code"] if text else "", found


def test_every_route_refuses_who_may_not_call_it(server: Served) -> None:
    found = routes(server)
    assert set(found) >= ADMIN_ENDPOINTS
    for method, path in found:
        if path in HEALTH or is_page(path):
            assert method in ("GET", "HEAD"), path
            assert asked(server, method, path, None)[0] == 200
            continue
        url = re.sub(r"{.*?}", "x", path)
        for token, reason, told in (
            (None, "TOKEN_MISSING", "Bearer"),
            ("nobody", "TOKEN_UNKNOWN", 'Bearer error="invalid_token"'),
            ("ended", "TOKEN_EXPIRED", 'Bearer error="invalid_token"'),
        ):
            status, code, headers = asked(server, method, url, token)
            assert (status, headers["www-authenticate"]) == (401, told), (method, path)
            assert code == reason or method == "HEAD"
        status, code, _ = asked(server, method, url, "user")
        assert (status == 403) is ((method, path) in ADMIN_ENDPOINTS), (method, path)
        assert code == "SCOPE_MISSING" or status != 403 or method == "HEAD"


def test_every_route_lets_in_who_may_call_it(server: Served) -> None:
    for method, path in routes(server):
        status, _, _ = asked(server, method, re.sub(r"{.*?}", "x", path), "ops")
        assert status not in (401, 403), (method, path)


def test_a_token_is_asked_for_however_a_path_is_written(server: Served) -> None:
    for method, path in (
        ("PUT", "/v1/mix?x=1"),
        ("PUT", "/v1/mix/"),
        ("PUT", "//v1/mix"),
        ("PUT", "/v1/%6dix"),
        ("POST", "/v1/mix"),
        ("OPTIONS", "/v1/mix"),
        ("HEAD", "/v1/mix"),
        ("PUT", "/healthz"),
        ("PUT", "/healthz/../v1/mix"),
    ):
        status, _, _ = asked(server, method, path, None, {"mix": {"a": 1}})
        assert status in (401, 404, 405), (method, path)
    assert server.runtime.default_mix.state.generation == 0


# What the limits of a token mean.


def texts(server: Served) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(server.channel)


def mix(**weights: float) -> mix_pb2.Mix:
    return mix_pb2.Mix(
        entries=[mix_pb2.DomainWeight(domain=name, weight=each) for name, each in weights.items()]
    )


def text(
    token: str, asked_mix: mix_pb2.Mix | None, server: Served
) -> inference_pb2.GenerateResponse:
    request = inference_pb2.GenerateRequest(
        prompt=PROMPT, mix=asked_mix, options=inference_pb2.GenerateOptions(max_new_tokens=1)
    )
    answer: inference_pb2.GenerateResponse = texts(server).Generate(
        request, metadata=bearer(token), timeout=PATIENCE
    )
    return answer


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, reason(caught.value)


def test_a_token_of_some_domains_gets_no_text_of_others_whatever_they_are_called(
    server: Served,
) -> None:
    mixes = mix_pb2_grpc.MixServiceStub(server.channel)
    ops = bearer("ops")
    denied = ("PERMISSION_DENIED", "DOMAIN_NOT_ALLOWED")
    mixes.NameMix(mix_pb2.NameMixRequest(name="both", mix=mix(a=1, b=0.5)), metadata=ops)
    mixes.NameMix(mix_pb2.NameMixRequest(name="half", mix=mix(a=0.5)), metadata=ops)
    try:
        for good in (None, mix(), mix(a=-2), mix(half=1), mix(a=1, b=0)):
            assert text("only-a", good, server).mix.digest
        for bad in (mix(b=1), mix(a=1, b=1e-9), mix(both=1), mix(half=1, b=1)):
            assert refused(partial(text, "only-a", bad, server)) == denied
            assert text("user", bad, server).mix.digest
        # What cancels out is not there.
        assert text("only-a", mix(both=1, b=-0.5), server).mix.digest
        score = inference_pb2.ScoreRequest(
            items=[inference_pb2.ScoreItem(text="x y")], mixes=[mix(a=1), mix(b=1)]
        )
        assert refused(lambda: texts(server).Score(score, metadata=bearer("only-a"))) == denied
        analyze = mix_pb2.AnalyzeMixRequest(mix=mix(a=1, b=1))
        assert refused(lambda: mixes.AnalyzeMix(analyze, metadata=bearer("only-a"))) == denied
        # The default mix counts as what it holds, too.
        mixes.SetMix(mix_pb2.SetMixRequest(mix=mix(b=1)), metadata=ops)
        assert refused(lambda: text("only-a", None, server)) == denied
        assert text("only-a", mix(a=1), server).mix.digest

        listed = Http(server.server.http_address, dict(bearer("only-a"))).ask("GET", "/v1/models")
        assert [model["id"] for model in listed.json["data"]] == ["base", "a", "half"]
        for model, status in (("a", 200), ("both", 403), ("default", 403), ("half", 200)):
            body = {"model": model, "prompt": "x", "max_tokens": 1}
            found = asked(server, "POST", "/v1/completions", "only-a", body)[:2]
            assert found == (status, "" if status == 200 else "DOMAIN_NOT_ALLOWED")
    finally:
        mixes.SetMix(mix_pb2.SetMixRequest(mix=mix()), metadata=ops)
        for name in ("both", "half"):
            mixes.UnnameMix(mix_pb2.UnnameMixRequest(name=name), metadata=ops)


def test_a_token_that_is_used_too_often_is_told_when_to_come_back(server: Served) -> None:
    """Both doors share one account."""
    body = {"prompt": "x", "max_tokens": 1}
    assert asked(server, "POST", "/v1/completions", "seldom", body)[0] == 200
    text("seldom", None, server)
    status, code, headers = asked(server, "POST", "/v1/completions", "seldom", body)
    assert (status, code) == (429, "RATE_LIMITED")
    assert 1 <= int(headers["retry-after"]) <= 30
    with pytest.raises(grpc.RpcError) as caught:
        text("seldom", None, server)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(caught.value) == "RATE_LIMITED"
    error: Any = caught.value
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in rpc_status.from_call(error).details)
    assert 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 30
    text("user", None, server)


def test_a_token_has_so_many_calls_under_way_and_gets_them_back(server: Served) -> None:
    options = inference_pb2.GenerateOptions(max_new_tokens=300, ignore_eos=True, temperature=0)
    request = inference_pb2.GenerateStreamRequest(prompt=PROMPT, options=options)
    body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "stream": True}

    def fails() -> None:
        assert refused(lambda: text("single", None, server)) == (
            "RESOURCE_EXHAUSTED",
            "RATE_LIMITED",
        )
        assert asked(server, "GET", "/v1/mix", "single")[:2] == (429, "RATE_LIMITED")

    for end in ("cancelled", "over HTTP", "whole", "failed"):
        with held(server.recorder) as let_go:
            if end == "over HTTP":
                connection = HTTPConnection(server.server.http_address, timeout=PATIENCE)
                headers = {"content-type": "application/json", **dict(bearer("single"))}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = connection.getresponse()
                fails()
                let_go.set()
                answer.close()
                connection.close()
            elif end == "failed":
                let_go.set()
                assert refused(lambda: text("single", mix(nothing=1), server))[0] == "NOT_FOUND"
            else:
                stream = texts(server).GenerateStream(request, metadata=bearer("single"))
                next(stream)
                fails()
                let_go.set()
                if end == "cancelled":
                    stream.cancel()
                else:
                    assert len(list(stream)) > 1
        # The next round's row must not wait behind this one's, in a step that is held.
        wait_until(lambda: gets_in(server) and idle(server), "the call is given back")


def gets_in(server: Served) -> bool:
    return asked(server, "GET", "/v1/mix", "single")[0] == 200


def idle(server: Served) -> bool:
    return server.runtime.engine.running == server.runtime.engine.waiting == 0


def test_a_token_that_is_revoked_begins_no_call_more(server: Served, tokens: Path) -> None:
    text("user", None, server)
    write_tokens(tokens, {name: TOKENS[name] for name in TOKENS if name != "user"})
    assert refused(lambda: text("user", None, server)) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
    assert asked(server, "GET", "/v1/mix", "user")[:2] == (401, "TOKEN_UNKNOWN")
    tokens.write_text("{}")  # Broken: nobody is let in by it, and nobody kept out.
    assert refused(lambda: text("user", None, server)) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
    text("only-a", None, server)


def test_the_log_tells_who_was_refused_and_from_where(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """So that who tries tokens is found."""
    caplog.set_level(logging.INFO)
    assert refused(lambda: text("nobody", None, server)) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
    assert asked(server, "PUT", "/v1/mix", "user")[:2] == (403, "SCOPE_MISSING")
    lines = [line for line in caplog.messages if line.startswith("refused ")]
    assert len(lines) == 2
    for line, said in zip(lines, ("TOKEN_UNKNOWN", "SCOPE_MISSING"), strict=True):
        assert line.endswith(f"reason={said}")
        assert re.search(r" peer=ipv4:127\.0\.0\.1:\d+ ", line)


# What must not be told.

SECRET_PROMPT = "the prompt that nobody else may read"


def test_neither_tokens_nor_prompts_are_written_anywhere(
    server: Served, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    answers: list[str] = []
    for token in ("user", "nobody", "ended", "only-a", None):
        for asked_mix in (None, mix(b=1), mix(nothing=1)):
            request = inference_pb2.GenerateRequest(prompt=SECRET_PROMPT, mix=asked_mix)
            request.options.max_new_tokens = 1
            try:
                texts(server).Generate(request, metadata=bearer(token))
            except grpc.RpcError as error:
                answers.append(f"{error.details()} {error.trailing_metadata()}")
        for body in ({"prompt": SECRET_PROMPT, "max_tokens": 1}, {"prompt": SECRET_PROMPT, "x": 1}):
            http = Http(server.server.http_address, dict(bearer(token)))
            answer = http.ask("POST", "/v1/completions", body)
            if answer.status != 200:
                answers.append(answer.body.decode())
    metrics, http_door = server.server.metrics_address, server.server.http_address
    for url in (f"{metrics}/metrics", f"{http_door}/healthz", f"{http_door}/readyz"):
        with urllib.request.urlopen(f"http://{url}") as told:
            answers.append(told.read().decode())
    written = [caplog.text, *answers]
    state = server.runtime.config.state_dir
    assert state is not None
    written += [file.read_bytes().decode("latin-1") for file in state.rglob("*") if file.is_file()]
    assert "refused" in caplog.text
    for each in written:
        assert SECRET_PROMPT not in each
        assert secret("") not in each


FAULT = "secret-of-the-machine in /srv/models/private"


@pytest.mark.parametrize("step", ["check", "begin"])
def test_a_fault_of_ours_tells_nothing_through_any_method_or_route(
    server: Served, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every call passes there, so this is every call that fails as nobody foresaw."""

    def fails(*_: object) -> None:
        raise RuntimeError(FAULT)

    monkeypatch.setattr(Access, step, fails)
    health = [f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch")]
    for method in (*methods(), *health):
        call = raw(server).unary_stream(method)(b"", metadata=bearer("ops"), timeout=PATIENCE)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        error: Any = caught.value
        assert (error.code().name, error.details()) == ("INTERNAL", "internal error"), method
        assert reason(error) == "INTERNAL"
        assert FAULT not in str(error.trailing_metadata()) + str(error.initial_metadata())
    for method, path in routes(server):
        if is_page(path):
            continue
        with closing(HTTPConnection(server.server.http_address, timeout=PATIENCE)) as connection:
            url = re.sub(r"{.*?}", "x", path)
            connection.request(method, url, headers=dict(bearer("ops")))
            answer = connection.getresponse()
            assert answer.status == 500, path
            told = f"{answer.getheaders()} {answer.read().decode()}"
        assert FAULT not in told
        assert "internal error" in told or method == "HEAD"
    assert FAULT in caplog.text  # Where it belongs.


@pytest.fixture(scope="module")
def apart(
    loop: LoopThread, gpt2: Family, tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with an address for operators, tokens, and nothing else."""
    server = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("apart") / "state",
        http_listen="127.0.0.1:0",
        admin_listen="127.0.0.1:0",
        tokens=tokens,
    )
    yield server
    server.stop()


def test_admin_calls_are_served_at_their_own_address_alone(apart: Served) -> None:
    elsewhere = ("PERMISSION_DENIED", "ADMIN_ELSEWHERE")
    for method in methods():
        refused_here = outcome(apart, method, "ops", b"") == elsewhere
        assert refused_here is (method.rpartition("/")[2] in ADMIN), method
    for method, path in routes(apart):
        status, code, _ = asked(apart, method, re.sub(r"{.*?}", "x", path), "ops")
        assert (status == 403) is ((method, path) in ADMIN_ENDPOINTS), (method, path)
        assert code == "ADMIN_ELSEWHERE" or status != 403 or method == "HEAD"
    with grpc.insecure_channel(apart.server.admin_address) as channel:
        there = dataclasses.replace(apart, channel=channel)
        for method in methods():
            code, _ = outcome(there, method, "ops", b"")
            assert code not in ("UNAUTHENTICATED", "PERMISSION_DENIED"), method
            assert outcome(there, method, None, b"")[1] == "TOKEN_MISSING"
        health = health_pb2_grpc.HealthStub(raw(there))
        assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        mixes: Any = mix_pb2_grpc.MixServiceStub(channel)
        named = mix_pb2.NameMixRequest(name="nothing", mix=mix())
        assert mixes.NameMix(named, metadata=bearer("ops")).named_mix.name == "nothing"
    assert asked(apart, "GET", "/v1/models/nothing", "user")[0] == 200
