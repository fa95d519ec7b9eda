"""What a client is connected to."""

import math
from typing import Any

import grpc

from superpose_client.access import Access
from superpose_client.call import Call
from superpose_client.channel import channel_options, proxy_of
from superpose_client.credentials import Credentials
from superpose_client.errors import CallError, ClientClosedError, from_rpc_error
from superpose_client.services import SERVICES

DEFAULT_TARGET = "127.0.0.1:50051"
RETRIES = 4


class Connection:
    """The channel to a server, of `grpc` or of `grpc.aio`, and the stubs of all services on it."""

    def __init__(
        self, library: Any, target: str, timeout: float | None, retries: int, access: Access
    ) -> None:
        """Prepare it; the first call makes it. See `Client`.

        Args:
            library: `grpc` or `grpc.aio`.
            target: Address of the server.
            timeout: In seconds, of calls that have none of their own.
            retries: Pauses after which a call may be sent again.
            access: How the server lets the client in.

        Raises:
            AccessError: It cannot be used.
            OSError: One of its files cannot be read.
        """
        self.closed = False
        self.timeout = timeout
        self.retries = retries
        self._proxy = proxy_of(target)
        credentials = Credentials.of(access, [target])
        options = channel_options(target)
        if credentials.channel is None:
            self.channel = library.insecure_channel(target, options=options)
        else:
            self.channel = library.secure_channel(target, credentials.channel, options=options)
        self._metadata = credentials.metadata
        self._stubs = {name: service.stub(self.channel) for name, service in SERVICES.items()}

    def start(self, call: Call[Any], seconds: float) -> Any:
        """Send a call that may take `seconds`, and return what the stub does.

        Raises:
            ClientClosedError: The client was closed.
        """
        service, method = call.method.split(".")
        stub = getattr(self._stubs[service], method)
        try:
            # gRPC writes no deadline as None, and takes no infinity.
            timeout = None if math.isinf(seconds) else seconds
            return stub(call.request, timeout=timeout, metadata=self._metadata)
        except (ValueError, grpc.aio.UsageError) as error:
            if not self.closed:
                raise
            raise ClientClosedError("the client is closed: make a new one") from error

    def failed(self, error: grpc.RpcError) -> CallError:
        """Return the exception for a call that failed."""
        return from_rpc_error(error, self._proxy)
