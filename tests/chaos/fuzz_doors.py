"""Mutated requests over sockets, to every method of both doors: `python -m tests.chaos.fuzz_doors`.

Whatever is sent, each call ends soon, with an answer or one of the errors of `errors.py`, in one
line that tells of no path and no trace. The server grows by nothing, its log holds no fault, and it
comes back from its state folder as it was.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

import grpc
from tests.chaos.footprint import MIB
from tests.chaos.http_socket import PATIENCE, exchange
from tests.chaos.mutation import (
    json_bytes,
    message_bytes,
    mutate_bytes,
    mutate_text,
    safetensors_bytes,
)
from tests.chaos.script import Record, make_parser
from tests.chaos.server import Victim, check_whole, settled, victim
from tests.chaos.valid_requests import HTTP, Call, Rpc, every_rpc
from tests.integration.harness import ServerProcess

from superpose_client.errors import from_rpc_error
from superpose_proto.v1 import adapter_pb2

INPUTS, SHORT_INPUTS = 20_000, 400
WORKERS = 3  # for each door
# No request of these takes a second alone; a fit may take many.
SECONDS = 60.0
# Of a stream that are read; a watch without a change has one.
RESPONSES = 8
# What adapters that were pushed under new names take, and what pools of threads and buffers keep.
GROWTH_MIB, GROWTH_THREADS, GROWTH_FILES = 32.0, 6, 4
BOUNDARY = b"superpose"
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_PARAMETER = re.compile(r"\{[^}]*\}")
# The server's own faults, and what only a server that ends or is full says.
FAULTS = {500, 501, 502, 503, 504}
# What is UNAVAILABLE because the request asks for it: a generation that was never there.
AHEAD = "GENERATION_NOT_REACHED"


@dataclass
class Outcomes:
    """What came of the requests to one door.

    Attributes:
        statuses: How many ended how.
        found: What was wrong, a line each.
        slowest: Seconds of the request that took longest, and which it was.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: str, what: str, wrong: str | None, seconds: float) -> None:
        """Count an outcome; keep what is wrong with it."""
        with self._lock:
            self.statuses[status] += 1
            self.slowest = max(self.slowest, (seconds, what[:200]))
            if wrong is not None:
                self.found.append(f"{what}: {wrong}"[:1000])


def _wrong_words(message: str, reason: str | None, secrets: tuple[str, ...]) -> str | None:
    if not message or not message.isprintable() or len(message) > 2000:
        return f"not one line: {message[:300]!r}"
    if not reason or reason == "INTERNAL":
        return f"reason {reason}: {message[:300]}"
    told = [secret for secret in secrets if secret in message]
    return f"tells {told[0]}: {message[:300]}" if told else None


# gRPC.


class GrpcDoor:
    """Sends mutated messages."""

    def __init__(self, server: ServerProcess, target: Victim, outcomes: Outcomes) -> None:
        # Bytes go as they are, for which the types have no words.
        self.channel: Any = grpc.insecure_channel(server.address)
        self.secrets, self.outcomes = target.secrets, outcomes
        files = [_files(target, name) for name in target.adapters]
        pushes = tuple(
            Rpc(
                "superpose.v1.AdapterService/PushAdapter",
                adapter_pb2.PushAdapterRequest(
                    domain="d", config=config, tensors=tensors, replace=True
                ),
            )
            for config, tensors in files
        )
        self.calls = (*every_rpc(), *pushes)

    def send(self, random: Random) -> None:
        rpc = random.choice(self.calls)
        data = self._mutated(random, rpc)
        multi = self.channel.unary_stream if rpc.streamed else self.channel.unary_unary
        call: Any = multi(f"/{rpc.method}")
        began = time.monotonic()
        try:
            if rpc.streamed:
                stream = call(data, timeout=SECONDS)
                for _ in islice(stream, 1 if rpc.method.endswith("/WatchMix") else RESPONSES):
                    pass
                stream.cancel()
            else:
                call(data, timeout=SECONDS)
            status, wrong = "OK", None
        except grpc.RpcError as error:
            status, wrong = error.code().name, self._wrong(error)
        seconds = time.monotonic() - began
        self.outcomes.note(status, f"{rpc.method} {data[:200]!r}", wrong, seconds)

    def _mutated(self, random: Random, rpc: Rpc) -> bytes:
        message: Any = rpc.message
        if isinstance(message, adapter_pb2.PushAdapterRequest) and random.random() < 0.7:
            changed = adapter_pb2.PushAdapterRequest()
            changed.CopyFrom(message)
            if random.random() < 0.5 and message.tensors:
                changed.tensors = safetensors_bytes(random, message.tensors)
            else:
                changed.config = json_bytes(random, message.config)
            return changed.SerializeToString()
        return message_bytes(type(message))(random, message.SerializeToString())

    def _wrong(self, error: grpc.RpcError) -> str | None:
        caught = from_rpc_error(error)
        if error.code() not in CODES and caught.reason != AHEAD:
            return f"ended with {error.code().name}: {caught.message[:300]}"
        return _wrong_words(caught.message, caught.reason, self.secrets)


