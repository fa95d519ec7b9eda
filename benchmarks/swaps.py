"""What changes of the default mix do to texts in progress: gaps, throughput, tokens.

Streams run while the default mix changes 0, 1, 10 and 100 times a second, sent open-loop. Every
greedy text is compared with the one that the same request gets without changes.

Variants:
    explicit: long streams that name their mixes, four different ones.
    default: long streams under the default mix as it was when they were accepted.
    churn: the same with short streams, so that requests are accepted all the time.
    engine: as `default`, in process, times taken where the engine hands tokens out.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.inprocess import Local, LocalTarget
from benchmarks.openloop import Sent, send, steady_times
from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.serverprocess import ServerProcess
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import POSITIONS, Group, adapter_folder, base_folder, prompts
from benchmarks.spread import percentile
from benchmarks.target import Streamed, Target, Weights
from benchmarks.texts import Texts, key_of, report_texts
from superpose_client import AsyncClient, Client

GROUP = Group(8)
_A, _B, _C, _D = GROUP.names[:4]
# What the default mix goes through, and what explicit requests name.
MIXES: tuple[Weights, ...] = ({_A: 1.0}, {_A: 1.0, _B: 1.0}, {}, {_A: 0.5, _C: 1.0, _D: -0.5})
VARIANTS = ("explicit", "default", "churn", "engine")
PROMPT_TOKENS = 32
SHORT_TOKENS = 48
# Changes that are under way at once; those that come on top are sent late.
CONCURRENCY = 64


@dataclass
class Phase:
    """Streams under one rate of changes for a while."""

    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    coalesced: int = 0
    sent: list[Sent] = field(default_factory=list)
    changed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    replies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Streams:
    """Endless greedy streams, one a prompt, each of requests one after the other."""

    def __init__(
        self, target: Target, texts: Sequence[Sequence[int]], mixes: Sequence[Weights | None]
    ) -> None:
        """Stream from `target`; the mixes are named in turn, None for the default one."""
        self._target = target
        self._prompts = texts
        self._mixes = mixes
        self._requests: list[list[Streamed]] = [[] for _ in texts]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def requests(self) -> Iterator[tuple[int, Streamed]]:
        """Every request so far, with the index of its prompt."""
        for index, requests in enumerate(self._requests):
            yield from ((index, request) for request in requests)

    async def start(self, length: int) -> None:
        """Begin, and return when every stream has its first token."""
        count = len(self._prompts)
        self._tasks = [asyncio.create_task(self._run(index, length)) for index in range(count)]
        while not all(requests and requests[0].arrivals for requests in self._requests):
            for task in self._tasks:
                if task.done():
                    await task
            await asyncio.sleep(0.01)

    async def _run(self, index: int, length: int) -> None:
        for turn in itertools.count(index):
            mix = self._mixes[turn % len(self._mixes)]
            # The first ones are of different lengths, so that they do not all begin anew at once.
            share = (index + 1) / len(self._prompts) if turn == index else 1.0
            request = Streamed(self._prompts[index], mix, max(2, int(length * share)))
            self._requests[index].append(request)
            await self._target.stream(request)
            if request.status != "OK":
                raise RuntimeError(f"a stream ended with {request.status}")

    async def stop(self) -> None:
        """Cancel what runs."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def run_phase(
    target: Target, streams: Streams, rate: float, seconds: float, length: int
) -> Phase:
    """Measure the streams for `seconds` while the default mix changes `rate` times a second."""
    phase = Phase()
    ending = False

    async def change(index: int, due: float) -> None:
        phase.statuses[await target.change(MIXES[(index + 1) % len(MIXES)])] += 1
        phase.replies.append(time.perf_counter() - due)

    await target.change(MIXES[0])
    before = await target.generation()
    # From the start of the streams on, so that the default mix moves while they are accepted.
    changing = asyncio.create_task(
        send(steady_times(rate), change, concurrency=CONCURRENCY, stop=lambda: ending)
    )
    try:
        await streams.start(length)
        since = time.perf_counter()
        await asyncio.sleep(seconds)
        until = time.perf_counter()
    finally:
        ending = True
        await streams.stop()
        phase.sent = await changing
    phase.changed = await target.generation() - before
    phase.seconds = until - since
    for _, request in streams.requests:
        phase.gaps += request.gaps(since, until)
        phase.tokens += request.tokens_between(since, until)
        phase.coalesced += sum(count for _, count in request.arrivals if count > 1)
    return phase


@dataclass(frozen=True)
class Load:
    """What is measured: how many streams, and how long each phase is."""

    prompts: list[list[int]]
    seconds: float
    rates: list[int]
    variants: list[str]

    def length(self, variant: str) -> int:
        """Return the new tokens of a request."""
        return SHORT_TOKENS if variant == "churn" else POSITIONS - PROMPT_TOKENS


