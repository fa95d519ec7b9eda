"""From the access that a client is given to what gRPC takes, checked before anything is sent."""

import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import grpc

from superpose_client.access import Access
from superpose_client.channel import stays_here
from superpose_client.errors import AccessError

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Credentials:
    """What access comes to: of the channel, None if it is not encrypted, and of each call."""

    channel: grpc.ChannelCredentials | None
    metadata: Metadata

    @classmethod
    def of(cls, access: Access, addresses: Sequence[str]) -> Self:
        """Read and check them, for a client of these addresses.

        Raises:
            AccessError: They cannot be used, or would go out unencrypted.
            OSError: A file cannot be read.
        """
        channel = None
        if tls_context(access) is not None:
            pems = (_read(access.get("ca")), _read(access.get("key")))
            channel = grpc.ssl_channel_credentials(*pems, _read(access.get("certificate")))
        metadata = _metadata(access.get("token"))
        if metadata and channel is None and not access.get("insecure"):
            for address in addresses:
                if not stays_here(address):
                    raise AccessError(
                        f"the token would go to {address} unencrypted: encrypt with ca or tls, "
                        "or say insecure to send it so"
                    )
        return cls(channel, metadata)


def tls_context(access: Access) -> ssl.SSLContext | None:
    """Return what Python connects with where gRPC is given this access; None without TLS.

    gRPC says nothing of files that it cannot use, so this is also what checks them.

    Raises:
        AccessError: They cannot be used.
        OSError: A file cannot be read.
    """
    ca, certificate, key = (access.get("ca"), access.get("certificate"), access.get("key"))
    if (certificate is None) != (key is None):
        raise AccessError("a client certificate and its key come together: give both")
    if ca is None and certificate is None and not access.get("tls"):
        return None
    context = (
        ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    )
    if ca is not None:
        _read(ca)
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise AccessError(f"{ca} holds no certificate in PEM") from error
    if certificate is not None and key is not None:
        _read(certificate)
        _read(key)
        try:
            # A password, or it would be asked for on the terminal; gRPC takes none.
            context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError as error:
            raise AccessError(
                f"{certificate} and {key} are no certificate and its key, in PEM and without a "
                "password"
            ) from error
    return context


def _read(path: str | PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


def _metadata(token: str | None) -> Metadata:
    if token is None:
        return ()
    if not re.fullmatch("[!-~]+", token):
        # Not even a part of it is told.
        raise AccessError(
            "the token is empty, or holds white space or other characters that no token has"
        )
    return (("authorization", f"Bearer {token}"),)
