"""Where a study's files lie: small results in a folder that is committed, adapters in a cache."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from benchmarks.machine import describe
from benchmarks.study.records import Records


def default_cache() -> Path:
    """Return where adapters and other large things are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "superpose-study"


class Workspace:
    """The files of one study.

    Attributes:
        losses: Nats of rows under a model.
        rows: Scored tokens of the rows, once for all models.
        geometry: Inner products of deltas, module by module.
        adapters: What the trainer said of each.
        findings: Whatever an experiment measures in its own way.
    """

    def __init__(self, out: Path, cache: Path) -> None:
        """Read what is there."""
        self.out = out
        self.cache = cache
        self.losses = Records(out / "losses.jsonl")
        self.rows = Records(out / "rows.jsonl")
        self.geometry = Records(out / "geometry.jsonl")
        self.adapters = Records(out / "adapters.jsonl")
        self.findings = Records(out / "findings.jsonl")

    @property
    def inputs_path(self) -> Path:
        """What the results were made from."""
        return self.out / "inputs.json"

    def adapter(self, key: str) -> Path:
        """Return the PEFT folder of an adapter, which may be absent."""
        return self.cache / "adapters" / key

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else write here meanwhile.

        Raises:
            ValueError: Somebody else does.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ".lock").open("w") as file:
            _lock(file, self.out)
            yield

    @contextmanager
    def cache_locked(self) -> Iterator[None]:
        """Let nobody else train into the cache meanwhile; wait while somebody else does.

        Who has waited looks again at what is there: it may have been trained by the other.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / ".lock").open("w") as file:
            if not lock_descriptor(file.fileno(), blocking=False):
                _tell(f"{self.cache}: another study trains into this cache; waiting for it")
                lock_descriptor(file.fileno())
            yield

    def forget(self, adapter: str) -> int:
        """Drop every result of an adapter, by its key, and return how many there were.

        Raises:
            OSError: A file could not be written.
        """
        return (
            self.losses.drop(lambda each: any(key == adapter for key, _ in each["mix"]))
            + self.geometry.drop(lambda each: adapter in each["pair"])
            + self.findings.drop(lambda each: adapter in each.get("adapters", ()))
        )

    @contextmanager
    def stage(
        self, name: str, experiment: str, keys: Iterable[str], **amounts: float
    ) -> Iterator[None]:
        """Note how long a stage took and the peak of memory, and what it did if it came to its end.

        Args:
            name: train, score, geometry or measure.
            experiment: What it was for.
            keys: Of what it makes.
            amounts: How much that is.
        """
        # Now: the checkout may be another one when the stage ends.
        machine = _caption()
        began, clock = datetime.now(UTC), time.monotonic()
        complete = False
        try:
            yield
            complete = True
        finally:
            line = {
                "stage": name,
                "experiment": experiment,
                "complete": complete,
                "began": began.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 2),
                "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                **(amounts if complete else {}),
                "machine": machine,
                "keys": list(keys),
            }
            with (self.out / "stages.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def stages(self, needed: Container[str] | None = None) -> list[dict[str, object]]:
        """Return what `stage` noted; a torn line is passed over.

        Args:
            needed: Keys; a stage that made none of them is left out. None: all stages.
        """
        path = self.out / "stages.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                each = json.loads(line)
            except ValueError:
                continue
            if needed is None or any(key in needed for key in each["keys"]):
                found.append(each)
        return found


@cache
def _caption() -> str:
    return describe().caption


def _tell(line: str) -> None:
    print(f"study: {line}", file=sys.stderr)


def _lock(file: IO[str], out: Path) -> None:
    if not lock_descriptor(file.fileno(), blocking=False):
        raise ValueError(f"{out}: another run writes here; wait for it, or name another --out")
