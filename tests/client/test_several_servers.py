"""Clients of several servers: turns, those that are missing, and what one server alone is asked."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.certificates import CA, file_of, server_credentials
from tests.client.every_call import CALLS
from tests.client.fake_server import Failure, FakeServer, chunks
from tests.client.name_server import NameServer

from superpose_client import errors
from superpose_client.client import Client
from superpose_proto.v1 import inference_pb2

Made = Callable[..., Caller]
Code = grpc.StatusCode
TEXTS = set(inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name)


SAID_BY_A_FILE = {"AddDomain", "RemoveDomain", "SetMix", "NameMix", "UnnameMix"}


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeServer()) for _ in range(3)]


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Made]:
    """Makes clients that end with the test."""
    with ExitStack() as stack:

        def made(*arguments: Any, **options: Any) -> Caller:
            caller: Caller = request.param(*arguments, **options)
            stack.callback(caller.close)
            return caller

        yield made


def addresses(servers: list[FakeServer]) -> list[str]:
    return [server.address for server in servers]


def counts(servers: list[FakeServer]) -> list[int]:
    return [len(server.requests) for server in servers]


@pytest.mark.parametrize("write", [list, ",".join, ", ".join], ids=["list", "text", "spaces"])
def test_servers_take_turns(
    make: Made, servers: list[FakeServer], write: Callable[[list[str]], Any]
) -> None:
    caller = make(write(addresses(servers)))
    for _ in range(3):
        caller.generate("x")
        caller.collect("stream", "x")
    assert counts(servers) == [2, 2, 2]


def test_a_server_that_is_gone_is_passed_over(make: Made, servers: list[FakeServer]) -> None:
    servers[1].__exit__(None, None, None)
    # Without a pause, and so without retries.
    caller = make(addresses(servers), retries=0)
    for _ in range(6):
        caller.generate("x")
        caller.collect("stream", "x")
    assert counts(servers)[1] == 0
    assert sum(counts(servers)) == 12


def test_a_server_that_does_not_serve_is_passed_over_until_it_does(
    make: Made, servers: list[FakeServer]
) -> None:
    servers[0].serve(False)
    caller = make(addresses(servers[:2]), retries=0)
    for _ in range(4):
        caller.generate("x")
    assert counts(servers) == [0, 4, 0]
    servers[0].serve(True)
    while not servers[0].requests:
        caller.generate("x")


def test_an_address_that_answers_nothing_holds_up_one_call_for_seconds(
    servers: list[FakeServer],
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with Client([address, servers[0].address], retries=0, timeout=15) as client:
            for _ in range(4):
                client.generate("x")
    assert len(servers[0].requests) == 4


def test_one_that_is_full_leaves_it_to_the_others(make: Made, servers: list[FakeServer]) -> None:
    full = Failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after=3600)
    servers[0].answers["Generate"] = servers[1].answers["Generate"] = full
    caller = make(addresses(servers))
    assert caller.generate("x").text == "The sum is 5."
    assert counts(servers) == [1, 1, 1]


def test_all_are_asked_again_after_a_pause(make: Made, servers: list[FakeServer]) -> None:
    for server in servers:
        server.answers["Generate"] = Failure(Code.UNAVAILABLE, "away")
    caller = make(addresses(servers), retries=1)
    with pytest.raises(errors.UnavailableError, match="away"):
        caller.generate("x")
    assert counts(servers) == [2, 2, 2]
    last_before = max(server.arrivals[0] for server in servers)
    assert min(server.arrivals[1] for server in servers) - last_before >= 0.05


def test_a_stream_goes_on_nowhere_after_its_first_part(
    make: Made, servers: list[FakeServer]
) -> None:
    servers[0].answers["GenerateStream"] = lambda request: [
        chunks(request)[0],
        Failure(Code.UNAVAILABLE, "away"),
    ]
    caller = make(addresses(servers))
    with pytest.raises(errors.UnavailableError):
        caller.collect("stream", "x")
    assert counts(servers) == [1, 0, 0]


@pytest.mark.parametrize("method", CALLS)
def test_what_is_about_one_server_is_not_asked_of_several(
    make: Made, servers: list[FakeServer], method: str
) -> None:
    caller = make(addresses(servers))
    _, call = CALLS[method]
    if method in TEXTS:
        call(caller)
    else:
        with pytest.raises(errors.AddressError, match=f"{method} is about one server") as caught:
            call(caller)
        assert ("or change the file" in str(caught.value)) == (method in SAID_BY_A_FILE)
    assert sum(counts(servers)) == (method in TEXTS)


def test_health_is_that_of_one_server(make: Made, servers: list[FakeServer]) -> None:
    with pytest.raises(errors.AddressError):
        make(addresses(servers)).health()


@pytest.mark.parametrize("target", ["", "localhost:1,", ",", [], ["localhost:1", ""]])
def test_an_empty_address_is_refused(target: str | list[str]) -> None:
    with pytest.raises(errors.AddressError, match="are no addresses"):
        Client(target)


def test_each_server_is_known_by_its_own_name(make: Made, tmp_path: Any) -> None:
    authority = CA()
    ca = file_of(authority, tmp_path / "ca.pem")
    with (
        FakeServer(credentials=server_credentials(authority, "127.0.0.1")) as first,
        FakeServer(credentials=server_credentials(authority, "localhost")) as second,
    ):
        port = second.address.rpartition(":")[2]
        caller = make([first.address, f"localhost:{port}"], ca=ca, token="t", retries=0)
        for _ in range(2):
            caller.generate("x")
        assert counts([first, second]) == [1, 1]
        assert first.authorizations == second.authorizations == ["Bearer t"]


def test_no_token_goes_to_one_of_several_unencrypted() -> None:
    with pytest.raises(errors.AccessError, match=r"go to model\.example:1 unencrypted"):
        Client("localhost:1,model.example:1", token="t")


@pytest.fixture
def shared_name() -> Iterator[tuple[str, list[FakeServer], NameServer]]:
    """A name that two servers have, with TLS by that name: how to ask for it."""
    with FakeServer() as first, ExitStack() as stack:
        port = first.address.rpartition(":")[2]
        second = stack.enter_context(FakeServer(listen=f"127.0.0.2:{port}"))
        names = stack.enter_context(NameServer("servers.test", ["127.0.0.1", "127.0.0.2"]))
        yield f"dns://{names.authority}/servers.test:{port}", [first, second], names


def test_servers_of_one_name_take_turns(
    make: Made, shared_name: tuple[str, list[FakeServer], NameServer]
) -> None:
    target, servers, _ = shared_name
    caller = make(target)
    for _ in range(10):
        caller.generate("x")
    # The first goes to whichever is connected first.
    assert min(counts(servers)) >= 4
    with pytest.raises(errors.AddressError, match=r"SetMix is about one server.*servers\.test"):
        caller.set("math")
    servers[0].__exit__(None, None, None)
    for _ in range(6):
        caller.generate("x")
        caller.collect("stream", "x")


def test_servers_of_one_name_are_known_by_it(make: Made, tmp_path: Any) -> None:
    authority = CA()
    ca = file_of(authority, tmp_path / "ca.pem")
    credentials = server_credentials(authority, "servers.test")
    with (
        FakeServer(credentials=credentials) as server,
        NameServer("servers.test", ["127.0.0.1"]) as names,
    ):
        port = server.address.rpartition(":")[2]
        target = f"dns://{names.authority}/servers.test:{port}"
        with pytest.raises(errors.AccessError, match="unencrypted"):
            Client(target, token="t")
        caller = make(target, ca=ca, token="t")
        assert caller.generate("x").text
        assert server.authorizations == ["Bearer t"]
