"""What a client is connected to: a server, or several that take turns."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc

from superpose_client.access import Access
from superpose_client.call import Call
from superpose_client.channel import channel_options, proxy_of, stands_for_several
from superpose_client.credentials import Credentials
from superpose_client.errors import AddressError, CallError, ClientClosedError, from_rpc_error
from superpose_client.services import SERVICES

DEFAULT_TARGET = "127.0.0.1:50051"
RETRIES = 4

Target = str | Sequence[str]
# What a file says that servers follow.
_SAID = {"Mix.AddDomain", "Mix.RemoveDomain", "Mix.SetMix", "Mix.NameMix", "Mix.UnnameMix"}


def addresses_of(target: Target) -> list[str]:
    """Return the addresses of a target, in which commas stand between them.

    Raises:
        AddressError: One is empty.
    """
    texts = [target] if isinstance(target, str) else target
    addresses = [address.strip() for text in texts for address in text.split(",")]
    if not addresses or not all(addresses):
        raise AddressError(f"{target!r} are no addresses, as in host:1,host:2: one is empty")
    return addresses


class Connection:
    """A channel to one server, of `grpc` or of `grpc.aio`, and stubs of all services on it."""

    def __init__(
        self, library: Any, address: str, credentials: Credentials, one_of_several: bool
    ) -> None:
        """Prepare it; the first call makes it."""
        self.closed = False
        self.channels: list[Any] = []  # All but the last were left.
        options = channel_options(address, one_of_several)
        if credentials.channel is None:
            self._channel = partial(library.insecure_channel, address, options=options)
        else:
            self._channel = partial(
                library.secure_channel, address, credentials.channel, options=options
            )
        self._metadata = credentials.metadata
        self._proxy = proxy_of(address)
        self.renew()

    def renew(self) -> None:
        """Send what follows over a new channel; what runs on the one before may go on.

        An exception that a signal handler raises within gRPC, such as KeyboardInterrupt, may leave
        locks of the channel held: the next call would wait for them forever. A closed connection
        stays closed.
        """
        if self.closed:
            return
        channel = self._channel()
        self.channels.append(channel)
        self._stubs = {name: service.stub(channel) for name, service in SERVICES.items()}

    def start(self, call: Call[Any], seconds: float) -> Any:
        """Send a call that may take `seconds`, and return what the stub does.

        Raises:
            ClientClosedError: The client was closed.
        """
        service, method = call.method.split(".")
        stub = getattr(self._stubs[service], method)
        # gRPC writes no deadline as None, and takes no infinity.
        timeout = None if math.isinf(seconds) else seconds
        try:
            return stub(call.request, timeout=timeout, metadata=self._metadata)
        except (ValueError, grpc.aio.UsageError) as error:
            if not self.closed:
                raise
            raise ClientClosedError("the client is closed: make a new one") from error
        except grpc.RpcError:
            raise
        except BaseException:
            self.renew()
            raise

    def failed(self, error: grpc.RpcError) -> CallError:
        """Return the exception for a call that failed."""
        return from_rpc_error(error, self._proxy)


class Connections:
    """The connections of a client.

    gRPC can balance load over one name's addresses, but not over several names, each of which has
    its own certificate. So each address has a channel; gRPC watches the health of its server, fails
    at once what is sent to one that is not there or does not serve, and `Attempts` goes on to the
    next. `dns:NAME:PORT` is one name of several servers: over its addresses gRPC takes the turns.
    """

    def __init__(
        self,
        library: Any,
        target: Target,
        timeout: float | None,
        retries: int,
        access: Access,
    ) -> None:
        """Prepare them. See `Client`.

        Args:
            library: `grpc` or `grpc.aio`.
            target: Addresses.
            timeout: In seconds, of calls that have none of their own.
            retries: Pauses after which a call may be sent again.
            access: How the servers let the client in.

        Raises:
            AddressError: An address is empty.
            AccessError: The access cannot be used.
            OSError: One of its files cannot be read.
        """
        self.timeout = timeout
        self.retries = retries
        self.addresses = addresses_of(target)
        credentials = Credentials.of(access, self.addresses)
        self._several = len(self.addresses) > 1 or any(map(stands_for_several, self.addresses))
        self.all = [
            Connection(library, each, credentials, self._several) for each in self.addresses
        ]
        self._turns = itertools.count()

    def for_call(self, call: Call[Any]) -> list[Connection]:
        """Return the connections that may carry a call, from the one whose turn it is.

        Raises:
            AddressError: The call is about one server, and there are several.
        """
        if self._several and not call.method.startswith("Inference."):
            raise AddressError(
                f"{call.method} is about one server, not about whichever of "
                f"{', '.join(self.addresses)} has its turn: give the address of one"
                + (", or change the file that the servers follow" if call.method in _SAID else "")
            )
        first = next(self._turns) % len(self.all)
        return [*self.all[first:], *self.all[:first]]
