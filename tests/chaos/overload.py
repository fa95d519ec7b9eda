"""More than a server can take, of everything that clients do: `python -m tests.chaos.overload`.

Floods of connections and of requests, deadlines that nobody can keep, readers that do not read,
clients that vanish, prompts without measure. Meanwhile others are answered; afterwards nothing is
left running, the server has grown by nothing, and its weights are whole.
"""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
from tests.chaos.footprint import MIB, Footprint
from tests.chaos.http_socket import Reply, connect, exchange
from tests.chaos.script import Record, make_parser
from tests.chaos.server import check_whole, settled, victim
from tests.integration.harness import ServerProcess

from superpose_client import CallError
from superpose_client.errors import from_rpc_error
from superpose_proto.v1 import inference_pb2 as pb
from superpose_proto.v1.inference_pb2_grpc import InferenceServiceStub

SHORT = 0.02
CONTEXT, BATCH, QUEUE = 512, 8, 16
PROMPT = "The sum of"
# Whoever asks in the midst of a storm gets an answer within this, on a machine of two cores that
# also runs the storm.
PATIENCE = 30.0
# A new shell's usual limit of open files, which is that of a service, too.
FILES = 1024
# So small that a stream which is not read stops its sender soon.
WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
# A storm's rows, connections and buffers are gone; what pools keep may stay.
GROWTH_MIB, GROWTH_THREADS, GROWTH_FILES = 32.0, 6, 4
ROUNDS_AFTER = 10


