"""All peers on one model, interleaved: tokens/s at some batch sizes, and whether they agree.

    python -m benchmarks.peers --model FOLDER [--adapter FOLDER] [--json FILE]

Every repeat runs every peer once at every batch size, so that what else the machine does meets all
of them alike. Same threads, same prompts of random tokens, greedy, a fixed number of new tokens.
Tokens/s counts new tokens over the whole time, prompts included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import (
    VARIANTS,
    Answer,
    PeerError,
    PeerProcess,
    Prompts,
    Settings,
    default_cache,
)

# Random weights leave near-ties, and one flip changes all that follows: only the first tokens of a
# row are compared.
COMPARED = 8
# Threads of OpenMP may spin for a moment after a request; they must not take the
# processor from the next peer.
PAUSE = 0.1
WARM_UP = 4  # tokens
# With --quiet: how long to look whether others run, the share of the processor that they may take,
# and how often a run is tried.
LOOK = 0.5
QUIET = 0.1
ATTEMPTS = 3
# Whose tokens the others are compared with: without an adapter, and with one.
REFERENCES = {False: "transformers generate float32", True: "PEFT unmerged float32"}

console = Console(highlight=False, stderr=True)


@dataclass
class Measured:
    """What one variant gave."""

    process: PeerProcess
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    # Of each run, the share of the processor that was taken by other processes.
    disturbed: dict[int, list[float]] = field(default_factory=dict)
    # Batch sizes that would take longer than --limit.
    too_slow: set[int] = field(default_factory=set)
    error: str | None = None

    def rates(self, batch: int) -> list[float]:
        """Return the new tokens/s of each repeat."""
        return [
            sum(map(len, answer.tokens)) / answer.seconds for answer in self.answers.get(batch, [])
        ]

    def tokens(self, batch: int) -> Prompts | None:
        answers = self.answers.get(batch)
        return answers[0].tokens if answers else None


def batches(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Tokens/s of all peers on one model."
    )
    parser.add_argument("--model", required=True, type=Path, help="transformers GPT-2 checkpoint")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter, for the peers that serve one")
    parser.add_argument("--batch", default=[1, 8, 32], type=batches, help="default 1,8,32")
    parser.add_argument("--prompt", default=32, type=int, help="tokens a prompt")
    parser.add_argument("--new", default=64, type=int, help="new tokens a row")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--limit", default=60.0, type=float, help="most seconds of a run")
    parser.add_argument(
        "--quiet",
        default=0.0,
        type=float,
        metavar="SECONDS",
        help="wait so long before a run for a machine where nothing else runs, and try a run again "
        "that was disturbed; default: do not wait",
    )
    parser.add_argument("--threads", default=len(os.sched_getaffinity(0)), type=int)
    parser.add_argument("--device", default="cpu", help="of the peers in torch")
    parser.add_argument("--only", default="", help="peers with this in their name")
    parser.add_argument("--skip", metavar="TEXT", help="no peers with this in their name")
    parser.add_argument("--cache", default=default_cache(), type=Path, help="converted models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args(arguments)


def make_prompts(model: Path, rows: int, length: int) -> Prompts:
    """Return rows of random tokens, always the same."""
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    source = random.Random(0)
    return [[source.randrange(size) for _ in range(length)] for _ in range(rows)]


@contextmanager
def started(settings: Settings, options: argparse.Namespace) -> Iterator[list[Measured]]:
    """Start all variants that can run; say in a line why others cannot."""
    with ExitStack() as stack:
        running = []
        for variant in VARIANTS:
            name = variant.name.lower()
            if options.only.lower() not in name or (options.skip and options.skip.lower() in name):
                continue
            process = PeerProcess(variant, settings)
            try:
                process.start()
            except PeerError as error:
                console.print(f"skipped: {variant.name}: {error}", soft_wrap=True)
                continue
            stack.callback(process.close)
            running.append(Measured(process))
        yield running


def busy_seconds() -> float:
    """Return how long the processors of this machine have been busy, summed; 0 if unknown."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts = map(int, first.split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def run(measured: Measured, prompts: Prompts, new_tokens: int) -> Answer | None:
    """Run a variant once, unless it has failed before."""
    batch = len(prompts)
    if measured.error is not None or batch in measured.too_slow:
        return None
    began, busy, own = time.monotonic(), busy_seconds(), measured.process.cpu_seconds()
    try:
        answer = measured.process.run(prompts, new_tokens)
    except PeerError as error:
        measured.error = str(error)
        console.print(f"failed: {measured.process.variant.name}: {error}", soft_wrap=True)
        return None
    others = busy_seconds() - busy - (measured.process.cpu_seconds() - own)
    share = others / (time.monotonic() - began) / (os.cpu_count() or 1)
    measured.disturbed.setdefault(batch, []).append(max(0.0, share))
    time.sleep(PAUSE)
    return answer


