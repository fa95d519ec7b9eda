"""What a peer is: a model, loaded, that continues a batch of prompts greedily.

Each peer is a module with `load(settings) -> Peer`. Greedy, exactly `new_tokens` tokens a row, and
the end-of-text token is a token like any other: so every peer does the same work. This file needs
nothing but the standard library, because workers import it in two environments.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

Prompts = list[list[int]]


def default_cache() -> Path:
    """Return the folder of converted models: GGUF, CTranslate2's, OpenVINO's."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "superpose" / "peers"


@dataclass(frozen=True)
class Settings:
    """What a peer is loaded with. A peer may refuse what it cannot do, by ValueError."""

    model: Path  # a transformers checkpoint
    adapter: Path | None = None  # a PEFT folder
    dtype: str = "float32"
    threads: int = 2
    device: str = "cpu"
    rows: int = 64  # most rows of a batch
    length: int = 256  # most tokens of a row, prompt included
    cache: Path = field(default_factory=default_cache)


@dataclass(frozen=True)
class Answer:
    """What a batch gave, and when, in seconds since the request."""

    tokens: list[list[int]]
    first_token_seconds: float  # until every row has its first token
    seconds: float  # until every row has its last


class Peer(Protocol):
    """A loaded peer."""

    @property
    def version(self) -> str:
        """Name and version of what does the work."""

    @property
    def weights_bits(self) -> int:
        """Bits of a stored weight of the large matrices."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        """Continue every prompt by exactly `new_tokens` tokens, greedily."""


def converted(source: Path, cache: Path, name: str, convert: Callable[[Path], None]) -> Path:
    """Return `source` as converted by `convert`, from the cache if it has been done before.

    `convert` writes to the path that it is given, a file or a folder. The cache knows a source by
    its place and by the sizes and times of its files, so a changed checkpoint is converted anew.
    """
    stamps = [
        f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
        for path in sorted(source.iterdir())
        if path.is_file()
    ]
    digest = hashlib.sha256("\n".join([str(source.resolve()), *stamps]).encode()).hexdigest()[:16]
    target = cache / f"{source.name}-{digest}-{name}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # A half-written conversion must never be found by the next run.
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    try:
        convert(work / name)
        (work / name).replace(target)
    except OSError:
        # Another worker may have been quicker; its result is as good.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target