# HTTP.


class HttpDoor:
    """Sends mutated requests, some of them mutated down to their framing."""

    def __init__(self, server: ServerProcess, target: Victim, outcomes: Outcomes) -> None:
        self.address = server.ready["http"]
        self.secrets, self.outcomes = target.secrets, outcomes
        self.files = [_files(target, name) for name in target.adapters]
        self.calls = every_call(self.address)

    def send(self, random: Random) -> None:
        call = random.choice(self.calls)
        method, target, headers, body = call.method, call.at or call.path, dict(call.headers), b""
        if call.path.startswith("/v1/adapters/") and method == "PUT":
            headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY.decode()}"
            body = self._form(random)
        elif call.body:
            headers["Content-Type"] = "application/json"
            body = call.body
        how = random.randrange(10)
        if how < 6 and call.body:
            body = json_bytes(random, body)
        elif how < 8:
            target = mutate_text(random, target)
        elif how == 8:
            method, headers = self._other_head(random, method, headers)
        request = self._written(method, target, headers, body)
        whole = how != 9
        if not whole:
            request = mutate_bytes(random, request)
        self._check(call, request, whole and " " not in target)

    def _check(self, call: Call, request: bytes, whole: bool) -> None:
        what = f"{call.method} {call.path} {request[:300]!r}"
        began = time.monotonic()
        try:
            reply = exchange(
                self.address, request, whole=whole, endless=call.path == "/v1/mix/events"
            )
        except TimeoutError:
            self.outcomes.note("none", what, "no answer came", PATIENCE)
            return
        status, error = reply.status, reply.error
        wrong = None
        if status == 0:
            wrong = "no answer" if whole else None
        elif status in FAULTS and call.path != "/readyz" and (error or {}).get("code") != AHEAD:
            wrong = f"status {status}: {reply.body[:300]!r}"
        elif error is not None:
            wrong = _wrong_words(str(error.get("message")), error.get("code"), self.secrets)
        elif status >= 400 and reply.body:
            wrong = f"an error in no form: {reply.body[:300]!r}"
        self.outcomes.note(str(status), what, wrong, time.monotonic() - began)

    def _written(self, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
        fields = {"Host": self.address, "Connection": "close", **headers}
        if body:
            fields.setdefault("Content-Length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        path = target.encode("utf-8", "surrogatepass").replace(b"\r", b"%0D").replace(b"\n", b"%0A")
        return (
            method.encode()
            + b" "
            + path
            + b" HTTP/1.1\r\n"
            + head.encode("latin-1", "replace")
            + (b"\r\n" + body)
        )

    def _other_head(
        self, random: Random, method: str, headers: dict[str, str]
    ) -> tuple[str, dict[str, str]]:
        if random.random() < 0.3:
            return random.choice(("GET", "PUT", "POST", "DELETE", "OPTIONS", "PATCH")), headers
        name = random.choice(
            ("Content-Type", "If-Match", "X-Request-Id", "Origin", "Content-Encoding", "Accept")
        )
        value = mutate_text(random, headers.get(name, '"3"'))
        return method, {**headers, name: value.replace("\r", " ").replace("\n", " ").strip()}

    def _form(self, random: Random) -> bytes:
        config, tensors = random.choice(self.files)
        if random.random() < 0.4:
            config = json_bytes(random, config)
        elif random.random() < 0.6:
            tensors = safetensors_bytes(random, tensors)
        parts = {"adapter_config.json": config, "adapter_model.safetensors": tensors}
        form = b"".join(
            b"--%b\r\nContent-Disposition: form-data; name=%b; filename=f\r\n\r\n%b\r\n"
            % (BOUNDARY, b'"' + name.encode() + b'"', data)
            for name, data in parts.items()
        )
        whole = form + b"--" + BOUNDARY + b"--\r\n"
        return mutate_bytes(random, whole) if random.random() < 0.2 else whole


def _files(target: Victim, name: str) -> tuple[bytes, bytes]:
    folder = target.adapters[name]
    return (
        (folder / "adapter_config.json").read_bytes(),
        (folder / "adapter_model.safetensors").read_bytes(),
    )


def every_call(address: str) -> tuple[Call, ...]:
    """Return the valid calls, and one to each other operation that a server's document has."""
    asked = f"GET /openapi.json HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    document = json.loads(exchange(address, asked.encode(), whole=True).body)
    known = {(call.method, call.path) for call in HTTP}
    others = [
        Call(method.upper(), path, _PARAMETER.sub("a", path), b"{}" * ("requestBody" in operation))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if (method.upper(), path) not in known
    ]
    return (*HTTP, *others)


def storm(sends: Mapping[str, Callable[[Random], None]], inputs: int, seed: str) -> None:
    """Send `inputs` requests, the same share to each door, from a few threads each."""
    share = inputs // (len(sends) * WORKERS)

    def work(name: str, worker: int) -> None:
        random = Random(f"{seed} {name} {worker}")
        for _ in range(share):
            sends[name](random)

    with ThreadPoolExecutor(len(sends) * WORKERS) as pool:
        for done in [pool.submit(work, name, n) for name in sends for n in range(WORKERS)]:
            done.result()


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Mutated requests over sockets, to both doors.")
    parser.add_argument("--inputs", type=int, help="of both doors together")
    asked = parser.parse_args(arguments)
    inputs = asked.inputs or (SHORT_INPUTS if asked.short else INPUTS)
    record = Record("fuzz_doors", {"inputs": inputs, "seed": asked.seed})
    doors = {"grpc": Outcomes(), "http": Outcomes()}
    with victim() as target:
        with target.serving(record, "--max-batch=8", "--log-level=warning") as server:
            target.push_all(server)
            over_grpc = GrpcDoor(server, target, doors["grpc"])
            over_http = HttpDoor(server, target, doors["http"])
            sends = {"grpc": over_grpc.send, "http": over_http.send}
            storm(sends, max(inputs // 5, 60), f"{asked.seed} first")
            before, began = settled(server), time.monotonic()
            storm(sends, inputs, str(asked.seed))
            record.add({"inputs_per_second": round(inputs / (time.monotonic() - began))})
            after = settled(server)
            record.lost += before.growth(
                after, mib=GROWTH_MIB, threads=GROWTH_THREADS, files=GROWTH_FILES
            )
            check_whole(record, server, target)
            with server.client() as client:
                state, adapters = client.mix(), client.adapters()
            over_grpc.channel.close()
        with target.serving(record) as server, server.client() as client:
            record.check(
                (client.mix().digest, client.mix().generation) == (state.digest, state.generation),
                "the default mix came back as another",
            )
            record.check(client.adapters() == adapters, "other adapters came back")
            record.check(client.verify().ok, "what came back fails its verification")
    for name, outcomes in doors.items():
        record.lost += [f"{name}: {line}" for line in outcomes.found[:20]]
        record.check(len(outcomes.found) <= 20, f"{name}: {len(outcomes.found)} findings")
        record.add({name: dict(outcomes.statuses), f"{name}_slowest": outcomes.slowest})
    record.add({"growth_mib": round((after.rss - before.rss) / MIB, 1)})
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
