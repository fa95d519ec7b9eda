"""Tokens a second and time to first token of concurrent streams, against bare models and peers.

All contestants run the same prompts, one batch of streams after the other, in turns:
    bare: the model in the server's step loop, as compiled, no adapter loaded, no correction code.
    bare transformers: the unmodified transformers model in the same step loop.
  (both as processes of their own, `benchmarks/peers/bare_engine.py` says why)
    base: 24 domains loaded, none used.
    merged: a mix of three domains, folded.
    mixed: every row another mix of three out of 24 domains, the merged mix resident.
    merged, top_p and the like: the same, but its tokens are drawn (`benchmarks/sampling.py`).
    merged over gRPC: a server in its own process, streams through the client library.
    merged over HTTP: the same server, streams of `/v1/completions`.
Peers (`benchmarks/peers`) run the base in processes of their own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.httptarget import HttpTarget
from benchmarks.inprocess import Local
from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.peers.peer import Settings
from benchmarks.peers.pool import BARE_VARIANTS, VARIANTS, PeerError, PeerProcess, Variant
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.sampling import GREEDY, SAMPLINGS, describe, samplings
from benchmarks.scaling import random_mixes
from benchmarks.serverprocess import ServerProcess
from benchmarks.servertarget import ServerTarget
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.spread import Spread
from benchmarks.target import Streamed, Weights
from superpose_adapters.mix import BoundMix
from superpose_client import AsyncClient, GenerateOptions

PROMPT_TOKENS = 32
NEW_TOKENS = 64
STREAMS = (1, 8, 32, 64)
DOMAINS = 24
RANK = 4
MERGED_DOMAINS = 3
# Peers are not run with more rows: their figures say little more and take long.
MOST_PEER_ROWS = 32

BARE, PLAIN, BASE, MERGED, MIXED = "bare", "bare transformers", "base", "merged", "mixed"
GRPC, HTTP = "merged over gRPC", "merged over HTTP"
SAMPLED = {name: f"{MERGED}, {name}" for name in SAMPLINGS if name != GREEDY}
OURS = (BARE, PLAIN, BASE, MERGED, *SAMPLED.values(), MIXED, GRPC, HTTP)
GENERATE = "transformers generate {dtype}"


@dataclass
class Figures:
    """What a contestant gave beside its total time, a value a batch.

    Attributes:
        first: Seconds until a row had its first token, the mean of the rows.
        token: Seconds between two tokens of a row, the mean.
    """

    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def note(self, requests: Sequence[Streamed]) -> None:
        """Add a batch."""
        self.first.append(sum(r.first_token for r in requests) / len(requests))
        spans = [(r.arrivals[-1][0] - r.arrivals[0][0]) / (len(r.tokens) - 1) for r in requests]
        self.token.append(sum(spans) / len(spans))


class Wires:
    """Streams through gRPC and through HTTP, from an event loop of its own.

    Attributes:
        targets: The server, by the name of the wire.
    """

    def __init__(self, server: ServerProcess) -> None:
        """Connect."""
        self._loop = asyncio.new_event_loop()
        self._client = self._loop.run_until_complete(self._connect(server.address))
        self._grpc = ServerTarget(self._client)
        self.targets: dict[str, ServerTarget | HttpTarget] = {GRPC: self._grpc}
        if server.http_address:
            self.targets[HTTP] = HttpTarget(server.http_address)

    @staticmethod
    async def _connect(address: str) -> AsyncClient:
        return AsyncClient(address)

    def set(self, mix: Weights) -> None:
        """Make `mix` the default."""
        self._loop.run_until_complete(self._grpc.change(mix))

    def run(self, wire: str, requests: Sequence[Streamed]) -> None:
        """Run all requests at once."""
        target = self.targets[wire]

        async def everything() -> None:
            await asyncio.gather(*(target.stream(request) for request in requests))

        self._loop.run_until_complete(everything())

    def close(self) -> None:
        """Disconnect."""
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class Serving:
    """All contestants, loaded."""

    def __init__(
        self,
        options: Options,
        most: int,
        new_tokens: int,
        sampled: Sequence[str],
        stack: ExitStack,
    ) -> None:
        """Load what the options name; `stack` closes it."""
        self._options = options
        self._sampled = sampled
        self._new_tokens = new_tokens
        self._stack = stack
        self._length = PROMPT_TOKENS + new_tokens
        self._most = most
        self.base = base_folder(options.model, options.cache)
        self._group = Group(DOMAINS, rank=RANK)
        self.folder = adapter_folder(self.base, options.cache, [self._group])
        self._resident = dict.fromkeys(self._group.names[:MERGED_DOMAINS], 1.0)
        self._mixes = random_mixes(self._group.names, most, MERGED_DOMAINS)
        self._local = stack.enter_context(
            Local(options, self.base, self.folder, max_batch=most, max_length=self._length)
        )
        self._wires: Wires | None = None
        self._peers: dict[str, PeerProcess] = {}
        self.figures: dict[tuple[str, int], Figures] = {}
        self.absent: list[str] = []

    def load(self, tell: Tell, only: Sequence[str], *, wire: bool, peers: bool) -> None:
        """Start every contestant, or those of `only`; a peer that cannot run is noted as absent."""
        if wire and (not only or {GRPC, HTTP} & {*only}):
            tell("loading: server")
            flags = [f"--max-batch={self._most}", f"--max-length={self._length}"]
            if find_spec("uvicorn") is None:
                self.absent.append(f"{HTTP}: the extra `http` is not installed")
            else:
                flags.append("--http-listen=127.0.0.1:0")
            server = self._stack.enter_context(
                ServerProcess(self.base, self.folder, [*flags, *self._options.server_flags()])
            )
            self._wires = Wires(server)
            self._stack.callback(self._wires.close)
            self._wires.set(self._resident)
        bare = [replace(variant, dtype=self._options.dtype) for variant in BARE_VARIANTS]
        for variant in [*bare, *(VARIANTS if peers else ())]:
            if only and variant.name not in only:
                continue
            if variant.package == "torch" and variant.dtype != self._options.dtype:
                continue  # transformers is compared in the same dtype.
            settings = Settings(
                model=self.base,
                adapter=self.folder / self._group.names[0],
                threads=torch.get_num_threads(),
                device=self._options.torch_device.type,
                rows=self._most_rows(variant),
                length=self._length,
                cache=self._options.cache / "peers",
            )
            peer = PeerProcess(variant, settings)
            reason = peer.unavailable()
            if reason is None:
                tell(f"loading: {variant.name}")
                try:
                    peer.start()
                except PeerError as error:
                    reason = str(error)
            if reason is not None:
                self.absent.append(f"{variant.name}: {reason}")
                continue
            self._stack.callback(peer.close)
            self._peers[variant.name] = peer

    def contestants(self, rows: int, only: Sequence[str]) -> dict[str, Measure]:
        """Return what runs a batch of `rows` streams."""
        texts = prompts(self.base, rows, PROMPT_TOKENS)
        found: dict[str, Measure] = {}
        resident = self._local.bind(self._resident)
        for name, fold, mixes in (
            (BASE, self._local.bind({}), [{}] * rows),
            (MERGED, resident, [self._resident] * rows),
            (MIXED, resident, self._mixes[:rows]),
        ):
            bound = [self._local.bind(mix) for mix in mixes]
            found[name] = self._in_process(name, texts, bound, fold)
        for sampling in self._sampled:
            name = SAMPLED[sampling]
            found[name] = self._in_process(
                name, texts, [resident] * rows, resident, SAMPLINGS[sampling]
            )
        if self._wires is not None:
            for name in self._wires.targets:
                found[name] = self._over_wire(self._wires, name, texts)
        for name, peer in self._peers.items():
            if rows <= peer.settings.rows:
                found[name] = self._peer(peer, texts)
        order = [*(name for name in OURS if name in found), *self._peers]
        return {name: found[name] for name in order if name in found and (not only or name in only)}

    def _most_rows(self, variant: Variant) -> int:
        return self._most if variant.name in (BARE, PLAIN) else min(self._most, MOST_PEER_ROWS)

    def _in_process(
        self,
        name: str,
        texts: list[list[int]],
        mixes: list[BoundMix],
        resident: BoundMix,
        sampling: GenerateOptions = SAMPLINGS[GREEDY],
    ) -> Measure:
        local = self._local

        def measure() -> float:
            if local.runtime.engine.resident.digest != resident.digest:
                local.fold(local.prepare(resident))
            ended = threading.Semaphore(0)
            began = time.perf_counter()
            requests = [Streamed(text, None, self._new_tokens, sampling) for text in texts]
            for request, mix in zip(requests, mixes, strict=True):
                local.start(request, mix, ended.release)
            for _ in requests:
                ended.acquire()
            return self._note(name, requests, began)

        return measure

    def _over_wire(self, wires: Wires, name: str, texts: list[list[int]]) -> Measure:
        def measure() -> float:
            began = time.perf_counter()
            requests = [Streamed(text, None, self._new_tokens) for text in texts]
            wires.run(name, requests)
            return self._note(name, requests, began)

        return measure

    def _note(self, name: str, requests: list[Streamed], began: float) -> float:
        failed = {request.status for request in requests} - {"OK"}
        if failed:
            raise RuntimeError(f"{name}: requests ended with {', '.join(sorted(failed))}")
        self.figures.setdefault((name, len(requests)), Figures()).note(requests)
        return max(request.ended for request in requests) - began

    def _peer(self, peer: PeerProcess, texts: list[list[int]]) -> Measure:
        def measure() -> float:
            answer = peer.run(texts, self._new_tokens)
            figures = self.figures.setdefault((peer.variant.name, len(texts)), Figures())
            figures.first.append(answer.first_token_seconds)
            rest = answer.seconds - answer.first_token_seconds
            figures.token.append(rest / (self._new_tokens - 1))
            return answer.seconds

        return measure


def measure(
    options: Options,
    streams: Sequence[int],
    new_tokens: int,
    only: Sequence[str],
    *,
    sampled: Sequence[str],
    wire: bool,
    peers: bool,
    tell: Tell,
) -> tuple[Report, dict[int, Rounds]]:
    """Run the benchmark."""
    report = Report(
        "serving",
        options.label,
        options.settings(prompt_tokens=PROMPT_TOKENS, new_tokens=new_tokens, domains=DOMAINS),
    )
    results: dict[int, Rounds] = {}
    with ExitStack() as stack:
        tell("loading: served")
        serving = Serving(options, max(streams), new_tokens, sampled, stack)
        serving.load(tell, only, wire=wire, peers=peers)
        total = sum(streams)
        for rows in streams:

            def say(text: str, rows: int = rows) -> None:
                tell(f"{rows} streams: {text}")

            # Time goes where a batch takes long, but a short one needs its rounds too.
            share = options.seconds * (0.5 / len(streams) + 0.5 * rows / total)
            results[rows] = run_rounds(
                serving.contestants(rows, only), seconds=share, most=15, tell=say
            )
        report.tables = [
            *(_table(rows, rounds, serving, new_tokens) for rows, rounds in results.items()),
            _ratios(results, options),
        ]
        if sampled:
            report.notes.append(describe(options.model))
        report.notes += [f"Left out: {line}" for line in serving.absent]
        report.data = {
            "seconds": {str(rows): rounds.values for rows, rounds in results.items()},
            "first_token_seconds": {
                f"{name}, {rows}": figures.first
                for (name, rows), figures in serving.figures.items()
            },
        }
    report.notes.append(
        "A batch of streams starts at once and ends when the last of them has its last token; "
        "tokens a second are those of the whole, prompts included in the time. Contestants run in "
        "turns; ratios are taken round by round, and their median is shown."
    )
    return report, results


def _table(rows: int, rounds: Rounds, serving: Serving, new_tokens: int) -> Table:
    lines: list[list[Cell]] = []
    for name in rounds.values:
        spread = Spread.of([rows * new_tokens / seconds for seconds in rounds.values[name]])
        figures = serving.figures[name, rows]
        lines.append(
            [
                name,
                spread.median,
                f"{spread.lower:.3g} - {spread.upper:.3g}",
                Spread.of(figures.first).median * 1e3,
                Spread.of(figures.token).median * 1e3,
            ]
        )
    return Table(
        f"{rows} stream{'s' * (rows > 1)} ({rounds.count} rounds)",
        ("what", "tokens/s, median", "quartiles", "first token, ms", "ms a token"),
        lines,
    )


def _ratios(results: dict[int, Rounds], options: Options) -> Table:
    """Compare what the project promises: how many times as fast as the second is the first."""
    generate = GENERATE.format(dtype=options.dtype)
    wide = [v.name for v in VARIANTS if v.weights_bits >= 16 and not v.adapter]
    pairs: list[tuple[str, Callable[[Rounds], tuple[str, str] | None]]] = [
        ("merged / transformers generate, same dtype", lambda r: (MERGED, generate)),
        ("merged / best peer of 16 bits or more", lambda r: _best(r, wide)),
        ("merged / bare", lambda r: (MERGED, BARE)),
        ("merged / bare transformers", lambda r: (MERGED, PLAIN)),
        *(
            (f"{name} / {MERGED}, greedy", lambda r, name=name: (name, MERGED))
            for name in SAMPLED.values()
        ),
        ("mixed / merged", lambda r: (MIXED, MERGED)),
        ("over gRPC / in process", lambda r: (GRPC, MERGED)),
        ("over HTTP / over gRPC", lambda r: (HTTP, GRPC)),
    ]
    lines: list[list[Cell]] = []
    for title, choose in pairs:
        cells: list[Cell] = [title]
        for rounds in results.values():
            pair = choose(rounds)
            if pair is None or not set(pair) <= set(rounds.values):
                cells.append(None)
                continue
            # Of times: the second over the first is how many times as fast the first is.
            cells.append(rounds.ratio(pair[1], pair[0]).median)
        lines.append(cells)
    return Table("Ratios of tokens a second", ("what", *(f"{n} streams" for n in results)), lines)


def _best(rounds: Rounds, names: Sequence[str]) -> tuple[str, str] | None:
    present = [name for name in names if name in rounds.values]
    if not present:
        return None
    return MERGED, min(present, key=lambda name: rounds.spread(name).median)


def draw(results: dict[int, Rounds], new_tokens: int, figure: Any) -> None:
    """Draw tokens a second, one panel a number of streams."""
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (rows, rounds) in zip(panels, results.items(), strict=True):
        names = list(rounds.values)[::-1]
        for at, name in enumerate(names):
            spread = Spread.of([rows * new_tokens / s for s in rounds.values[name]])
            errors = [[spread.median - spread.lower], [spread.upper - spread.median]]
            colour = (
                "tab:blue" if name in OURS[2:] else "tab:gray" if name in OURS else "tab:orange"
            )
            axes.barh(at, spread.median, xerr=errors, color=colour, ecolor="black", capsize=2)
            axes.annotate(
                f"{spread.median:.3g}",
                (spread.upper, at),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        labels = names if axes is panels[0] else [""] * len(names)
        axes.set_yticks(range(len(names)), labels, fontsize=7)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.2)
        axes.set_title(f"{rows} stream{'s' * (rows > 1)}", fontsize=9)
        axes.set_xlabel("tokens/s", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("serving", "Throughput and latency against peers.", seconds=900)
    parser.add_argument("--streams", type=numbers, default=list(STREAMS), help="concurrent streams")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens a stream")
    parser.add_argument("--only", action="append", default=[], help="a contestant; may be repeated")
    parser.add_argument(
        "--sampling",
        type=samplings,
        default=[*SAMPLINGS],
        help="how tokens are chosen, one or more of " + ",".join(SAMPLINGS),
    )
    parser.add_argument("--no-peers", action="store_true", help="leave all peers out")
    parser.add_argument(
        "--no-grpc", action="store_true", help="leave the server process out, and HTTP with it"
    )
    parsed = parser.parse_args(arguments)
    names = dict.fromkeys([*OURS, *(each.name for each in (*BARE_VARIANTS, *VARIANTS))])
    for name in parsed.only:
        if name not in names:
            parser.error(f"--only {name!r}: use one of {', '.join(map(repr, names))}")
    options = read_options(parsed)
    with progress("serving", options.seconds) as tell:
        report, results = measure(
            options,
            parsed.streams,
            parsed.new_tokens,
            parsed.only,
            sampled=[name for name in parsed.sampling if name != GREEDY],
            wire=not parsed.no_grpc,
            peers=not parsed.no_peers,
            tell=tell,
        )
    return report.finish(options, lambda figure: draw(results, parsed.new_tokens, figure))


if __name__ == "__main__":
    sys.exit(main())
