"""A name server of one name, on loopback: so that a name can have several addresses in a test."""

import socket
import struct
import threading
from ipaddress import IPv4Address
from types import TracebackType
from typing import Self

_A, _IN = 1, 1


class NameServer:
    """Answers for `name` while its `with` block runs, and for nothing else.

    Attributes:
        authority: Where gRPC asks it: dns://AUTHORITY/NAME:PORT.
        addresses: What `name` is; may be changed.
    """

    def __init__(self, name: str, addresses: list[str]) -> None:
        self.addresses = addresses
        self._name = (
            b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
        )
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.authority = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._answer_all, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ender:
            ender.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _answer_all(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._answer(query), sender)

    def _answer(self, query: bytes) -> bytes:
        name = query[12 : query.index(b"\0", 12) + 1]
        kind = struct.unpack_from(">H", query, 12 + len(name))[0]
        known = (name.lower(), kind) == (self._name, _A)
        found = [IPv4Address(address).packed for address in self.addresses] if known else []
        # A response without an error, with the question, and no more sections than answers.
        head = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(found), 0, 0)
        question = query[12 : 12 + len(name) + 4]
        # Each answer's name is that of the question (offset 12); it is good for no time.
        return (
            head
            + question
            + b"".join(
                struct.pack(">HHHIH", 0xC00C, _A, _IN, 0, len(each)) + each for each in found
            )
        )
