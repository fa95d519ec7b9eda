"""Where a study's files lie: small results in a folder that is committed, adapters in a cache."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO

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
    def stage(self, name: str, experiment: str, **amounts: float) -> Iterator[None]:
        """Note how long a stage took, if it came to its end, and the peak of memory."""
        began, clock = datetime.now(UTC), time.monotonic()
        yield
        line = {
            "stage": name,
            "experiment": experiment,
            "began": began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 2),
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **amounts,
            "machine": _caption(),
        }
        with (self.out / "stages.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def stages(self) -> list[dict[str, object]]:
        """Return what `stage` noted; a torn line is passed over."""
        path = self.out / "stages.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


@cache
def _caption() -> str:
    return describe().caption


def _lock(file: IO[str], out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{out}: another run writes here; wait for it, or name another --out"
        ) from error
