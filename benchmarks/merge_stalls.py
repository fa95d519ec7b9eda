"""What merging adapters in a running server takes, and what it does to texts in progress.

Streams run, under four mixes that they name, while three adapters are merged by one method, again
and again; and without that. Every greedy text is compared with the one that the same request gets
without merges.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.serverprocess import ServerProcess
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import POSITIONS, Group, adapter_folder, base_folder, prompts
from benchmarks.spread import percentile
from benchmarks.swaps import GROUP, MIXES, PROMPT_TOKENS, Phase, Streams
from benchmarks.texts import Texts, key_of, report_texts
from superpose_adapters.merge.methods import METHODS
from superpose_client import AsyncClient, Client

MERGED = dict.fromkeys(GROUP.names[:3], 1.0)
STILL = "none"


@dataclass
class Merging(Phase):
    """Streams for a while, and the merges beside them.

    Attributes:
        seconds_each: How long each merge took, as the server says.
    """

    seconds_each: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What is measured: by which methods, beside how many streams, how long each phase."""

    prompts: list[list[int]]
    methods: list[str]
    seconds: float


class Stalls:
    """The phases of all methods, and what they found.

    Attributes:
        phases: {method, or STILL: one a round}.
        texts: What was compared.
    """

    def __init__(self, load: Load, client: AsyncClient, runner: asyncio.Runner) -> None:
        """Measure `load` through `client`, whose calls `runner` runs."""
        self._load = load
        self._client = client
        self._runner = runner
        self.phases: dict[str, list[Merging]] = {}
        self.texts = Texts()

    def measure(self, seconds: float, tell: Tell) -> Rounds:
        """Run all phases in turns; the values are tokens a second."""
        # The texts without merges come first, since the others are compared with them.
        contestants = {name: self._phase(name) for name in (STILL, *self._load.methods)}
        return run_rounds(contestants, seconds=seconds, warm_up=0, least=1, tell=tell)

    def _phase(self, method: str) -> Measure:
        def measure() -> float:
            streams = Streams(ServerTarget(self._client), self._load.prompts, MIXES)
            phase = self._runner.run(self._run(streams, method))
            self.phases.setdefault(method, []).append(phase)
            for index, request in streams.requests:
                if request.used is not None and request.tokens:
                    key = key_of(index, request.used)
                    note = self.texts.learn if method == STILL else self.texts.compare
                    note(key, request.tokens)
            return phase.rate

        return measure

    async def _run(self, streams: Streams, method: str) -> Merging:
        phase = Merging()
        await streams.start(POSITIONS - PROMPT_TOKENS)
        try:
            since = time.perf_counter()
            if method == STILL:
                await asyncio.sleep(self._load.seconds)
            else:
                await self._merge(phase, method, since + self._load.seconds)
            until = time.perf_counter()
        finally:
            await streams.stop()
        phase.seconds = until - since
        for _, request in streams.requests:
            phase.gaps += request.gaps(since, until)
            phase.tokens += request.tokens_between(since, until)
        return phase

    async def _merge(self, phase: Merging, method: str, until: float) -> None:
        """Merge until a time, and at least once; no merge is sent before the last has ended."""
        while not phase.replies or time.perf_counter() < until:
            began = time.perf_counter()
            merged = await self._client.merge("merged", MERGED, method=method, replace=True)
            phase.replies.append(time.perf_counter() - began)
            phase.seconds_each.append(merged.seconds)
            # As good as another one: the same again would not be stored anew.
            await self._client.delete("merged")


