"""What runs a sum of adapters on rows: the server's fold and score code, here or in a server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from benchmarks.serverprocess import ServerProcess
from benchmarks.study.config import Evaluation
from superpose_adapters.adapter import Adapter
from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.peft.folder import read_adapter
from superpose_adapters.scoring import EncodedText, Scope
from superpose_client import Client
from superpose_client.errors import CallError
from superpose_server.engine.runner import Runner
from superpose_server.engine.score import ScoreRow, score_slices
from superpose_server.errors import FailedPrecondition
from superpose_server.model.model import Model
from superpose_server.weights.resident import ResidentWeights

# Adapters in memory: enough for the largest sum, and for those that follow each other in a plan.
_KEPT_ADAPTERS = 48

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Weighted = Sequence[tuple[Path, float]]
"""PEFT folders with their weights."""


class NotFinite(ValueError):
    """The sum has no finite loss: a result, not a fault."""


class Evaluator(Protocol):
    """Gives losses of rows under sums of adapters."""

    def row_nats(self, mix: Weighted, rows: Sequence[EncodedText], scope: Scope) -> list[float]:
        """Return the nats of each row's scored tokens.

        Raises:
            NotFinite: There is no finite loss under this sum.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Local:
    """The server's weights, folded in this process, without engine or socket.

    Attributes:
        model: The server's model.
        weights: Its resident weights.
    """

    def __init__(self, base: Path, evaluation: Evaluation) -> None:
        """Load the base."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = Model(
            load_checkpoint(base, _DTYPES[evaluation.dtype]).to(device),
            base_digest=checkpoint_digest(base),
            device=device,
            max_batch=1,
            kernels=evaluation.kernels,
            graphs=False,
        )
        self.weights = ResidentWeights(
            self.model.module, self.model.layout, self.model.base_digest, None
        )
        self._runner = Runner(self.model, self.weights)
        self._slice_tokens = evaluation.slice_tokens
        self.adapter = lru_cache(_KEPT_ADAPTERS)(self._read)

    def _read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.model.layout)

    def bind(self, mix: Weighted) -> BoundMix:
        """Return the mix of adapters that lie in folders."""
        return BoundMix.of(
            self.model.base_digest,
            (BoundEntry(folder.name, self.adapter(folder), weight) for folder, weight in mix),
        )

    def fold(self, mix: BoundMix) -> None:
        """Make a mix resident, unless it is."""
        if self.weights.resident.mix.digest != mix.digest:
            self.weights.fold(self.weights.prepare(mix))

    def row_nats(self, mix: Weighted, rows: Sequence[EncodedText], scope: Scope) -> list[float]:
        """See `Evaluator`."""
        bound = self.bind(mix)
        try:
            self.fold(bound)
            return self.score(bound, rows, scope)
        except FailedPrecondition as error:
            raise NotFinite(str(error)) from error

    def score(self, mix: BoundMix, rows: Sequence[EncodedText], scope: Scope) -> list[float]:
        """Return the nats of rows under `mix`, on whatever is resident."""
        slices = score_slices(
            self._runner,
            [ScoreRow(row.ids, row.first_scored(scope)) for row in rows],
            [mix] * len(rows),
            self._slice_tokens,
        )
        while True:
            try:
                next(slices)
            except StopIteration as end:
                return [-sum(row.logprobs) for row in end.value]

    def close(self) -> None:
        """See `Evaluator`."""


class Served:
    """A live `superpose-server` and its `Score`."""

    def __init__(self, base: Path, evaluation: Evaluation) -> None:
        """Start it."""
        self._server = ServerProcess(
            base,
            None,
            [
                f"--dtype={evaluation.dtype}",
                "--device=auto",
                f"--compile={'auto' if evaluation.kernels else 'off'}",
            ],
        )
        self._client = Client(self._server.address)
        self._pushed: set[str] = set()

    def row_nats(self, mix: Weighted, rows: Sequence[EncodedText], scope: Scope) -> list[float]:
        """See `Evaluator`."""
        for folder, _ in mix:
            if folder.name not in self._pushed:
                self._client.push(folder.name, folder)
                self._pushed.add(folder.name)
        try:
            # As the default mix, so that it is folded and not corrected.
            self._client.set({folder.name: weight for folder, weight in mix})
            scored = self._client.score([row.ids for row in rows], logprobs=True)
        except CallError as error:
            if getattr(error, "reason", "") in ("OUTPUT_NOT_FINITE", "FOLD_NOT_FINITE"):
                raise NotFinite(str(error)) from error
            raise
        return [
            -sum(item.logprobs[row.first_scored(scope) - 1 :])
            for row, item in zip(rows, scored.items, strict=True)
        ]

    def close(self) -> None:
        """Stop it."""
        self._client.close()
        self._server.close()

    def __enter__(self) -> Served:
        """Return this."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.close()
