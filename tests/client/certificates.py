"""Certificates for tests, of an authority that nobody else trusts."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme

CA = trustme.CA


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files in PEM."""

    certificate: Path
    key: Path


def file_of(ca: trustme.CA, path: Path) -> Path:
    """Write the certificate of an authority."""
    ca.cert_pem.write_to_path(path)
    return path


def pair(ca: trustme.CA, folder: Path, name: str = "client") -> Pair:
    """Issue a certificate and write it and its key."""
    issued = ca.issue_cert(name)
    made = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    issued.private_key_pem.write_to_path(made.key)
    return made


def server_credentials(
    ca: trustme.CA,
    name: str = "127.0.0.1",
    *,
    days: float = 1,
    clients: trustme.CA | None = None,
) -> grpc.ServerCredentials:
    """Issue a server's certificate that ends in `days`, and ask clients for one of `clients`."""
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days)
    issued = ca.issue_cert(name, not_after=ends)
    return grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())],
        clients.cert_pem.bytes() if clients else None,
        require_client_auth=clients is not None,
    )
