"""Why there is no connection by TLS, or only by TLS, in words.

gRPC tells of an authority that is not trusted, in its own words, of a wrong name in fewer, and
nothing where the other side hangs up. So `adapterctl`, having failed, asks once more by itself.
"""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from superpose_client.access import Access
from superpose_client.channel import host_and_port, proxy_of
from superpose_client.credentials import tls_context

_SECONDS = 3.0


def tls_fault(address: str, access: Access) -> str | None:
    """Return what is wrong between a server and the TLS that it is asked for, if it is that."""
    place = host_and_port(address)
    if place is None or proxy_of(address) is not None:
        return None
    context = tls_context(access)
    if context is None:
        return "the server speaks TLS: give --ca or --tls" if _speaks_tls(place) else None
    try:
        with _connected(place, context) as server:
            # A client's certificate is refused after the handshake, by hanging up.
            if server.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        why = error.verify_message.rstrip(".")
        return f"the server's certificate is not to be trusted: {why}"
    except ssl.SSLError as error:
        if not _is_answer(error):
            return "the server does not speak TLS: leave --ca, --tls and --cert out"
    except ConnectionResetError:
        pass
    except OSError:
        return None
    if access.get("certificate") is None:
        return "the server hangs up: it may want a certificate of yours, --cert and --key"
    return "the server hangs up: it may not trust the certificate of --cert"


def _speaks_tls(place: tuple[str, int]) -> bool:
    # Nothing is sent through it, so that it does not matter whose it is.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with _connected(place, context):
            return True
    except ssl.SSLError as error:
        return _is_answer(error)
    except OSError:
        return False


@contextmanager
def _connected(place: tuple[str, int], context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(place, _SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=place[0]) as encrypted,
    ):
        yield encrypted


def _is_answer(error: ssl.SSLError) -> bool:
    """Return whether it is the other side that ends the handshake, in the words of TLS."""
    return "ALERT" in (error.reason or "")
