"""A long time near saturation, over both doors: `python -m tests.chaos.soak --minutes 30`.

Requests arrive at 80 % of what the server was measured to get through, whether or not earlier ones
were answered; the default mix changes ten times a second, and one request in a hundred is given up
half-way. Nobody else is told of an error, memory stays, the second half is as quick as the first,
and in the end the weights are whole.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from random import Random

from tests.chaos.footprint import MIB, Footprint
from tests.chaos.script import Record, make_parser
from tests.chaos.server import DOMAINS, check_whole, settled, victim
from tests.integration.harness import ServerProcess

from superpose_client import AsyncClient, CallError, Client
from superpose_server.config import ServerConfig

MINUTES, SHORT_MINUTES = 30.0, 1.0
SHARE, CHANGES_A_SECOND, CANCELLED = 0.8, 10.0, 0.01
BATCH, TOKENS = 8, 24
# Of the whole time; until then pools and caches fill.
WARM_UP = 0.2
# After the warm-up, as the slope of all samples; a short run cannot tell a slope from noise.
GROWTH_MIB_IN_10_MINUTES, ENOUGH_MINUTES = 1.0, 10.0
SLOWER_BY = 1.2
PATIENCE, VERIFY_SECONDS = 60.0, 10.0
PROMPT = "The sum of"


@dataclass
class Traffic:
    """What was asked, and what came of it.

    Attributes:
        outcomes: How many ended how; what was given up by its client is "given up".
        latencies: (second at which it was due, seconds until its answer was whole), of answers.
        changes: Changes of the default mix.
        memory: (second, bytes resident) of the server.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    changes: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)


