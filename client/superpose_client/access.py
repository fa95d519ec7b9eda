"""How a client is let in, and how it knows that what answers is its server."""

from os import PathLike
from typing import TypedDict


class Access(TypedDict, total=False):
    """The options of a client that have to do with access; each may be left out.

    Args:
        token: Goes out with every call, as `authorization: Bearer TOKEN`, and unencrypted to
            loopback only.
        ca: File of the authorities in PEM, one of which must have signed the server's certificate.
            Turns TLS on.
        tls: Turns TLS on without `ca`: what gRPC trusts is trusted, the public authorities or those
            in the file that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names.
        certificate: File in PEM for servers that ask clients for one, with what signed it below it.
            Turns TLS on.
        key: File of its key in PEM, without a password.
        insecure: Let the token go out unencrypted, wherever to. Certificates are checked all the
            same.

    Files are read once, when the client is made.
    """

    token: str | None
    ca: str | PathLike[str] | None
    tls: bool | None
    certificate: str | PathLike[str] | None
    key: str | PathLike[str] | None
    insecure: bool | None
