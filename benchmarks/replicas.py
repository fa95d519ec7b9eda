"""Replicas against one server: what each further engine gives, and what the way to it costs.

Servers of one core an engine: without Ray, with one replica, and with two. Streams, a stream alone,
and changes of the default mix, in turns. On a machine of two cores the doors, Ray and the load have
none of their own, so that less than twice comes of two: the table says what of it the engines had.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.serverprocess import ServerProcess
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.spread import Spread, percentile
from benchmarks.target import Streamed
from superpose_client import AsyncClient

GROUP = Group(8)
PROMPT_TOKENS = 32
NEW_TOKENS = 64
_CHANGES = 10
_SINGLE = "one server"


@dataclass
class Figures:
    """What a server gave beside its rates, one value a stream or a change, in seconds."""

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)


class Contestant:
    """A server under load."""

    def __init__(self, address: str, runner: asyncio.Runner, texts: list[list[int]]) -> None:
        """Send `texts` to the server at `address`."""
        self._address = address
        self._runner = runner
        self._texts = texts
        self.figures: dict[int, Figures] = {}

    def measure(self, streams: int) -> float:
        """Return tokens a second of a batch of streams; what else it shows is noted."""
        return self._runner.run(self._measure(streams))

    async def _measure(self, streams: int) -> float:
        figures = self.figures.setdefault(streams, Figures())
        async with AsyncClient(self._address) as client:
            target = ServerTarget(client)
            for number in range(_CHANGES):
                began = time.perf_counter()
                await client.set({GROUP.names[number % 2]: 1.0, GROUP.names[2]: 0.5})
                figures.changes.append(time.perf_counter() - began)
            requests = [Streamed(text, None, NEW_TOKENS) for text in self._texts[:streams]]
            began = time.perf_counter()
            await asyncio.gather(*map(target.stream, requests))
            seconds = time.perf_counter() - began
        for request in requests:
            if request.status != "OK":
                raise RuntimeError(f"a stream ended with {request.status}")
            figures.first.append(request.first_token)
            figures.each.append((request.latency - request.first_token) / (NEW_TOKENS - 1))
        return streams * NEW_TOKENS / seconds


def measure(options: Options, streams: list[int], replicas: list[int], tell: Tell) -> Report:
    """Run the benchmark."""
    base = base_folder(options.model, options.cache, tell)
    adapters = adapter_folder(base, options.cache, [GROUP], tell)
    texts = prompts(base, max(streams), PROMPT_TOKENS)
    report = Report(
        "replicas",
        options.label,
        options.settings(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, threads_an_engine=1),
    )
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        servers = {_SINGLE: ["--threads=1"]} | {
            f"{count} replica{'s' * (count > 1)}": [
                f"--replicas={count}",
                "--replica-cpus=1",
                "--threads=1",
            ]
            for count in replicas
        }
        contestants = {}
        for name, flags in servers.items():
            tell(f"starting {name}")
            address = stack.enter_context(_start(options, base, adapters, flags)).address
            contestants[name] = Contestant(address, runner, texts)
        for count in streams:
            measures: dict[str, Measure] = {
                name: lambda each=each, count=count: each.measure(count)  # type: ignore[misc]
                for name, each in contestants.items()
            }
            rounds = run_rounds(
                measures, seconds=options.seconds / len(streams), most=20, tell=tell
            )
            report.tables.append(_table(count, rounds, contestants))
            report.data[str(count)] = rounds.values
    report.notes.append(
        f"Before each batch of streams the mix is changed {_CHANGES} times; a change returns when "
        "every replica holds it. Ratios are taken round by round."
    )
    return report


def _start(options: Options, base: Path, adapters: Path, flags: list[str]) -> ServerProcess:
    return ServerProcess(base, adapters, [*options.server_flags(), *flags])


def _table(streams: int, rounds: Rounds, contestants: dict[str, Contestant]) -> Table:
    lines: list[list[Cell]] = []
    for name, contestant in contestants.items():
        figures = contestant.figures[streams]
        lines.append(
            [
                name,
                rounds.spread(name).median,
                rounds.ratio(name, _SINGLE).median,
                Spread.of(figures.first).median * 1e3,
                Spread.of(figures.each).median * 1e3,
                Spread.of(figures.changes).median * 1e3,
                percentile(figures.changes, 99) * 1e3,
            ]
        )
    return Table(
        f"{streams} stream{'s' * (streams > 1)} ({rounds.count} rounds)",
        (
            "engines",
            "tokens/s",
            f"of {_SINGLE}'s",
            "first token, ms",
            "ms a token",
            "a change, ms",
            "p99",
        ),
        lines,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("replicas", "Replicas against one server.", seconds=120)
    parser.add_argument("--streams", type=numbers, default=[1, 16], help="concurrent streams")
    parser.add_argument("--replicas", type=numbers, default=[1, 2], help="how many, of each server")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    with progress("replicas", options.seconds) as tell:
        report = measure(options, parsed.streams, parsed.replicas, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
