"""What checks of the weights cost: streams beside one check after the other, and without any.

Checks that are as rare as the server makes them cost less than a shared machine drifts. So both
kinds of round take turns, what the checks of a round lost is divided by their number, and that is
set against the time from one check to the next.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.inprocess import Local, LocalTarget
from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.rounds import Rounds, run_rounds
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.spread import Spread
from benchmarks.swaps import PROMPT_TOKENS, Streams
from benchmarks.target import Weights
from superpose_server.control.guard import default_interval
from superpose_server.engine.job import JobResult
from superpose_server.weights.resident import Findings

# Of the throughput, with the server's default.
ALLOWED = 0.01
GROUP = Group(8)
_DOMAINS = GROUP.names[:3]
_STREAMS = 16
_TOKENS = 96
_STILL, _CHECKED = "without checks", "check after check"
_COLUMNS = (
    "streams under",
    "tokens/s",
    "the same beside one check after the other",
    "checks",
    "engine's seconds a check",
    "longest slice, ms",
    "lost a check, s",
    "default interval, s",
    "lost at it, %",
)


@dataclass
class Checks:
    """What the checks of the measured rounds took.

    Attributes:
        done: All of them.
        seconds: Of each round, from the first token to the last.
        counts: How many checks each round had.
    """

    done: list[JobResult[Findings]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


class Load:
    """Streams on an engine, under the default mix or each under one of its own."""

    def __init__(
        self, local: Local, texts: Sequence[Sequence[int]], mixes: Sequence[Weights | None]
    ) -> None:
        """Stream `texts` under `mixes`."""
        self._local = local
        self._texts = texts
        self._mixes = mixes
        self.checks = Checks()

    def rate(self, seconds: float, *, checked: bool) -> float:
        """Return tokens a second over so many seconds, beside checks or without."""
        return self._local.run(self._rate(seconds, checked))

    async def _rate(self, seconds: float, checked: bool) -> float:
        streams = Streams(LocalTarget(self._local), self._texts, self._mixes)
        try:
            await streams.start(_TOKENS)
            since = time.perf_counter()
            if checked:
                await self._check_until(since + seconds)
            else:
                await asyncio.sleep(seconds)
            until = time.perf_counter()
        finally:
            await streams.stop()
        tokens = sum(request.tokens_between(since, until) for _, request in streams.requests)
        if checked:
            self.checks.seconds.append(until - since)
        return tokens / (until - since)

    async def _check_until(self, end: float) -> None:
        """Make whole checks, one after the other, until `end` has passed."""
        before = len(self.checks.done)
        while time.perf_counter() < end:
            done = await asyncio.wrap_future(self._local.runtime.local.check())
            if not done.value.ok:
                raise RuntimeError(f"the weights are damaged: {done.value}")
            self.checks.done.append(done)
        self.checks.counts.append(len(self.checks.done) - before)

    def lost(self, rounds: Rounds) -> Spread:
        """Return what a check loses, in seconds of the undisturbed rate."""
        rates = zip(rounds.values[_CHECKED], rounds.values[_STILL], strict=True)
        measured = len(rounds.values[_STILL])  # Of the last rounds; those before warmed up.
        spans, counts = self.checks.seconds[-measured:], self.checks.counts[-measured:]
        return Spread.of(
            [
                (1 - with_checks / without) * span / count
                for (with_checks, without), span, count in zip(rates, spans, counts, strict=True)
            ]
        )


def measure_load(
    load: Load, name: str, seconds: float, report: Report, tell: Tell
) -> Sequence[Cell]:
    """Run rounds of both kinds; return a row of the table, and put the rest into `report`."""
    each = max(0.5, seconds / 8)
    rounds = run_rounds(
        {
            _STILL: lambda: load.rate(each, checked=False),
            _CHECKED: lambda: load.rate(each, checked=True),
        },
        seconds=seconds,
        tell=lambda what: tell(f"{name}: {what}"),
    )
    cost = Spread.of([done.seconds for done in load.checks.done])
    interval = default_interval(cost.median)
    lost = load.lost(rounds)
    share = lost.median / interval
    report.data[name] = {
        "rates": rounds.values,
        "engine_seconds_a_check": vars(cost),
        "lost_seconds_a_check": vars(lost),
        "default_interval": interval,
        "share": share,
    }
    report.checks.append(
        Check(
            f"{name}: with the server's default at most {ALLOWED:.0%} of the throughput is lost",
            share <= ALLOWED,
        )
    )
    return [
        name,
        rounds.spread(_STILL).median,
        rounds.ratio(_CHECKED, _STILL).median,
        len(load.checks.done),
        cost.median,
        1e3 * max(done.longest_stall_seconds for done in load.checks.done),
        lost.median,
        interval,
        100 * share,
    ]


def measure(options: Options, tell: Tell) -> Report:
    """Measure both kinds of load."""
    base = base_folder(options.model, options.cache, tell)
    adapters = adapter_folder(base, options.cache, [GROUP], tell)
    texts = prompts(base, _STREAMS, PROMPT_TOKENS)
    folded: Weights = dict.fromkeys(_DOMAINS, 1.0)
    own: list[Weights | None] = [
        dict.fromkeys(_DOMAINS, 0.5 + number / _STREAMS) for number in range(_STREAMS)
    ]
    settings = options.settings(streams=_STREAMS, domains=len(_DOMAINS))
    report = Report("guard", options.label, settings)
    rows = []
    with Local(options, base, adapters, max_batch=_STREAMS) as local:
        local.runtime.guard.stop()  # Or it would check in rounds without checks.
        local.run(LocalTarget(local).change(folded))
        for name, mixes in (("the default mix", [None]), ("mixes of their own", own)):
            load = Load(local, texts, mixes)
            rows.append(measure_load(load, name, options.seconds / 2, report, tell))
    report.tables.append(Table("Checks of the weights", _COLUMNS, rows))
    report.notes.append(
        "Lost a check: tokens that rounds with checks have fewer, in seconds of the other rate."
    )
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("guard", "Measure what checks of the weights cost.", seconds=60)
    options = read_options(parser.parse_args(arguments))
    with progress("guard", options.seconds) as tell:
        report = measure(options, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