@dataclass(frozen=True)
class Storm:
    """What every storm is given.

    Attributes:
        server: Stays the same for all of them.
        record: Gets what was lost.
        scale: 1, or the share that a short form has.
        random: Of all that is drawn.
    """

    server: ServerProcess
    record: Record
    scale: float
    random: Random

    def count(self, number: int) -> int:
        return max(1, int(number * self.scale))

    @property
    def http(self) -> str:
        return self.server.ready["http"]

    def ask_http(self, method: str, path: str, **fields: Any) -> Reply:
        return exchange(self.http, written(self.http, method, path, **fields), whole=True)

    def check_others(self, when: str) -> None:
        """Check that one who asks now, on a new connection of either door, is answered."""
        began = time.monotonic()
        with self.server.client() as client:
            chunk = client.generate(PROMPT, max_new_tokens=2, ignore_eos=True, timeout=PATIENCE)
        self.record.check(len(chunk.token_ids) == 2, f"{when}: no text over gRPC")
        for method, path, fields in (
            ("GET", "/healthz", {}),
            ("GET", "/readyz", {}),
            ("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True}),
        ):
            reply = self.ask_http(method, path, **fields)
            self.record.check(reply.status == 200, f"{when}: {path} is {reply.status}")
        seconds = time.monotonic() - began
        self.record.check(seconds < PATIENCE, f"{when}: others waited for {seconds:.1f} s")


def written(address: str, method: str, path: str, **fields: Any) -> bytes:
    """Return a request as bytes."""
    body = json.dumps(fields).encode() if fields else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def begin(channel: grpc.Channel, tokens: int, timeout: float = PATIENCE) -> Any:
    """Begin a stream that nobody reads."""
    options = pb.GenerateOptions(max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    request = pb.GenerateStreamRequest(prompt=PROMPT, options=options)
    return InferenceServiceStub(channel).GenerateStream(request, timeout=timeout)


def reset(connection: socket.socket) -> None:
    """Close a connection as a machine does that has crashed and come back."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# The storms.


def idle_connections(storm: Storm) -> None:
    """Hold a thousand connections that send nothing, to each door."""
    with ExitStack() as held:
        for _ in range(storm.count(1000)):
            for address in (storm.http, storm.server.address):
                held.enter_context(connect(address))
        storm.check_others("beside idle connections")


def connection_flood(storm: Storm) -> None:
    """Open connections as fast as may be, and leave each in some bad way."""
    whole = written(storm.http, "GET", "/v1/mix")
    sent = (
        b"",
        b"GET / HT",
        whole[:-2],
        whole,
        b"\x16\x03\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    )
    for _ in range(storm.count(5000)):
        connection = connect(storm.random.choice((storm.http, storm.server.address)))
        try:
            connection.sendall(storm.random.choice(sent))
            if storm.random.random() < 0.5:
                reset(connection)
        except ConnectionError:
            pass  # Refused already.
        finally:
            connection.close()
    storm.check_others("after a flood of connections")


def ten_times_too_much(storm: Storm) -> None:
    """Ask with ten times as many at once as may run and wait."""
    asked = 10 * (BATCH + QUEUE) if storm.scale == 1 else 2 * (BATCH + QUEUE)
    rounds = storm.count(5)
    outcomes: Counter[str] = Counter()
    channels = [grpc.insecure_channel(storm.server.address) for _ in range(4)]

    def over_grpc(number: int) -> str:
        options = pb.GenerateOptions(max_new_tokens=32, ignore_eos=True)
        request = pb.GenerateRequest(prompt=PROMPT, options=options)
        try:
            InferenceServiceStub(channels[number % 4]).Generate(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            caught = from_rpc_error(error)
            hint = getattr(caught, "retry_after_seconds", None)
            return f"{caught.reason} {'with' if hint else 'without'} a hint"
        return "OK"

    def over_http(number: int) -> str:
        reply = storm.ask_http(
            "POST", "/v1/completions", prompt=PROMPT, max_tokens=32, ignore_eos=True
        )
        if reply.status == 200:
            return "OK"
        hint = "with" if "retry-after" in reply.head else "without"
        return f"{(reply.error or {}).get('code', reply.status)} {hint} a hint"

    with ThreadPoolExecutor(asked) as pool:
        for _ in range(rounds):
            futures = [pool.submit((over_grpc, over_http)[n % 2], n) for n in range(asked)]
            outcomes.update(future.result() for future in futures)
            storm_is_over = outcomes["OK"] >= BATCH
            storm.record.check(storm_is_over, "overload: fewer answers than rows that may run")
    for channel in channels:
        channel.close()
    allowed = {"OK", "QUEUE_FULL with a hint"}
    storm.record.check(set(outcomes) <= allowed, f"overload: {dict(outcomes)}")
    storm.record.add({"overload": dict(outcomes)})
    storm.check_others("after ten times too much")


def deadline_storm(storm: Storm) -> None:
    """Give deadlines that nobody can keep."""
    outcomes: Counter[str] = Counter()
    with grpc.insecure_channel(storm.server.address) as channel:
        stub: Any = InferenceServiceStub(channel)
        options = pb.GenerateOptions(max_new_tokens=400, ignore_eos=True)
        request = pb.GenerateRequest(prompt=PROMPT, options=options)
        calls = [
            stub.Generate.future(request, timeout=storm.random.uniform(0.001, 0.1))
            for _ in range(storm.count(1000))
        ]
        outcomes.update(call.exception().code().name for call in calls if call.exception())
    storm.record.check(
        set(outcomes) <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}, f"deadlines: {outcomes}"
    )
    storm.record.add({"deadlines": dict(outcomes)})
    storm.check_others("after a storm of deadlines")


def dropped_clients(storm: Storm) -> None:
    """Begin streams and vanish: by a cancellation, by closing a channel, by a reset."""
    fields = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    asked = written(storm.http, "POST", "/v1/completions", **fields)
    for number in range(storm.count(300)):
        if number % 3 == 0:
            connection = connect(storm.http)
            connection.sendall(asked)
            if storm.random.random() < 0.5:
                connection.recv(1 << 12)
            reset(connection)
            continue
        channel = grpc.insecure_channel(storm.server.address)
        call = begin(channel, 400)
        try:
            if storm.random.random() < 0.5:
                next(call)
        except grpc.RpcError as error:
            reason = from_rpc_error(error).reason
            storm.record.check(reason == "QUEUE_FULL", f"dropped clients: {reason}")
        if number % 3 == 1:
            call.cancel()
        channel.close()
    storm.check_others("after clients that vanished")


def slow_readers(storm: Storm) -> None:
    """Let as many streams as may run be read by nobody, while others ask."""
    fields = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with ExitStack() as held:
        for _ in range(BATCH // 2):
            channel = held.enter_context(
                grpc.insecure_channel(storm.server.address, options=WINDOW)
            )
            held.callback(begin(channel, 400).cancel)
            connection = held.enter_context(connect(storm.http))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.sendall(written(storm.http, "POST", "/v1/completions", **fields))
        storm.check_others("beside readers that do not read")


def prompts_without_measure(storm: Storm) -> None:
    """Send texts, ids, items and bodies that no context could hold; each is told which is."""
    text, ids = "a" * (1 << 20), [1] * 500_000
    with storm.server.client() as client:
        calls: dict[str, Callable[[], object]] = {
            "PROMPT_TOO_LONG": lambda: client.generate(text),
            "TEXT_TOO_LONG": lambda: client.generate(text + "a"),
            "PROMPT_TOO_LONG ": lambda: client.generate(ids),
            "TEXT_TOO_LONG ": lambda: client.score([text + "a"]),
        }
        stream = client.stream(PROMPT, max_new_tokens=400, ignore_eos=True)
        gaps = _gaps(stream)
        with ThreadPoolExecutor(1) as pool:
            longest = pool.submit(lambda: max(gaps))
            for _ in range(storm.count(3)):
                for reason, call in calls.items():
                    storm.record.check(_reason(call) == reason.strip(), f"giant prompt: {reason}")
            storm.record.add({"longest_gap_beside_giants_s": round(longest.result(PATIENCE), 3)})
    for prompt, status in ((text, 400), ("a" * (9 << 20), 413), (ids, 400)):
        request = written(storm.http, "POST", "/v1/completions", prompt=prompt)
        # A connection that is to end with the answer ends before what is refused unread was sent.
        kept = request.replace(b"Connection: close\r\n", b"", 1)
        reply = exchange(storm.http, kept, whole=True)
        storm.record.check(reply.status == status, f"giant body: {reply.status}, not {status}")
    storm.check_others("after giant prompts")


def _gaps(stream: Iterator[object]) -> Iterator[float]:
    last = time.monotonic()
    for _ in stream:
        now = time.monotonic()
        yield now - last
        last = now


def _reason(call: Callable[[], object]) -> str:
    try:
        call()
    except CallError as error:
        return str(error.reason)
    return "OK"


STORMS: tuple[Callable[[Storm], None], ...] = (
    idle_connections,
    connection_flood,
    ten_times_too_much,
    deadline_storm,
    dropped_clients,
    slow_readers,
    prompts_without_measure,
)


@contextmanager
def few_files() -> Iterator[None]:
    """Let what is started meanwhile have no more open files than a shell usually gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _later(server: ServerProcess, gentle: Storm) -> Iterator[Footprint]:
    """Yield how large a server is after some rounds of ordinary requests.

    Texts of a megabyte leave malloc with 200 MiB and more, which it gives back when it comes to it.
    """
    for _ in range(ROUNDS_AFTER):
        ten_times_too_much(gentle)
        yield settled(server)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Floods, storms and clients that vanish, on both doors.")
    parser.add_argument("--only", default="", help="the storm of this name")
    asked = parser.parse_args(arguments)
    record = Record("overload", {"seed": asked.seed})
    flags = (f"--max-batch={BATCH}", f"--max-queue={QUEUE}", "--log-level=warning")
    with victim(context=CONTEXT) as target, ExitStack() as ends:
        with few_files():
            server = ends.enter_context(target.serving(record, *flags))
        target.push_all(server)
        storm = Storm(server, record, SHORT if asked.short else 1.0, Random(asked.seed))
        storms = [each for each in STORMS if asked.only in each.__name__]
        if not asked.short:
            gentle = Storm(server, Record("warm-up"), SHORT, Random(asked.seed + 1))
            for each in storms:
                each(gentle)
        before, seconds = settled(server), {}
        for each in storms:
            began = time.monotonic()
            each(storm)
            settled(server)
            seconds[each.__name__] = round(time.monotonic() - began, 1)
            print(f"{each.__name__}: {seconds[each.__name__]} s", file=sys.stderr)
        after = settled(server)
        if not asked.short:  # Which is what pools and caches are filled by.
            after = min([after, *_later(server, gentle)], key=lambda footprint: footprint.rss)
            record.lost += before.growth(
                after, mib=GROWTH_MIB, threads=GROWTH_THREADS, files=GROWTH_FILES
            )
        record.add({"storms_s": seconds, "growth_mib": round((after.rss - before.rss) / MIB, 1)})
        check_whole(record, server, target)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
