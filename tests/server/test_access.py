"""Who may call, and how often: judged at moments of the test's own choosing."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from superpose_adapters.tokens import Scope, Token, sha256_of
from superpose_server.caller import Caller, caller
from superpose_server.door.access.access import Access
from superpose_server.door.access.limits import Use
from superpose_server.door.access.scopes import need_of_endpoint, needs_of_methods
from superpose_server.errors import (
    PermissionDenied,
    RateLimited,
    ServerError,
    StartupError,
    Unauthenticated,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def tokens_file(folder: Path, **tokens: dict[str, Any]) -> Path:
    """A file of tokens, each of which is its own name."""
    path = folder / "tokens.json"
    path.touch(mode=0o600)
    held = {name: {"sha256": sha256_of(name), **fields} for name, fields in tokens.items()}
    path.write_text(json.dumps({"format": 1, "tokens": held}))
    return path


def reason(access: Access, authorization: str | None, need: Scope = Scope.INFERENCE) -> str:
    with pytest.raises((Unauthenticated, PermissionDenied)) as caught:
        access.check(authorization, need)
    assert isinstance(caught.value, ServerError)
    return caught.value.reason


@pytest.fixture
def access(tmp_path: Path) -> Access:
    path = tokens_file(
        tmp_path,
        user={"scope": "inference"},
        ops={"scope": "admin"},
        ends={"scope": "admin", "expires": "2030-01-01T00:00:01Z"},
        ended={"scope": "admin", "expires": "2030-01-01T00:00:00Z"},
    )
    return Access(path, lambda: NOW)


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [
        (None, "TOKEN_MISSING"),
        ("", "TOKEN_MISSING"),
        ("Bearer", "TOKEN_MISSING"),
        ("Bearer ", "TOKEN_MISSING"),
        ("Basic dXNlcjp1c2Vy", "TOKEN_MISSING"),
        ("user", "TOKEN_MISSING"),
        ("Bearer nobody", "TOKEN_UNKNOWN"),
        ("Bearer User", "TOKEN_UNKNOWN"),
        ("Bearer user ops", "TOKEN_UNKNOWN"),
        (f"Bearer {sha256_of('ops')}", "TOKEN_UNKNOWN"),
        ("Bearer ended", "TOKEN_EXPIRED"),
    ],
)
def test_what_is_no_good_token_is_refused(
    access: Access, authorization: str | None, expected: str
) -> None:
    for need in Scope:
        assert reason(access, authorization, need) == expected


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_a_token_is_good_for_its_scope_and_admin_for_both(access: Access, scheme: str) -> None:
    for name, need in (
        ("user", Scope.INFERENCE),
        ("ops", Scope.INFERENCE),
        ("ops", Scope.ADMIN),
        ("ends", Scope.ADMIN),
    ):
        token = access.check(f"{scheme} {name}", need)
        assert token is not None
        assert token.name == name
    assert reason(access, "Bearer user", Scope.ADMIN) == "SCOPE_MISSING"


def test_what_is_open_asks_for_nothing(access: Access) -> None:
    assert access.check(None, None) is None
    assert access.check("Bearer nobody", None) is None


def test_without_a_file_nothing_is_asked() -> None:
    assert Access(None).check(None, Scope.ADMIN) is None


def test_where_admin_calls_are_served_elsewhere_they_are_refused_and_others_are_not(
    access: Access, tmp_path: Path
) -> None:
    here = access.without_admin()
    assert reason(here, "Bearer ops", Scope.ADMIN) == "ADMIN_ELSEWHERE"
    assert reason(here, None, Scope.ADMIN) == "TOKEN_MISSING"
    assert reason(here, "Bearer user", Scope.ADMIN) == "SCOPE_MISSING"
    assert here.check("Bearer ops", Scope.INFERENCE) is not None
    assert access.check("Bearer ops", Scope.ADMIN) is not None
    assert reason(Access(None).without_admin(), None, Scope.ADMIN) == "ADMIN_ELSEWHERE"


def test_limits_are_one_account_wherever_a_call_comes(tmp_path: Path) -> None:
    path = tokens_file(tmp_path, ops={"scope": "admin", "rate": 1})
    access = Access(path)
    token = access.check("Bearer ops", Scope.ADMIN)
    access.begin(token, "")
    with pytest.raises(RateLimited):
        access.without_admin().begin(token, "")


def test_a_file_that_cannot_be_used_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="adapterctl token new NAME"):
        Access(tmp_path / "none.json")


def test_a_file_is_read_again_and_one_that_is_broken_keeps_the_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tokens_file(tmp_path, user={"scope": "inference"})
    access = Access(path, lambda: NOW)
    assert access.check("Bearer user", Scope.INFERENCE) is not None
    tokens_file(tmp_path, other={"scope": "inference"})
    assert reason(access, "Bearer user") == "TOKEN_UNKNOWN"
    assert access.check("Bearer other", Scope.INFERENCE) is not None
    assert "read the tokens again" in caplog.text
    caplog.clear()
    path.write_text("{")
    for _ in range(3):
        assert access.check("Bearer other", Scope.INFERENCE) is not None
    assert caplog.text.count("kept the old tokens") == 1
    path.unlink()
    assert access.check("Bearer other", Scope.INFERENCE) is not None
    assert caplog.text.count("kept the old tokens") == 2
    tokens_file(tmp_path, user={"scope": "inference"}).chmod(0o666)
    assert access.check("Bearer other", Scope.INFERENCE) is not None
    path.chmod(0o600)
    assert access.check("Bearer user", Scope.INFERENCE) is not None


def test_a_call_says_whose_it_is(tmp_path: Path) -> None:
    path = tokens_file(tmp_path, user={"scope": "inference", "domains": ["math"]})
    access = Access(path)
    access.begin(access.check("Bearer user", Scope.INFERENCE), "ipv4:10.0.0.1:5")
    assert caller() == Caller("user", "ipv4:10.0.0.1:5", frozenset({"math"}))
    access.begin(None, "ipv4:10.0.0.2:5")
    assert caller() == Caller("anonymous", "ipv4:10.0.0.2:5", None)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(rate: int | None = None, concurrency: int | None = None) -> Token:
    return Token("user", "0" * 64, Scope.INFERENCE, None, rate, concurrency)


def wait(use: Use, token: Token) -> float:
    """Return for how long a call is refused."""
    with pytest.raises(RateLimited) as caught:
        use.begin(token)
    assert caught.value.reason == "RATE_LIMITED"
    return caught.value.retry_after_seconds


def test_a_rate_lets_a_minutes_worth_come_at_once_and_then_keeps_the_mean() -> None:
    clock = Clock()
    use, token = Use(clock), limited(rate=3)
    for _ in range(3):
        use.begin(token)
    assert wait(use, token) == pytest.approx(20)
    clock.now += 5
    assert wait(use, token) == pytest.approx(15)
    clock.now += 15.001
    use.begin(token)
    assert wait(use, token) == pytest.approx(19.999)
    clock.now += 3600  # No more than a minute's worth piles up.
    for _ in range(3):
        use.begin(token)
    assert wait(use, token) == pytest.approx(20)


def test_who_waits_as_long_as_told_is_let_in() -> None:
    clock = Clock()
    use, token = Use(clock), limited(rate=7)
    for _ in range(7):
        use.begin(token)
    for _ in range(50):
        clock.now += wait(use, token) + 1e-9
        use.begin(token)


def test_a_rate_that_is_lowered_holds_at_once() -> None:
    use = Use(Clock())
    use.begin(limited(rate=1000))
    use.begin(limited(rate=1))
    assert wait(use, limited(rate=1)) == pytest.approx(60)
    use.begin(limited())


def test_calls_at_once_are_bounded_and_refused_ones_take_nothing() -> None:
    use, token = Use(Clock()), limited(concurrency=2, rate=4)
    ends = [use.begin(token), use.begin(token)]
    for _ in range(5):
        assert wait(use, token) == 1
    ends[0]()
    use.begin(token)
    ends[1]()
    use.begin(token)  # The fourth of the minute: those that were refused do not count.
    ends[0]()
    assert wait(use, token) == pytest.approx(15)


def test_a_method_that_nothing_is_said_of_is_refused() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="new.proto", package="superpose.v1")
    file.message_type.add(name="NewRequest")
    service = file.service.add(name="NewService")
    service.method.add(
        name="Shutdown",
        input_type=".superpose.v1.NewRequest",
        output_type=".superpose.v1.NewRequest",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    with pytest.raises(ValueError, match=r"superpose\.v1\.NewService\.Shutdown says nothing"):
        needs_of_methods([pool.FindServiceByName("superpose.v1.NewService")])


def test_an_endpoint_that_nothing_is_said_of_is_refused() -> None:
    with pytest.raises(ValueError, match="POST /v1/shutdown says nothing"):
        need_of_endpoint("POST", "/v1/shutdown")
    with pytest.raises(ValueError, match="DELETE /v1/mix says nothing"):
        need_of_endpoint("DELETE", "/v1/mix")
