"""TLS: the certificate of both doors, read again when its files change.

A handshake takes what the files hold then, so that a renewed certificate needs no restart; what
has its connection keeps it. A pair that does not fit, as when one of the files is still the old
one, changes nothing until it does.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose_server.config import ServerConfig
from superpose_server.door.reread import Reread
from superpose_server.errors import StartupError


@dataclass(frozen=True)
class Identity:
    """What the server shows, and what it asks of clients.

    Attributes:
        chain: Its certificate and those of the authorities between, in PEM.
        key: The certificate's key, in PEM.
        client_ca: Authorities one of which has to stand behind a client, in PEM; None: any client.
        context: The same for Python's own TLS, which speaks HTTP/1.1.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class Tls:
    """The identity that the configuration names, as its files are now."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Read the files.

        Raises:
            StartupError: They cannot be read, or do not fit.
        """
        paths = [cert, key, *([client_ca] if client_ca else [])]
        try:
            self._identity = Reread("certificate", paths, lambda: _read(cert, key, client_ca))
        except ValueError as error:
            raise StartupError(str(error)) from error
        self.asks_clients = client_ca is not None
        self.context = self._identity.get().context
        # Python calls this at the beginning of every handshake, whether a name is asked for or not.
        self.context.sni_callback = self._renew

    @classmethod
    def of(cls, config: ServerConfig) -> Tls | None:
        """Return what the configuration asks for; None: no TLS.

        Raises:
            StartupError: See `Tls`.
        """
        if config.tls_cert is None or config.tls_key is None:
            return None
        return cls(config.tls_cert, config.tls_key, config.tls_client_ca)

    def identity(self) -> Identity:
        """Return what the files hold now; for any thread."""
        return self._identity.get()

    def _renew(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self.identity().context


def _read(cert: Path, key: Path, client_ca: Path | None) -> Identity:
    """Return what the files hold.

    Raises:
        ValueError: They cannot be read, or do not fit.
    """
    chain = _bytes("tls-cert", cert)
    held = _bytes("tls-key", key)
    authorities = None if client_ca is None else _bytes("tls-client-ca", client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    # A session that is taken up again would pass by who may come in by now.
    context.num_tickets = 0
    try:
        # Without the password, it would ask on the terminal for that of a key that has one.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tls-cert {cert} and --tls-key {key} are no certificate and its key, both in PEM, "
            f"the key without a password ({_why(error)})"
        ) from error
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # As of sessions: 1.2 takes them up alone.
        try:
            context.load_verify_locations(cadata=authorities.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"--tls-client-ca {client_ca} holds no certificates in PEM ({_why(error)})"
            ) from error
    return Identity(chain, held, authorities, context)


def _bytes(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--{flag} {path} cannot be read ({error.strerror})") from error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # OpenSSL's word, such as KEY_VALUES_MISMATCH
    return str(reason).replace("_", " ").lower() if reason else "unreadable"
