"""A real server under open-loop load: requests arrive as users do, whether it keeps up or not.

Poisson arrivals at rising rates until the server is saturated: latency, time to first token and
time per token from when a request was due, throughput, and errors by status code.

`--soak SECONDS` instead keeps it saturated: memory over time, errors, whether the queue drains
afterwards, and whether sampled greedy texts equal those of the same requests alone.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.openloop import poisson_times, send
from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.serverprocess import ServerProcess
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.spread import percentile
from benchmarks.target import Streamed, Target, Weights
from benchmarks.texts import TIE, Texts, key_of
from superpose_client import AsyncClient, Client

GROUP = Group(8)
PROMPTS = 64
# Offered load as shares of what a full batch gets through.
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5)
SOAK_SHARE = 1.5
# Rates at which the server was saturated, after which a higher one tells nothing new.
ENOUGH_SATURATED = 2
# Requests of a soak that are run again alone.
SAMPLES = 24
DRAIN_SECONDS = 10.0
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Traffic:
    """What a request looks like."""

    prompts: list[list[int]]
    new_tokens: int
    mixed: float
    max_batch: int

    def request(self, number: int, due: float) -> tuple[int, Streamed]:
        """Return the index of its prompt and a request, the same one for the same number."""
        draw = random.Random(number)
        index = draw.randrange(len(self.prompts))
        mix: Weights = {}
        if draw.random() < self.mixed:
            mix = dict.fromkeys(draw.sample(GROUP.names, 3), 1.0)
        return index, Streamed(self.prompts[index], mix, self.new_tokens, due=due)


@dataclass
class Level:
    """What became of the requests of one rate.

    Attributes:
        rate: Requests a second that were offered.
        since: When the first could be due.
        until: When the last could be due.
        requests: All of them, with the index of their prompts.
    """

    rate: float
    since: float = 0.0
    until: float = 0.0
    requests: list[tuple[int, Streamed]] = field(default_factory=list)

    @property
    def done(self) -> list[Streamed]:
        """The requests that were answered."""
        return [request for _, request in self.requests if request.status == "OK"]

    @property
    def statuses(self) -> Counter[str]:
        """How requests ended."""
        return Counter(request.status for _, request in self.requests)

    @property
    def tokens_per_second(self) -> float:
        """Tokens that arrived while requests were sent, a second; the first fifth is warm-up."""
        since = self.since + (self.until - self.since) / 5
        tokens = sum(r.tokens_between(since, self.until) for _, r in self.requests)
        return tokens / (self.until - since)

    @property
    def refused(self) -> float:
        """Share of requests that were not answered."""
        return 1 - len(self.done) / len(self.requests) if self.requests else 0.0

    def saturated(self, batch_seconds: float) -> bool:
        """Tell whether the server could not keep up: it refused, or was busy for long afterwards.

        Args:
            batch_seconds: What a full batch takes.
        """
        ended = max((request.ended for request in self.done), default=self.until)
        return self.refused > 0.01 or ended - self.until > 1.5 * batch_seconds


async def run_level(
    target: Target, traffic: Traffic, rate: float, seconds: float, seed: int
) -> Level:
    """Send requests at `rate` for `seconds`, and wait until all have ended."""
    level = Level(rate)

    async def request(number: int, due: float) -> None:
        index, streamed = traffic.request(seed * 1_000_003 + number, due)
        level.requests.append((index, streamed))
        await target.stream(streamed)

    level.since = time.perf_counter()
    level.until = level.since + seconds
    await send(poisson_times(rate, seconds, seed), request)
    return level


async def capacity(target: Target, traffic: Traffic) -> float:
    """Return about how many requests a second a full batch gets through."""
    for count in (1, traffic.max_batch):
        began = time.perf_counter()
        batch = [traffic.request(-number - 1, began)[1] for number in range(count)]
        await asyncio.gather(*(target.stream(request) for request in batch))
        failed = [request.status for request in batch if request.status != "OK"]
        if failed:
            raise RuntimeError(f"requests failed without load: {failed}")
    return traffic.max_batch / (time.perf_counter() - began)


async def measure_levels(
    address: str, traffic: Traffic, options: Options, tell: Tell
) -> tuple[float, list[Level]]:
    """Raise the rate until the server is saturated; return the capacity and what was seen."""
    levels: list[Level] = []
    # What is refused counts as refused.
    async with AsyncClient(address, retries=0) as client:
        target = ServerTarget(client)
        tell("how much a full batch gets through")
        full = await capacity(target, traffic)
        began = time.monotonic()
        saturated = 0
        for seed, share in enumerate(SHARES):
            tell(f"{share:g} of {full:.3g} requests/s")
            left = options.seconds - (time.monotonic() - began)
            # Arrivals take a part of the time; what has queued up must end too.
            seconds = max(0.2, left / (len(SHARES) - seed) * 0.7)
            levels.append(await run_level(target, traffic, share * full, seconds, seed))
            saturated += levels[-1].saturated(traffic.max_batch / full)
            if saturated >= ENOUGH_SATURATED:
                break
    return full, levels


def report_levels(report: Report, full: float, levels: Sequence[Level]) -> None:
    """Put what was seen into a report."""
    times: list[list[Cell]] = []
    outcomes: list[list[Cell]] = []
    for level in levels:
        latency = [request.latency for request in level.done]
        first = [request.first_token for request in level.done if request.arrivals]
        gaps = [gap * 1e3 for r in level.done for gap in r.gaps(level.since, r.ended)]
        row: list[Cell] = [level.rate]
        for values in (latency, first, gaps):
            row += [percentile(values, percent) for percent in (50, 90, 99)]
        times.append(row)
        errors = ", ".join(f"{s} {n}" for s, n in level.statuses.items() if s != "OK")
        requests = len(level.requests)
        outcomes.append(
            [
                level.rate,
                level.rate / full,
                requests,
                len(level.done),
                errors or "none",
                level.tokens_per_second,
            ]
        )
    percents = ("p50", "p90", "p99")
    report.tables += [
        Table(
            "Time from when a request was due",
            (
                "requests/s",
                *(f"latency {percent}, s" for percent in percents),
                *(f"first token {percent}, s" for percent in percents),
                *(f"per token {percent}, ms" for percent in percents),
            ),
            times,
        ),
        Table(
            "Throughput and errors",
            ("requests/s", "of capacity", "requests", "answered", "errors", "tokens/s"),
            outcomes,
        ),
    ]
    _check_statuses(report, sum((level.statuses for level in levels), Counter[str]()))
    report.notes.append(
        "Poisson arrivals, sent whether or not earlier requests were answered. Capacity is what "
        "one full batch got through. Per token is the gap between chunks, counted for each token."
    )
    report.data = {
        f"{level.rate:.4g}": {
            "latency_s": [request.latency for request in level.done],
            "first_token_s": [r.first_token for r in level.done if r.arrivals],
            "statuses": dict(level.statuses),
            "tokens_per_second": level.tokens_per_second,
        }
        for level in levels
    }


def _check_statuses(report: Report, statuses: Counter[str]) -> None:
    wrong = {status: n for status, n in statuses.items() if status not in ("OK", REFUSED)}
    report.checks.append(Check(f"no error but {REFUSED} ({wrong or 'none'})", not wrong))


def draw_levels(levels: Sequence[Level], figure: Any) -> None:
    """Draw times and throughput against the offered rate."""
    latency_axes, first_axes, rate_axes = figure.subplots(1, 3)
    at = [level.rate for level in levels]
    for axes, title, values in (
        (latency_axes, "latency, s", [[r.latency for r in level.done] for level in levels]),
        (
            first_axes,
            "time to first token, s",
            [[r.first_token for r in level.done if r.arrivals] for level in levels],
        ),
    ):
        for percent, style in ((50, "-"), (90, "--"), (99, ":")):
            axes.plot(
                at,
                [percentile(column, percent) for column in values],
                style,
                color="tab:blue",
                marker="o",
                label=f"p{percent}",
            )
        axes.set_ylabel(title)
        axes.legend(fontsize=8)
    rate_axes.plot(at, [level.tokens_per_second for level in levels], marker="o", label="tokens/s")
    rate_axes.set_ylabel("tokens/s")
    shares = rate_axes.twinx()
    shares.plot(at, [level.refused * 100 for level in levels], "x:", color="tab:red")
    shares.set_ylabel("refused, %", color="tab:red")
    shares.set_ylim(0, 100)
    for axes in (latency_axes, first_axes, rate_axes):
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("requests/s offered")


@dataclass
class Soak:
    """A long time at saturation.

    Attributes:
        level: The requests.
        memory: (seconds since the start, bytes resident) of the server.
        waiting: (seconds since the start, requests waiting).
        drained: True if nothing ran or waited soon after the last answer.
        texts: The comparison of sampled texts with the same alone.
    """

    level: Level
    memory: list[tuple[float, int]] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)
    drained: bool = False
    texts: Texts = field(default_factory=Texts)

    def growth(self) -> float:
        """Return by how many bytes the last quarter is above the second, medians, while sending."""
        sending = self.level.until - self.level.since
        sizes = [float(size) for at, size in self.memory if at <= sending]
        quarter = max(1, len(sizes) // 4)
        return percentile(sizes[-quarter:], 50) - percentile(sizes[quarter : 2 * quarter], 50)


async def run_soak(server: ServerProcess, traffic: Traffic, seconds: float, tell: Tell) -> Soak:
    """Saturate the server for `seconds`."""
    async with AsyncClient(server.address, retries=0) as client:
        target = ServerTarget(client)
        tell("how much a full batch gets through")
        rate = SOAK_SHARE * await capacity(target, traffic)
        soak = Soak(Level(rate))
        watching = asyncio.create_task(_watch(server, client, soak, min(1.0, seconds / 40), tell))
        soak.level = await run_level(target, traffic, rate, seconds, seed=0)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        soak.drained = await _drained(client)
        done = [pair for pair in soak.level.requests if pair[1].status == "OK"]
        for index, request in random.Random(0).sample(done, min(SAMPLES, len(done))):
            tell("sampled requests again, alone")
            alone = Streamed(request.prompt, request.mix, request.length)
            await target.stream(alone)
            key = key_of(index, request.mix or {})
            soak.texts.learn(key, alone.tokens)
            soak.texts.compare(key, request.tokens)
    return soak


async def _watch(
    server: ServerProcess, client: AsyncClient, soak: Soak, every: float, tell: Tell
) -> None:
    began = time.perf_counter()
    while True:
        soak.memory.append((time.perf_counter() - began, server.memory()))
        info = await client.info()
        soak.waiting.append((time.perf_counter() - began, info.waiting))
        tell(f"{info.running} run, {info.waiting} wait")
        await asyncio.sleep(every)


async def _drained(client: AsyncClient) -> bool:
    deadline = time.perf_counter() + DRAIN_SECONDS
    while time.perf_counter() < deadline:
        info = await client.info()
        if not info.running and not info.waiting:
            return True
        await asyncio.sleep(0.1)
    return False


def report_soak(report: Report, soak: Soak, traffic: Traffic, address: str) -> None:
    """Put what was seen into a report."""
    level = soak.level
    latency = [request.latency for request in level.done]
    size = percentile([float(size) for _, size in soak.memory], 50)
    with Client(address) as client:
        margins = soak.texts.margins(client, traffic.prompts)
    statuses: list[list[Cell]] = [[name, n] for name, n in sorted(level.statuses.items())]
    report.tables.append(
        Table(
            "Soak at saturation",
            ("what", "value"),
            [
                ["requests/s offered", level.rate],
                ["requests", len(level.requests)],
                *statuses,
                ["tokens/s", level.tokens_per_second],
                ["latency p50, s", percentile(latency, 50)],
                ["latency p99, s", percentile(latency, 99)],
                ["waiting at most", max((count for _, count in soak.waiting), default=0)],
                ["memory, median, MiB", size / 2**20],
                ["memory, last quarter above the second, MiB", soak.growth() / 2**20],
                ["sampled texts compared with the same alone", soak.texts.texts],
                ["of those, texts that differ", len(margins)],
                ["widest margin of two tokens that differ, nat", max(margins, default=None)],
            ],
        )
    )
    _check_statuses(report, level.statuses)
    allowed = max(0.01 * size, 16 * 2**20)
    report.checks += [
        Check(
            f"memory does not grow by more than {allowed / 2**20:.0f} MiB",
            soak.growth() <= allowed,
        ),
        Check("nothing runs or waits afterwards", soak.drained),
    ]
    if report.settings["dtype"] == "float32":
        report.checks.append(
            Check(
                f"sampled texts equal those of the same requests alone, but for ties closer than "
                f"{TIE:g} nat",
                soak.texts.texts > 0 and all(margin < TIE for margin in margins),
            )
        )
    report.data = {
        "memory_bytes": [list(pair) for pair in soak.memory],
        "waiting": [list(pair) for pair in soak.waiting],
        "statuses": dict(level.statuses),
        "latency_s": latency,
    }


def draw_soak(soak: Soak, figure: Any) -> None:
    """Draw memory and queue over time."""
    memory_axes, queue_axes = figure.subplots(2, 1, sharex=True)
    memory_axes.plot([at for at, _ in soak.memory], [size / 2**20 for _, size in soak.memory])
    memory_axes.set_ylabel("resident memory, MiB")
    memory_axes.set_ylim(bottom=0)
    queue_axes.plot([at for at, _ in soak.waiting], [count for _, count in soak.waiting])
    queue_axes.set_ylabel("requests waiting")
    queue_axes.set_ylim(bottom=0)
    queue_axes.set_xlabel("seconds")


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("load", "Load a real server open-loop.", seconds=300)
    parser.add_argument("--soak", type=float, help="seconds at saturation, instead of the rates")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--mixed", type=float, default=0.5, help="share under a mix of its own")
    parser.add_argument("--max-batch", type=int, default=32, help="as superpose-server's")
    parser.add_argument("--max-queue", type=int, default=64, help="as superpose-server's")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    name = "soak" if parsed.soak else "load"
    with progress(name, parsed.soak or options.seconds) as tell:
        base = base_folder(options.model, options.cache, tell)
        adapters = adapter_folder(base, options.cache, [GROUP], tell)
        texts = prompts(base, PROMPTS, parsed.prompt_tokens)
        traffic = Traffic(texts, parsed.new_tokens, parsed.mixed, parsed.max_batch)
        own = ("prompt_tokens", "new_tokens", "mixed", "max_batch", "max_queue")
        settings = options.settings(**{field: getattr(parsed, field) for field in own})
        report = Report(name, options.label, settings)
        flags = [f"--max-batch={parsed.max_batch}", f"--max-queue={parsed.max_queue}"]
        # Room for what is sent and no more, since the cache takes memory.
        flags.append(f"--max-length={parsed.prompt_tokens + parsed.new_tokens}")
        tell("starting the server")
        with ServerProcess(base, adapters, [*options.server_flags(), *flags]) as server:
            if parsed.soak:
                report.settings["seconds"] = parsed.soak
                soak = asyncio.run(run_soak(server, traffic, parsed.soak, tell))
                report_soak(report, soak, traffic, server.address)
            else:
                full, levels = asyncio.run(measure_levels(server.address, traffic, options, tell))
                report_levels(report, full, levels)
    if parsed.soak:
        return report.finish(options, lambda figure: draw_soak(soak, figure))
    return report.finish(options, lambda figure: draw_levels(levels, figure))


if __name__ == "__main__":
    sys.exit(main())
