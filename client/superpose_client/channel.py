"""How a client reaches its server: the options of the channel, and the proxy between, if one is."""

import ipaddress
import json
import os
import re
from typing import NoReturn
from urllib.parse import urlsplit

from superpose_client.errors import NotPicklableError

# gRPC's, of a target that has none.
_DEFAULT_PORT = 443
# Scores with the log-probability of every token are the largest.
_MAX_ANSWER_BYTES = 2**28

# Without a retry policy: what may be sent again is decided in `attempts`.
_OPTIONS = (
    # How large an adapter may be is the server's to say.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    # A gRPC server by default hangs up on clients that ping an idle stream (`watch`) more often
    # than every 5 minutes; common load balancers drop connections idle for somewhat longer.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that comes back is found within about a second. By default the pauses grow to two
    # minutes, a name is looked up once in 30 s, and new clients inherit the pauses of old ones.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
)
TEXTS = "superpose.v1.InferenceService"
"""The service whose health says whether texts are made."""
# Of a server beside others, which may take its requests: a call does not wait for one that is not
# there, nor goes to one that is there but does not serve.
_OPTIONS_OF_SEVERAL = (
    # How long an address that answers nothing holds up the first call; by default 20 s.
    ("grpc.min_reconnect_backoff_ms", 3000),
    # gRPC watches the health of servers only where a policy chooses between addresses.
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [{"round_robin": {}}],
                "healthCheckConfig": {"serviceName": TEXTS},
            }
        ),
    ),
)
# Those of gRPC, in its order.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")


class OfOneProcess:
    """What holds a connection, and can be neither copied nor pickled."""

    def __reduce__(self) -> NoReturn:
        """Refuse.

        Raises:
            NotPicklableError: Always.
        """
        raise NotPicklableError(
            f"{type(self).__name__} holds a connection and cannot be copied or pickled: make a "
            "client where it is used"
        )


def channel_options(address: str, one_of_several: bool) -> tuple[tuple[str, int | str], ...]:
    """Return gRPC's options of a channel to `address`, which knows its proxy."""
    proxied = ("grpc.enable_http_proxy", int(proxy_of(address) is not None))
    return (*_OPTIONS, proxied, *(_OPTIONS_OF_SEVERAL if one_of_several else ()))


def stands_for_several(address: str) -> bool:
    """Return whether an address is a name that several servers may share, as its writer says.

    Without `dns:` gRPC looks a name up just the same, but goes to the first address that answers.
    """
    return address.startswith("dns:")


def proxy_of(target: str) -> str | None:
    """Return how to call the proxy through which gRPC reaches `target`; None without one.

    The environment names it, as gRPC reads it; but whoever listens on loopback is never asked for
    by way of another machine.
    """
    host = _host(target)
    if host is None or _is_here(host):
        return None
    for variable in _PROXY_VARIABLES:
        if value := os.environ.get(variable):
            break
    else:
        return None
    for name in _NO_PROXY_VARIABLES:
        if exempt := os.environ.get(name):
            if any(_matches(host, entry.strip()) for entry in exempt.split(",")):
                return None
            break
    # Without the user and the password that it may hold.
    return f"the proxy {urlsplit(value).netloc.rpartition('@')[2] or value} of {variable}"


def stays_here(target: str) -> bool:
    """Return whether what is sent to a gRPC target never leaves this machine.

    Names below localhost should not, either; but some systems ask a name server for them.
    """
    host = _host(target)
    if host is None:
        return target.startswith(("unix:", "unix-abstract:"))
    return _is_here(host) and not host.lower().endswith(".localhost")


def host_and_port(target: str) -> tuple[str, int] | None:
    """Return the host of a gRPC target, without brackets, and the port; None if it is no host's."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract", "vsock"):
        return None
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        target = re.sub("^//[^/]*/", "", rest)
    if bracketed := re.match(r"\[([^\]]*)\](.*)", target):
        host, port = bracketed[1], bracketed[2].removeprefix(":")
    elif target.count(":") > 1:  # An IPv6 address without a port.
        host, port = target, ""
    else:
        host, _, port = target.partition(":")
    return host, int(port) if port.isdecimal() else _DEFAULT_PORT


def _host(target: str) -> str | None:
    place = host_and_port(target)
    return None if place is None else place[0]


def _is_here(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _matches(host: str, entry: str) -> bool:
    """Return whether an entry of no_proxy, the end of a name or a network, is one of `host`."""
    if not entry:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())