class Swaps:
    """The phases of all variants and rates, and what they found.

    Attributes:
        phases: {(variant, rate): one a round}.
        texts: What was compared.
    """

    def __init__(self, load: Load, tell: Tell) -> None:
        """Measure `load`."""
        self._load = load
        self._tell = tell
        self.phases: dict[tuple[str, int], list[Phase]] = {}
        self.texts = {variant: Texts() for variant in load.variants}
        self._run: dict[str, Callable[[Coroutine[Any, Any, Any]], Any]] = {}
        self._targets: dict[str, Target] = {}

    def use(
        self,
        variants: Sequence[str],
        target: Target,
        run: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        """Measure `variants` on `target`, whose coroutines `run` runs to their end."""
        for variant in set(variants) & set(self._load.variants):
            self._targets[variant] = target
            self._run[variant] = run

    def measure(self, seconds: float) -> Rounds:
        """Run all phases in turns; the values are tokens a second."""
        contestants = {
            name_of(variant, rate): self._phase(variant, rate)
            for variant in self._load.variants
            for rate in self._load.rates
        }
        self._learn()
        return run_rounds(contestants, seconds=seconds, warm_up=0, least=1, tell=self._tell)

    def _learn(self) -> None:
        """Make the texts of every prompt under every mix, without changes."""
        for variant, texts in self.texts.items():
            for number, mix in enumerate(MIXES):
                self._tell(f"reference texts, {variant}, mix {number + 1} of {len(MIXES)}")
                self._run[variant](self._learn_mix(variant, texts, mix))

    async def _learn_mix(self, variant: str, texts: Texts, mix: Weights) -> None:
        target = self._targets[variant]
        requests = [Streamed(p, mix, SHORT_TOKENS) for p in self._load.prompts]
        await asyncio.gather(*(target.stream(request) for request in requests))
        for index, request in enumerate(requests):
            texts.learn(key_of(index, mix), request.tokens)

    def _phase(self, variant: str, rate: int) -> Measure:
        load = self._load
        mixes: Sequence[Weights | None] = MIXES if variant == "explicit" else (None,)
        texts = self.texts[variant]

        def measure() -> float:
            target = self._targets[variant]
            streams = Streams(target, load.prompts, mixes)
            length = load.length(variant)
            phase: Phase = self._run[variant](
                run_phase(target, streams, rate, load.seconds, length)
            )
            self.phases.setdefault((variant, rate), []).append(phase)
            for index, request in streams.requests:
                if request.used is not None and request.tokens:
                    key = key_of(index, request.used)
                    texts.compare(key, request.tokens)
                    if rate == 0:
                        texts.learn(key, request.tokens)
            return phase.rate

        return measure


def name_of(variant: str, rate: int) -> str:
    """Return the name of a contestant."""
    return f"{variant}, {rate} changes/s"


def measure(options: Options, load: Load, tell: Tell) -> tuple[Report, Swaps]:
    """Run the benchmark."""
    streams = len(load.prompts)
    base = base_folder(options.model, options.cache, tell)
    adapters = adapter_folder(base, options.cache, [GROUP], tell)
    report = Report(
        "swaps",
        options.label,
        options.settings(streams=streams, prompt_tokens=PROMPT_TOKENS, phase_seconds=load.seconds),
    )
    swaps = Swaps(load, tell)
    with ExitStack() as stack:
        tell("starting the server")
        flags = [*options.server_flags(), f"--max-batch={streams}"]
        server = stack.enter_context(ServerProcess(base, adapters, flags))
        runner = stack.enter_context(asyncio.Runner())
        client = runner.run(_connect(server.address))
        swaps.use(VARIANTS[:3], ServerTarget(client), runner.run)
        if "engine" in load.variants:
            local = stack.enter_context(Local(options, base, adapters, max_batch=streams))
            swaps.use(VARIANTS[3:], LocalTarget(local), local.run)
        rounds = swaps.measure(options.seconds)
        runner.run(client.close())
        report.settings["rounds"] = rounds.count
        report.tables += _tables(swaps, rounds)
        with Client(server.address) as asking:
            report_texts(report, swaps.texts, asking, load.prompts, options.dtype)
        _check_changes(report, swaps)
    report.notes.append(
        "A gap is the time between two chunks of one stream, counted once for each token that the "
        "later chunk holds, from when all streams have their first token. Ratios are taken round "
        "by round. Changes are sent at times fixed beforehand, at most "
        f"{CONCURRENCY} under way at once; effective are those that gave the default mix a new "
        "generation."
    )
    report.data = {
        name_of(*key): [_plain(phase) for phase in phases] for key, phases in swaps.phases.items()
    }
    return report, swaps


async def _connect(address: str) -> AsyncClient:
    return AsyncClient(address)


def _check_changes(report: Report, swaps: Swaps) -> None:
    changes = sum((p.statuses for ps in swaps.phases.values() for p in ps), Counter[str]())
    refused = {status: count for status, count in changes.items() if status != "OK"}
    report.checks.append(Check(f"no change failed ({refused or 'none'})", not refused))


def _tables(swaps: Swaps, rounds: Rounds) -> list[Table]:
    gaps: list[list[Cell]] = []
    changes: list[list[Cell]] = []
    for (variant, rate), phases in swaps.phases.items():
        all_gaps = [gap * 1e3 for phase in phases for gap in phase.gaps]
        still = name_of(variant, 0)
        name = name_of(variant, rate)
        known = still in rounds.values
        gaps.append(
            [
                variant,
                rate,
                *(percentile(all_gaps, percent) for percent in (50, 90, 99, 100)),
                _ratio_of_gaps(swaps, variant, rate) if known else None,
                rounds.spread(name).median,
                rounds.ratio(name, still).median if known else None,
            ]
        )
        if rate:
            replies = [reply * 1e3 for phase in phases for reply in phase.replies]
            tokens = sum(phase.tokens for phase in phases)
            changes.append(
                [
                    variant,
                    rate,
                    sum(len(phase.sent) for phase in phases),
                    sum(phase.changed for phase in phases),
                    percentile(replies, 50),
                    percentile(replies, 99),
                    max((sent.late for p in phases for sent in p.sent), default=0.0) * 1e3,
                    sum(phase.coalesced for phase in phases) / max(1, tokens),
                ]
            )
    return [
        Table(
            "Gaps between tokens, and throughput",
            (
                "variant",
                "changes/s",
                "gap p50, ms",
                "p90",
                "p99",
                "max",
                "p99 / p99 without",
                "tokens/s",
                "tokens/s / without",
            ),
            gaps,
        ),
        Table(
            "Changes",
            (
                "variant",
                "changes/s",
                "sent",
                "effective",
                "reply p50, ms",
                "reply p99, ms",
                "sent late at most, ms",
                "share of tokens in chunks of several",
            ),
            changes,
        ),
    ]


def _ratio_of_gaps(swaps: Swaps, variant: str, rate: int) -> float:
    """Return the 99th percentile over that without changes: round by round, then the median."""
    pairs = zip(swaps.phases[variant, rate], swaps.phases[variant, 0], strict=False)
    ratios = [percentile(phase.gaps, 99) / percentile(still.gaps, 99) for phase, still in pairs]
    return percentile(ratios, 50)


def _plain(phase: Phase) -> dict[str, object]:
    return {
        "seconds": phase.seconds,
        "tokens": phase.tokens,
        "sent": len(phase.sent),
        "changed": phase.changed,
        "statuses": dict(phase.statuses),
        "gap_percentiles_ms": {
            str(percent): percentile(phase.gaps, percent) * 1e3
            for percent in (1, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
        },
    }


def draw(swaps: Swaps, figure: Any) -> None:
    """Draw the percentiles of the gaps and the throughput against the rate of changes."""
    gap_axes, rate_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    variants = list(dict.fromkeys(variant for variant, _ in swaps.phases))
    rates = list(dict.fromkeys(rate for _, rate in swaps.phases))
    for number, variant in enumerate(variants):
        colour = f"C{number}"
        found = {rate: swaps.phases[variant, rate] for rate in rates}
        at = list(range(len(rates)))
        for percent, style in ((50, "-"), (99, "--")):
            values = [
                percentile([gap * 1e3 for phase in phases for gap in phase.gaps], percent)
                for phases in found.values()
            ]
            gap_axes.plot(at, values, style, color=colour, marker="o")
        speeds = [percentile([phase.rate for phase in phases], 50) for phases in found.values()]
        rate_axes.plot(at, speeds, "-", color=colour, marker="o", label=variant)
    for axes in (gap_axes, rate_axes):
        axes.set_xticks(range(len(rates)), [str(rate) for rate in rates])
        axes.set_xlabel("changes of the default mix a second")
    gap_axes.set_ylim(bottom=0)
    gap_axes.set_ylabel("gap between tokens, ms")
    for style, text in (("-", "median"), ("--", "99th percentile")):
        gap_axes.plot([], [], style, color="gray", label=text)
    gap_axes.legend(fontsize=8)
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_ylabel("tokens/s, all streams")
    rate_axes.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("swaps", "Measure what changes of the mix do to streams.", seconds=240)
    parser.add_argument("--streams", type=int, default=16, help="streams at once")
    parser.add_argument("--rates", type=numbers, default=[0, 1, 10, 100], help="changes a second")
    parser.add_argument(
        "--phase", type=float, help="seconds of one rate in one round; without it for three rounds"
    )
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(","),
        default=list(VARIANTS),
        help="which of " + ", ".join(VARIANTS),
    )
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants has {', '.join(sorted(unknown))}: use {', '.join(VARIANTS)}")
    options = read_options(parsed)
    with progress("swaps", options.seconds) as tell:
        base = base_folder(options.model, options.cache, tell)
        texts = prompts(base, parsed.streams, PROMPT_TOKENS)
        phases = len(parsed.rates) * len(parsed.variants)
        # A phase takes longer than it measures: its streams must start, and its changes end.
        phase = parsed.phase or min(10.0, max(0.5, options.seconds / phases / 3 * 0.7))
        load = Load(texts, phase, parsed.rates, parsed.variants)
        report, swaps = measure(options, load, tell)
    return report.finish(options, lambda figure: draw(swaps, figure))


if __name__ == "__main__":
    sys.exit(main())
