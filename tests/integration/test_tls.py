"""TLS and mutual TLS on both doors, and certificates that change while they serve."""

from __future__ import annotations

import json
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path

import grpc
import pytest
import trustme
from tests.integration.harness import PATIENCE, Family, LoopThread, Served, start

from superpose_proto.v1 import server_pb2, server_pb2_grpc


@dataclass(frozen=True)
class Files:
    """The three files of a server."""

    cert: Path
    key: Path
    client_ca: Path

    def write(self, ca: trustme.CA, clients: trustme.CA | None = None) -> None:
        issued = ca.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(self.key)
        issued.cert_chain_pems[0].write_to_path(self.cert)
        if clients is not None:
            clients.cert_pem.write_to_path(self.client_ca)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    return Files(folder / "cert.pem", folder / "key.pem", folder / "clients.pem")


CA, OTHER_CA = trustme.CA(), trustme.CA()
CLIENTS, OTHER_CLIENTS = trustme.CA(), trustme.CA()


@pytest.fixture(scope="module", params=["tls", "mutual"])
def server(
    request: pytest.FixtureRequest,
    loop: LoopThread,
    gpt2: Family,
    files: Files,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    mutual = request.param == "mutual"
    files.write(CA, CLIENTS)
    server = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("served") / "state",
        http_listen="127.0.0.1:0",
        tls_cert=files.cert,
        tls_key=files.key,
        tls_client_ca=files.client_ca if mutual else None,
    )
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def as_before(server: Served, files: Files) -> None:
    files.write(CA, CLIENTS)


def is_mutual(server: Served) -> bool:
    return server.runtime.config.tls_client_ca is not None


def over_grpc(server: Served, ca: trustme.CA, client: trustme.LeafCert | None) -> bool:
    """Return whether a new connection of gRPC comes to an answer."""
    credentials = grpc.ssl_channel_credentials(
        ca.cert_pem.bytes(),
        client.private_key_pem.bytes() if client else None,
        client.cert_chain_pems[0].bytes() if client else None,
    )
    # Of its own, or gRPC would use another channel's connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(server.address, credentials, options) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        try:
            return bool(stub.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=PATIENCE))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise


def over_http(server: Served, ca: trustme.CA, client: trustme.LeafCert | None) -> bool:
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if client is not None:
        client.configure_cert(context)
    address = server.server.http_address
    with closing(HTTPSConnection(address, timeout=PATIENCE, context=context)) as connection:
        try:
            connection.request("GET", "/v1/server")
            answer = connection.getresponse()
        except (ssl.SSLError, ConnectionError):
            return False
        assert answer.status == 200
        return bool(json.loads(answer.read()))


def gets_in(server: Served, ca: trustme.CA, clients: trustme.CA | None = CLIENTS) -> bool:
    """Return whether both doors let a new client in, who trusts `ca` and shows one of `clients`."""
    client = clients.issue_cert("client") if clients else None
    doors = {over_grpc(server, ca, client), over_http(server, ca, client)}
    assert len(doors) == 1, "the doors differ"
    return doors.pop()


def test_both_doors_show_their_certificate_and_serve(server: Served) -> None:
    assert gets_in(server, CA)
    assert not gets_in(server, OTHER_CA)


def test_clients_without_a_certificate_get_in_unless_it_is_asked_for(server: Served) -> None:
    assert gets_in(server, CA, None) is not is_mutual(server)
    assert gets_in(server, CA, OTHER_CLIENTS) is not is_mutual(server)


def test_nothing_is_said_in_clear(server: Served) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = server_pb2_grpc.ServerServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    host, port = server.server.http_address.split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in plain.recv(100)


def test_a_new_certificate_is_shown_without_a_restart(server: Served, files: Files) -> None:
    for ca, old in ((OTHER_CA, CA), (CA, OTHER_CA)):
        files.write(ca)
        assert gets_in(server, ca)
        assert not gets_in(server, old)


def test_new_authorities_of_clients_count_at_once(server: Served, files: Files) -> None:
    if not is_mutual(server):
        pytest.skip("clients are asked for no certificate")
    OTHER_CLIENTS.cert_pem.write_to_path(files.client_ca)
    assert gets_in(server, CA, OTHER_CLIENTS)
    assert not gets_in(server, CA, CLIENTS)


def test_a_broken_pair_keeps_the_old_one_and_says_so_once(
    server: Served, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    assert gets_in(server, CA)  # So that what was written anew is what the server holds.
    caplog.set_level(logging.INFO)
    other = OTHER_CA.issue_cert("127.0.0.1")
    other.cert_chain_pems[0].write_to_path(files.cert)  # The key follows below.
    assert gets_in(server, CA)
    assert gets_in(server, CA)
    assert caplog.text.count("kept the old certificate: ") == 1
    assert "key values mismatch" in caplog.text
    files.key.write_text("no key")
    assert gets_in(server, CA)
    files.key.unlink()
    assert gets_in(server, CA)
    assert caplog.text.count("kept the old certificate: ") == 3
    other.private_key_pem.write_to_path(files.key)
    assert gets_in(server, OTHER_CA)
    assert "read the certificate again" in caplog.text
    for pem in (other.private_key_pem, CA.issue_cert("x").private_key_pem):
        assert pem.bytes().decode().splitlines()[1] not in caplog.text
