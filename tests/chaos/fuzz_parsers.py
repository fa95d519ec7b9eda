"""Mutated inputs for every parser, in this process: `python -m tests.chaos.fuzz_parsers`.

A million of them take a quarter of an hour of one core. What is found is written to
`tests/corpora`, where `test_corpora.py` reads it again with every run of the tests.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.chaos.footprint import MIB, Footprint
from tests.chaos.script import Record, make_parser
from tests.chaos.targets import Target, Workspace, make_targets

from superpose_adapters.c_library import c_function

CORPORA = Path(__file__).parents[1] / "corpora"
INPUTS, SHORT_INPUTS = 1_000_000, 6_000
# A pattern of an adapter may take 2 seconds of matching, and a target reads with four adapters.
SLOWEST_SECONDS = 15.0
# A parser that hangs within C is ended by this, with a trace on stderr.
HANGS_SECONDS = 120.0
# What was read is mutated further; so many of them for each target.
POOL = 200
LARGEST = 8 << 20  # what a door lets in of JSON
LONGEST_KEPT = 1 << 14  # or doubling would go on from input to input
LONGEST_MESSAGE = 2000
# Caches of regular expressions, and pages that one small piece keeps.
GROWTH_MIB = 48.0


@dataclass
class Outcomes:
    """What came of a target's inputs.

    Attributes:
        read: Number of those that were read.
        refused: Number of those that were refused, by the error's reason or class.
        found: {input: what was wrong with its outcome}.
        slowest: Seconds of the slowest.
    """

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    found: dict[bytes, str] = field(default_factory=dict)
    slowest: float = 0.0


def try_input(target: Target, data: bytes, outcomes: Outcomes, secrets: tuple[str, ...]) -> bool:
    """Give a target one input; note what came of it, and return whether it was read."""
    began = time.perf_counter()
    read, wrong = False, None
    try:
        target.read(data)
        read = True
        outcomes.read += 1
    except target.errors as error:
        outcomes.refused[getattr(error, "reason", type(error).__name__)] += 1
        wrong = _wrong_words(str(error), () if target.names_files else secrets)
    except Exception as error:  # What it may not raise, AssertionError for a wrong value among it.
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - began
    outcomes.slowest = max(outcomes.slowest, seconds)
    if seconds > SLOWEST_SECONDS:
        wrong = f"took {seconds:.1f} s"
    if wrong is not None:
        outcomes.found[data] = wrong
    return read


def _wrong_words(message: str, secrets: tuple[str, ...]) -> str | None:
    if "\n" in message or not message.strip():
        return f"not one line: {message[:200]!r}"
    if len(message) > LONGEST_MESSAGE:
        return f"a line of {len(message)} characters: {message[:200]}"
    told = [secret for secret in secrets if secret in message]
    return f"tells {told[0]}: {message[:200]}" if told else None


def fuzz(target: Target, inputs: int, seed: int, secrets: tuple[str, ...]) -> Outcomes:
    """Give a target `inputs` mutated inputs."""
    random = Random(f"{seed} {target.name}")
    pool = list(target.seeds)
    outcomes = Outcomes()
    for seed_input in target.seeds:
        if not try_input(target, seed_input, outcomes, secrets):
            outcomes.found[seed_input] = "a valid input was refused"
    for number in range(inputs):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True, file=2)
        data = target.mutate(random, random.choice(pool))[:LARGEST]
        if try_input(target, data, outcomes, secrets) and len(data) < LONGEST_KEPT:
            if len(pool) < POOL:
                pool.append(data)
            else:  # The seeds stay.
                pool[random.randrange(len(target.seeds), POOL)] = data
    faulthandler.cancel_dump_traceback_later()
    return outcomes


def corpus_of(target: Target) -> Path:
    """Return the folder of what was found with a target."""
    return CORPORA / target.name.replace("/", "_").replace(" ", "_")


def keep(target: Target, data: bytes) -> Path:
    """Write an input to the corpora."""
    folder = corpus_of(target)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    return path


@contextmanager
def silent() -> Iterator[None]:
    """Log nothing: what is refused is told a million times otherwise."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def settled() -> Footprint:
    """Return what is held once the allocator has given back what is free."""
    gc.collect()
    if trim := c_function("malloc_trim"):
        trim(0)
    return Footprint.of()


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("Mutated inputs for every parser, in process.")
    parser.add_argument("--inputs", type=int, help="of all targets together")
    parser.add_argument("--only", default="", help="the targets whose name holds this")
    asked = parser.parse_args(arguments)
    inputs = asked.inputs or (SHORT_INPUTS if asked.short else INPUTS)
    record = Record("fuzz_parsers", {"inputs": 0, "seed": asked.seed})
    with silent(), tempfile.TemporaryDirectory(prefix="superpose-fuzz") as folder:
        workspace = Workspace(Path(folder))
        targets = [each for each in make_targets(workspace) if asked.only in each.name]
        secrets = (folder, sys.prefix, str(Path(__file__).parents[2]), "Traceback", 'File "')
        for target in targets:  # Whatever is made once is made before anything is measured.
            fuzz(target, 20, asked.seed + 1, secrets)
        each = -(-inputs // len(targets))
        before, began = settled(), time.monotonic()
        told: dict[str, object] = {}
        for target in targets:
            outcomes = fuzz(target, each, asked.seed, secrets)
            record.facts["inputs"] += each
            refused = sum(outcomes.refused.values())
            told[target.name] = {
                "read": outcomes.read,
                "refused": refused,
                "reasons": len(outcomes.refused),
                "slowest_s": round(outcomes.slowest, 3),
            }
            grown = (settled().rss - before.rss) / MIB
            print(
                f"{target.name}: {outcomes.read} read, {refused} refused; {grown:+.1f} MiB so far",
                file=sys.stderr,
            )
            for data, what in list(outcomes.found.items())[:20]:
                record.lost.append(f"{keep(target, data).relative_to(CORPORA)}: {what}")
            record.check(
                not len(outcomes.found) > 20, f"{target.name}: {len(outcomes.found)} findings"
            )
        after = settled()
        record.lost += before.growth(after, mib=GROWTH_MIB)
        record.add(
            {
                "inputs_per_second": round(record.facts["inputs"] / (time.monotonic() - began)),
                "growth_mib": round((after.rss - before.rss) / MIB, 1),
                "targets": told,
            }
        )
    return record.finish()


if __name__ == "__main__":
    sys.exit(main())