def measure(options: Options, group: Group, load: Load, tell: Tell) -> Report:
    """Run the benchmark."""
    base = base_folder(options.model, options.cache, tell)
    adapters = adapter_folder(base, options.cache, [group], tell)
    streams = len(load.prompts)
    report = Report(
        "merge-stalls",
        options.label,
        options.settings(
            streams=streams, rank=group.rank, merged=len(MERGED), phase_seconds=load.seconds
        ),
    )
    with ExitStack() as stack:
        tell("starting the server")
        flags = [*options.server_flags(), f"--max-batch={streams}"]
        server = stack.enter_context(ServerProcess(base, adapters, flags))
        runner = stack.enter_context(asyncio.Runner())
        client = runner.run(_connect(server.address))
        stalls = Stalls(load, client, runner)
        rounds = stalls.measure(options.seconds, tell)
        runner.run(client.close())
        report.settings["rounds"] = rounds.count
        report.tables += _tables(stalls, rounds)
        with Client(server.address) as asking:
            report_texts(report, {"all": stalls.texts}, asking, load.prompts, options.dtype)
    report.notes.append(
        "Merges go one after the other, each stored and then deleted. A gap is the time between "
        "two chunks of one stream, counted once for each token that the later chunk holds. Ratios "
        "are taken round by round."
    )
    report.data = {
        method: [
            {
                "seconds": phase.seconds,
                "tokens": phase.tokens,
                "merge_seconds": phase.seconds_each,
                "reply_seconds": phase.replies,
                "longest_gap_ms": percentile(phase.gaps, 100) * 1e3,
            }
            for phase in phases
        ]
        for method, phases in stalls.phases.items()
    }
    return report


async def _connect(address: str) -> AsyncClient:
    return AsyncClient(address)


def _tables(stalls: Stalls, rounds: Rounds) -> list[Table]:
    gaps: list[list[Cell]] = []
    merges: list[list[Cell]] = []
    for method, phases in stalls.phases.items():
        all_gaps = [gap * 1e3 for phase in phases for gap in phase.gaps]
        gaps.append(
            [
                method,
                *(percentile(all_gaps, percent) for percent in (50, 90, 99, 100)),
                _ratio_of_gaps(phases, stalls.phases[STILL]),
                rounds.spread(method).median,
                rounds.ratio(method, STILL).median,
            ]
        )
        if method != STILL:
            times = [[s * 1e3 for phase in phases for s in phase.seconds_each]]
            times.append([s * 1e3 for phase in phases for s in phase.replies])
            merges.append(
                [
                    method,
                    len(times[0]),
                    *(percentile(each, percent) for each in times for percent in (50, 100)),
                ]
            )
    return [
        Table(
            "Merges of three domains, beside the streams",
            ("method", "merges", "merging p50, ms", "max", "reply p50, ms", "max"),
            merges,
        ),
        Table(
            "Gaps between tokens, and throughput",
            (
                "merging by",
                *("gap p50, ms", "p90", "p99", "max", "p99 / p99 without"),
                *("tokens/s", "tokens/s / without"),
            ),
            gaps,
        ),
    ]


def _ratio_of_gaps(phases: Sequence[Phase], still: Sequence[Phase]) -> float:
    """Return the 99th percentile over that without merges: round by round, then the median."""
    pairs = zip(phases, still, strict=False)
    return percentile([percentile(a.gaps, 99) / percentile(b.gaps, 99) for a, b in pairs], 50)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("merge_stalls", "Measure merges beside streams.", seconds=120)
    parser.add_argument("--streams", type=int, default=16, help="streams at once")
    parser.add_argument("--rank", type=int, default=GROUP.rank, help="of each merged adapter")
    parser.add_argument("--phase", type=float, default=3.0, help="seconds of one method in a round")
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=list(METHODS),
        help="which of " + ", ".join(METHODS),
    )
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.methods) - set(METHODS)
    if unknown:
        parser.error(f"--methods has {', '.join(sorted(unknown))}: use {', '.join(METHODS)}")
    options = read_options(parsed)
    with progress("merge_stalls", options.seconds) as tell:
        base = base_folder(options.model, options.cache, tell)
        load = Load(prompts(base, parsed.streams, PROMPT_TOKENS), parsed.methods, parsed.phase)
        report = measure(options, Group(GROUP.count, parsed.rank), load, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