def wait_for_quiet(limit: float) -> None:
    """Wait until nothing else runs, for `limit` seconds at most."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        busy = busy_seconds()
        time.sleep(LOOK)
        if busy_seconds() - busy < QUIET * LOOK * (os.cpu_count() or 1):
            return


def quiet_run(measured: Measured, prompts: Prompts, options: argparse.Namespace) -> None:
    """Run a variant and keep its answer; once more if others disturbed it and --quiet is given."""
    batch = len(prompts)
    for attempt in range(ATTEMPTS if options.quiet else 1):
        if measured.error is not None or batch in measured.too_slow:
            return
        wait_for_quiet(options.quiet)
        answer = run(measured, prompts, options.new)
        if answer is None:
            return
        if attempt > 0:  # the disturbed run before it is forgotten
            measured.answers[batch].pop()
            measured.disturbed[batch].pop(-2)
        measured.answers.setdefault(batch, []).append(answer)
        if measured.disturbed[batch][-1] < QUIET:
            return


def warm_up(measured: Measured, prompts: Prompts, options: argparse.Namespace) -> None:
    """Run every batch size once, briefly; leave out those that would take longer than the limit."""
    for batch in options.batch:
        wait_for_quiet(options.quiet)
        answer = run(measured, prompts[:batch], WARM_UP)
        if answer is None:
            continue
        first = answer.first_token_seconds
        estimate = first + (answer.seconds - first) / (WARM_UP - 1) * (options.new - 1)
        if estimate > options.limit:
            name = measured.process.variant.name
            console.print(f"left out: {name} at batch {batch}: about {estimate:.0f} s a run")
            measured.too_slow |= {size for size in options.batch if size >= batch}
    measured.disturbed.clear()


def measure(peers: list[Measured], options: argparse.Namespace) -> None:
    """Run everything, interleaved; what it gave is put into `peers`."""
    prompts = make_prompts(options.model, max(options.batch), options.prompt)
    for measured in peers:
        warm_up(measured, prompts, options)
    console.print("warm-up done")
    for repeat in range(options.repeats):
        # Each repeat begins with another peer, so that none always follows the same one.
        turn = repeat % max(1, len(peers))
        for batch in options.batch:
            for measured in peers[turn:] + peers[:turn]:
                quiet_run(measured, prompts[:batch], options)
        console.print(f"repeat {repeat + 1} of {options.repeats} done")


def agreement(measured: Measured, peers: list[Measured], batch: int) -> str:
    """Return how many rows begin with the tokens of the reference."""
    name = REFERENCES[measured.process.variant.adapter]
    reference = next((peer for peer in peers if peer.process.variant.name == name), None)
    wanted = reference.tokens(batch) if reference else None
    found = measured.tokens(batch)
    if wanted is None or found is None:
        return ""
    if reference is measured:
        return "reference"
    pairs = zip(wanted, found, strict=True)
    return f"{sum(a[:COMPARED] == b[:COMPARED] for a, b in pairs)}/{len(wanted)}"


def variety(peers: list[Measured], batch: int) -> str | None:
    """Return how the tokens of the references vary: were all alike, equality would mean little."""
    parts = []
    for name in REFERENCES.values():
        tokens = next(
            (peer.tokens(batch) for peer in peers if peer.process.variant.name == name), None
        )
        if tokens:
            beginnings = {tuple(row[:COMPARED]) for row in tokens}
            different = statistics.mean(len(set(row[:COMPARED])) for row in tokens)
            parts.append(
                f"{name}: {len(beginnings)} different beginnings in {len(tokens)} rows, "
                f"{different:.1f} different tokens in each"
            )
    return "; ".join(parts) or None


def table(peers: list[Measured], options: argparse.Namespace) -> Table:
    largest = max(options.batch)
    result = Table(
        box=box.MARKDOWN,
        title=f"New tokens/s, median (lowest-highest) of {options.repeats}; "
        f"prompt {options.prompt}, new {options.new}, threads {options.threads}",
    )
    result.add_column("peer")
    result.add_column("bits", justify="right")
    for batch in options.batch:
        result.add_column(f"batch {batch}", justify="right")
    result.add_column(f"ms to first token, batch {largest}", justify="right")
    result.add_column(f"rows equal in {COMPARED} tokens", justify="right")
    for measured in peers:
        cells = []
        for batch in options.batch:
            rates = measured.rates(batch)
            cells.append(
                f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"
                if rates
                else "too slow"
                if batch in measured.too_slow
                else "failed"
            )
        first = [1000 * answer.first_token_seconds for answer in measured.answers.get(largest, [])]
        result.add_row(
            measured.process.variant.name,
            str(measured.process.ready["weights_bits"]),
            *cells,
            f"{statistics.median(first):.0f}" if first else "",
            agreement(measured, peers, largest),
        )
    return result


def report(peers: list[Measured], options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures, for --json."""
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "architecture": platform.machine()},
        "settings": {
            name: getattr(options, name)
            for name in ("batch", "prompt", "new", "repeats", "threads", "device")
        },
        "peers": [
            {
                "name": measured.process.variant.name,
                **{key: value for key, value in measured.process.ready.items() if key != "ready"},
                "error": measured.error,
                "too_slow": sorted(measured.too_slow),
                "batches": [
                    {
                        "batch": batch,
                        "seconds": [answer.seconds for answer in answers],
                        "first_token_seconds": [answer.first_token_seconds for answer in answers],
                        "tokens_per_second": measured.rates(batch),
                        "rows_equal": agreement(measured, peers, batch),
                        "share_of_others": measured.disturbed[batch],
                    }
                    for batch, answers in measured.answers.items()
                ],
            }
            for measured in peers
        ],
    }


def main() -> None:
    options = parse()
    settings = Settings(
        model=options.model,
        adapter=options.adapter,
        threads=options.threads,
        device=options.device,
        rows=max(options.batch),
        length=options.prompt + options.new,
        cache=options.cache,
    )
    with started(settings, options) as peers:
        if not peers:
            sys.exit("peers: none can run; the reasons are above")
        measure(peers, options)
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(table(peers, options))
    said = variety(peers, max(options.batch))
    if said:
        console.print(said, soft_wrap=True)
    shares = [share for peer in peers for runs in peer.disturbed.values() for share in runs]
    if shares:
        console.print(
            f"other processes took {statistics.median(shares):.0%} of the processor in the median "
            f"run, {max(shares):.0%} at most"
        )
    if options.json:
        options.json.write_text(json.dumps(report(peers, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
