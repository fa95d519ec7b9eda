"""What runs rows and holds the resident mix, as those above see it.

This process's engine is one; a fleet of replicas, each with an engine of its own, is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from superpose_adapters.adapter import Adapter
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.geometry import Analysis
from superpose_adapters.layout import Layout
from superpose_adapters.mix import BoundMix
from superpose_server.engine.job import JobResult
from superpose_server.engine.score import RowScore, ScoreRow
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.weights.resident import PreparedMix, Verification


@dataclass(frozen=True)
class ServedBase:
    """A base as it is served; the same for every engine that serves it.

    Attributes:
        digest: sha256 of the checkpoint.
        layout: Its adaptable modules.
        facts: What else a reader of adapters needs to know of it.
        vocabulary: Rows of its embedding.
        logits: Tokens that it has logits for.
        dtype: Of weights and cache, as torch calls it.
        device: What it runs on.
        context_length: Tokens of prompt and answer together.
        max_batch: Rows that one engine runs at once.
    """

    digest: str
    layout: Layout
    facts: BaseFacts
    vocabulary: int
    logits: int
    dtype: str
    device: str
    context_length: int
    max_batch: int


@dataclass(frozen=True)
class Condition:
    """How a replica is.

    Attributes:
        replica: Its name.
        node: Where it runs.
        generation: Of the default mix that it holds; -1: it holds none yet.
        digest: Of that mix.
        running: Rows that run.
        waiting: Rows that wait.
        generated_tokens: Since its start.
        intact: Whether its weights are what they should be.
    """

    replica: str
    node: str
    generation: int
    digest: str
    running: int
    waiting: int
    generated_tokens: int
    intact: bool


class Executor(Protocol):
    """Runs rows under their mixes, and holds one mix in the weights.

    `keep`, `prepare`, `commit` and `analyze` are the operator's: one call at a time, of any thread
    but the event loop's, which they may wait for.
    """

    def keep(self, adapter: Adapter) -> None:
        """Make ready for `adapter`, which requests may name from now on.

        Raises:
            ServerError: It cannot be had where rows run; it must not be named.
        """

    def begin(self, mix: BoundMix, generation: int) -> None:
        """Hold the default mix of a start, before anything else is asked.

        Raises:
            ServerError: As `prepare`, or as the outcome of `commit`.
        """

    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Make all that a fold of `mix` needs, and change nothing that can be seen.

        Raises:
            FailedPrecondition: The folded weights would not be finite.
        """

    def commit(self, prepared: PreparedMix, generation: int) -> Future[BoundMix]:
        """Make what was prepared resident, as the default mix of `generation`.

        Returns:
            What is resident then; an Internal or a DataLoss if the fold failed.
        """

    def analyze(self, prepared: PreparedMix) -> Analysis:
        """Return the geometry of a mix against this base."""

    def submit(self, sequence: Row) -> None:
        """Queue a row; its sink gets the chunks, on whatever thread makes them.

        Raises:
            QueueFull: Too many rows wait.
            ShuttingDown: No more rows are taken.
        """

    def score(
        self, rows: Sequence[ScoreRow], mixes: Sequence[BoundMix]
    ) -> Future[JobResult[list[RowScore]]]:
        """Return the log-probability of each scored token of each row under the mix in its place.

        Raises:
            QueueFull, ShuttingDown: As `submit`.
        """

    def measure_fold_error(self, prepared: PreparedMix) -> Future[JobResult[float]]:
        """Measure what folding `prepared` would lose, without folding it."""

    def verify(self) -> Future[JobResult[Verification]]:
        """Compare the weights with a fresh fold, and what they are made of with its hashes."""

    @property
    def running(self) -> int:
        """Number of rows that run."""

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""

    @property
    def resident(self) -> BoundMix:
        """The mix in the weights."""

    def drain(self, grace: float) -> None:
        """Take no more rows, and wait at most `grace` seconds for the rest; then abort them."""

    def stop(self) -> None:
        """End: rows are aborted, all else fails with ShuttingDown."""
