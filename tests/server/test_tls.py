"""Files that are no certificate and its key keep a server from starting, in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from superpose_server.door.tls import Tls
from superpose_server.errors import StartupError


@pytest.fixture
def cert(tmp_path: Path) -> tuple[Path, Path]:
    issued = trustme.CA().issue_cert("localhost")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    return cert, key


def refused(cert: Path, key: Path, client_ca: Path | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        Tls(cert, key, client_ca)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_pair_that_fits_is_taken(cert: tuple[Path, Path]) -> None:
    identity = Tls(*cert, None).identity()
    assert (identity.chain, identity.key) == tuple(path.read_bytes() for path in cert)


def test_files_that_are_not_there_are_named(cert: tuple[Path, Path], tmp_path: Path) -> None:
    none = tmp_path / "none.pem"
    assert refused(none, cert[1]) == f"--tls-cert {none} cannot be read (No such file or directory)"
    assert f"--tls-key {none} cannot be read" in refused(cert[0], none)
    assert f"--tls-client-ca {none} cannot be read" in refused(*cert, none)


def test_what_does_not_fit_is_refused(cert: tuple[Path, Path], tmp_path: Path) -> None:
    cert_file, key_file = cert
    other = tmp_path / "other.key"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    assert "key values mismatch" in refused(cert_file, other)
    assert "are no certificate and its key" in refused(key_file, cert_file)
    text = tmp_path / "text"
    text.write_text("hello")
    for pair in ((text, key_file), (cert_file, text)):
        assert "are no certificate and its key" in refused(*pair)
    for authorities in (text, key_file):
        assert "holds no certificates" in refused(*cert, authorities)
    text.write_bytes(b"\xff")
    assert "holds no certificates" in refused(*cert, text)


def test_a_key_with_a_password_is_refused_and_asks_nobody(
    cert: tuple[Path, Path], tmp_path: Path
) -> None:
    cert_file, key_file = cert
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert re.search("the key without a password", refused(cert_file, locked))
