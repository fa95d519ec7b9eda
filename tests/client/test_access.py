"""Tokens, TLS and client certificates, as both clients send and check them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.certificates import CA, Pair, file_of, pair, server_credentials
from tests.client.every_call import CALLS
from tests.client.fake_server import FakeServer

from superpose_client import Access, errors
from superpose_client.async_client import AsyncClient
from superpose_client.client import Client

Made = Callable[..., Caller]
CALLERS = pytest.mark.parametrize("make", [SyncCaller, AsyncCaller], ids=["sync", "async"])
TOKEN = "sp-0123456789abcdef~+/="


@pytest.fixture(scope="module")
def authority() -> CA:
    return CA()


@pytest.fixture
def ca(authority: CA, tmp_path: Path) -> Path:
    return file_of(authority, tmp_path / "ca.pem")


@pytest.fixture
def client_pair(authority: CA, tmp_path: Path) -> Pair:
    return pair(authority, tmp_path)


def ask(make: Made, credentials: grpc.ServerCredentials | None, **options: Any) -> str | None:
    """Ask a server once, and return the authorization that it got."""
    with FakeServer(credentials=credentials) as server:
        caller = make(server.address, retries=0, **options)
        try:
            caller.mix()
        finally:
            caller.close()
        (authorization,) = server.authorizations
        return authorization


@CALLERS
def test_every_call_carries_the_token(make: Made, server: FakeServer) -> None:
    caller = make(server.address, token=TOKEN)
    for _, call in CALLS.values():
        call(caller)
    caller.health()
    caller.close()
    assert server.authorizations == [f"Bearer {TOKEN}"] * (len(CALLS) + 1)


@CALLERS
def test_without_a_token_nothing_is_said(make: Made) -> None:
    assert ask(make, None) is None


@CALLERS
def test_a_server_that_the_authority_vouches_for_is_spoken_to(
    make: Made, authority: CA, ca: Path
) -> None:
    assert ask(make, server_credentials(authority), ca=ca, token=TOKEN) == f"Bearer {TOKEN}"


@CALLERS
@pytest.mark.parametrize("fault", ["another authority", "another name", "expired", "unencrypted"])
def test_another_server_is_not(make: Made, authority: CA, ca: Path, fault: str) -> None:
    credentials = {
        "another authority": server_credentials(CA()),
        "another name": server_credentials(authority, "model.example"),
        "expired": server_credentials(authority, days=-1),
        "unencrypted": None,
    }[fault]
    with FakeServer(credentials=credentials) as server:
        caller = make(server.address, retries=0, ca=ca, token=TOKEN)
        with pytest.raises(errors.UnavailableError):
            caller.mix()
        caller.close()
        assert server.authorizations == []


@CALLERS
def test_public_authorities_do_not_vouch_for_it(make: Made, authority: CA) -> None:
    with pytest.raises(errors.UnavailableError):
        ask(make, server_credentials(authority), tls=True)


@CALLERS
def test_a_server_that_asks_for_a_certificate_gets_it(
    make: Made, authority: CA, ca: Path, client_pair: Pair
) -> None:
    credentials = server_credentials(authority, clients=authority)
    ask(make, credentials, ca=ca, certificate=client_pair.certificate, key=client_pair.key)
    with pytest.raises(errors.UnavailableError):
        ask(make, credentials, ca=ca)


ELSEWHERE = [
    "model.example:50051",
    "server.localhost:50051",
    "192.0.2.1:50051",
    "dns:///model.example:1",
    "[2001:db8::1]:1",
]
HERE = ["localhost:50051", "127.8.9.10:50051", "[::1]:50051", "unix:/run/superpose.sock"]


def make_client(target: str, **access: Any) -> None:
    Client(target, **access).close()

    async def make() -> None:
        await AsyncClient(target, **access).close()

    asyncio.run(make())


@pytest.mark.parametrize("target", ELSEWHERE)
def test_no_token_leaves_the_machine_unencrypted(target: str, ca: Path) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.AccessError, match="the token would go to") as caught:
            kind(target, token=TOKEN)
        assert target in caught.value.message
        assert TOKEN not in caught.value.message
    for access in (Access(ca=ca), Access(tls=True), Access(insecure=True)):
        make_client(target, token=TOKEN, **access)
    make_client(target)


@pytest.mark.parametrize("target", HERE)
def test_on_the_machine_it_may_be_unencrypted(target: str) -> None:
    make_client(target, token=TOKEN)


@pytest.mark.parametrize("token", ["", " ", f"{TOKEN}\n", "a b", "tökén"])
def test_what_is_no_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(errors.AccessError, match=r"^the token is empty, or holds ") as caught:
        Client(token=token)
    assert TOKEN not in caught.value.message


def test_a_certificate_and_its_key_come_together(client_pair: Pair) -> None:
    for access in (Access(certificate=client_pair.certificate), Access(key=client_pair.key)):
        with pytest.raises(errors.AccessError, match="give both"):
            Client(**access)


def test_files_that_are_not_there_are_named(ca: Path, client_pair: Pair, tmp_path: Path) -> None:
    gone = tmp_path / "gone.pem"
    for access in (
        Access(ca=gone),
        Access(certificate=gone, key=client_pair.key),
        Access(certificate=client_pair.certificate, key=gone),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            Client(**access)
        assert caught.value.filename == str(gone)


def test_files_that_are_none_are_named(client_pair: Pair, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN CERTIFICATE-----\nno\n")
    with pytest.raises(errors.AccessError, match=f"^{junk} holds no certificate in PEM$"):
        Client(ca=junk)
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(client_pair.key.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    other = pair(CA(), tmp_path, "other")
    for certificate, bad in (
        (client_pair.certificate, junk),
        (client_pair.certificate, locked),
        (client_pair.certificate, other.key),
        (junk, client_pair.key),
    ):
        with pytest.raises(
            errors.AccessError,
            match=f"^{certificate} and {bad} are no certificate and its key, in PEM and without",
        ):
            Client(certificate=certificate, key=bad)