class Load:
    """Requests to both doors of one server, and changes of its mix."""

    def __init__(self, server: ServerProcess, client: AsyncClient, random: Random) -> None:
        self._server, self._client, self._random = server, client, random
        self.traffic = Traffic()
        self._tasks: set[asyncio.Task[None]] = set()

    async def capacity(self, seconds: float) -> float:
        """Return how many requests a second are answered while a full batch runs all the time."""
        began, numbers = time.monotonic(), itertools.count()

        async def keep_asking() -> int:
            answered = 0
            while time.monotonic() < began + seconds:
                answered += await self._ask(next(numbers), give_up=False) == "OK"
            return answered

        # The changes of the mix cost something, too.
        workers = (keep_asking() for _ in range(BATCH))
        answered, _ = await asyncio.gather(asyncio.gather(*workers), self._change(began + seconds))
        return sum(answered) / (time.monotonic() - began)

    async def run(self, rate: float, seconds: float) -> None:
        """Ask at `rate` for `seconds`; return when all that was asked has ended."""
        began = time.monotonic()
        beside = [
            asyncio.create_task(self._change(began + seconds)),
            asyncio.create_task(self._watch(began, seconds)),
        ]
        due, number = began, 0
        while (due := due + self._random.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._request(number, due, began))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1
        await asyncio.gather(*self._tasks, *beside)

    async def _request(self, number: int, due: float, began: float) -> None:
        give_up = self._random.random() < CANCELLED
        outcome = await self._ask(number, give_up)
        self.traffic.outcomes[outcome] += 1
        if outcome == "OK":
            self.traffic.latencies.append((due - began, time.monotonic() - due))

    async def _ask(self, number: int, give_up: bool) -> str:
        """Ask one door or the other, for a whole text or a stream, under some mix."""
        mix = (None, {"b": 1.0}, {"a": 0.5, "c": -0.5}, {})[number % 4]
        if number % 2:
            return await self._over_http(mix, number % 3 == 0, give_up)
        try:
            stream = self._client.stream(
                PROMPT, mix=mix, max_new_tokens=TOKENS, ignore_eos=True, timeout=PATIENCE
            )
            async with stream:
                async for _ in stream:
                    if give_up:
                        return "given up"
        except CallError as error:
            return f"grpc {error.code.name} {error.reason}"
        return "OK"

    async def _over_http(self, mix: dict[str, float] | None, stream: bool, give_up: bool) -> str:
        host, _, port = self._server.ready["http"].rpartition(":")
        asked = {"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
        body = json.dumps({**asked, **({} if mix is None else {"mix": mix})}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(head.encode() + body)
            async with asyncio.timeout(PATIENCE):
                answer = await (reader.read(64) if give_up else reader.read())
        except (OSError, TimeoutError) as error:
            return f"http {type(error).__name__}"
        finally:
            writer.close()
        if give_up:
            return "given up"
        status = answer.split(None, 2)[1:2]
        if status != [b"200"] or b'"error"' in answer:
            code = re.search(rb'"code":\s*"(\w+)"', answer)
            return f"http {status} {code[1].decode() if code else answer[-200:]!r}"
        return "OK" if not stream or b"data: [DONE]" in answer else "http: a stream without an end"

    async def _change(self, until: float) -> None:
        """Change the default mix, ten times a second as far as the server keeps up."""
        due = time.monotonic()
        while time.monotonic() < until:
            domains = self._random.sample(DOMAINS, self._random.randrange(len(DOMAINS) + 1))
            try:
                await self._client.set({name: self._random.uniform(-1, 1) for name in domains})
                self.traffic.changes += 1
            except CallError as error:
                self.traffic.outcomes[f"set {error.code.name} {error.reason}"] += 1
            due += 1 / CHANGES_A_SECOND
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _watch(self, began: float, seconds: float) -> None:
        """Sample the server's memory, a hundred times in all, and at least once a minute."""
        every = min(60.0, seconds / 100)
        while (at := time.monotonic() - began) < seconds:
            rss = Footprint.of(self._server.process.pid).rss
            self.traffic.memory.append((at, rss))
            print(f"{at:.0f} s: {rss / MIB:.1f} MiB {dict(self.traffic.outcomes)}", file=sys.stderr)
            await asyncio.sleep(every)


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """Return by how much the second half's median is above the first's, for each 10 minutes."""
    half = len(samples) // 2
    first, second = samples[:half], samples[half:]

    def middle(part: Sequence[tuple[float, int]], index: int) -> float:
        return statistics.median(sample[index] for sample in part)

    minutes = (middle(second, 0) - middle(first, 0)) / 60
    return (middle(second, 1) - middle(first, 1)) / MIB / minutes * 10


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def judge(record: Record, traffic: Traffic, rate: float, seconds: float) -> None:
    """Note what was seen, and what of it is a loss."""
    long = seconds >= 60 * ENOUGH_MINUTES
    # What was measured in a few seconds, perhaps beside other work, may be above saturation.
    wrong = {
        how: number
        for how, number in traffic.outcomes.items()
        if how not in ("OK", "given up") and (long or "QUEUE_FULL" not in how)
    }
    record.check(not wrong, f"errors: {wrong}")
    warm = [(at, took) for at, took in traffic.latencies if at > WARM_UP * seconds]
    middle = (1 + WARM_UP) / 2 * seconds
    halves = [[took for at, took in warm if (at > middle) == later] for later in (False, True)]
    p50, p99 = ([percentile(half, share) for half in halves] for share in (0.5, 0.99))
    grown = slope([(at, rss) for at, rss in traffic.memory if at > WARM_UP * seconds])
    if long:
        answers = traffic.outcomes["OK"]
        record.check(answers > 0.9 * rate * seconds, f"{answers} answers: the load was not held")
        record.check(
            traffic.changes > 0.9 * CHANGES_A_SECOND * seconds, f"{traffic.changes} changes"
        )
        record.check(p99[1] <= SLOWER_BY * p99[0], f"p99 went from {p99[0]:.3f} to {p99[1]:.3f} s")
        record.check(
            grown < GROWTH_MIB_IN_10_MINUTES, f"memory grew by {grown:.2f} MiB in 10 minutes"
        )
    record.add(
        {
            "outcomes": dict(traffic.outcomes),
            "changes_per_second": round(traffic.changes / seconds, 2),
            "p50_s": [round(value, 4) for value in p50],
            "p99_s": [round(value, 4) for value in p99],
            "growth_mib_in_10_minutes": round(grown, 3),
            "rss_mib": [round(rss / MIB, 1) for _, rss in traffic.memory],
        }
    )


def verifying() -> list[str]:
    """Return the flag that lets a server check its weights every few seconds, if it has one."""
    known = {option.name for option in fields(ServerConfig)}
    return [f"--verify-every={VERIFY_SECONDS:g}"] if "verify_every" in known else []


async def soak(server: ServerProcess, record: Record, seconds: float, seed: int) -> None:
    """Load a server for a while, and judge."""
    # A client that tries again would hide that a request was refused.
    async with AsyncClient(server.address, timeout=PATIENCE, retries=0) as client:
        load = Load(server, client, Random(seed))
        # The first rows are slower; and a machine that others use, too, is not always as quick.
        full = min([await load.capacity(min(20.0, max(1.0, seconds / 60))) for _ in range(3)][1:])
        load.traffic = Traffic()
        rate = SHARE * full
        record.add({"saturation_per_second": round(full, 1), "rate_per_second": round(rate, 1)})
        await load.run(rate, seconds)
    judge(record, load.traffic, rate, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("A long time at 80 % of saturation, over both doors.")
    parser.add_argument("--minutes", type=float, help=f"default {MINUTES:g}")
    asked = parser.parse_args(arguments)
    minutes = asked.minutes or (SHORT_MINUTES if asked.short else MINUTES)
    record = Record("soak", {"minutes": minutes, "seed": asked.seed, "verifying": verifying()})
    # Who asks computes on this machine, too: torch's threads would wait for one that has no core.
    threads = max(1, (os.cpu_count() or 1) - 1)
    flags = [f"--max-batch={BATCH}", f"--threads={threads}", "--log-level=warning"]
    with victim() as target, target.serving(record, *flags, *verifying()) as server:
        target.push_all(server)
        asyncio.run(soak(server, record, 60 * minutes, asked.seed))
        settled(server)
        with Client(server.address) as client:
            record.check(client.verify().ok, "the weights fail their verification")
        check_whole(record, server, target)
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
