"""Merging adapters beside all that is served: on a thread of its own, one merge after the other.

Neither operators nor the engine wait for it, so changes and texts go on. It computes with one core.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass

from torch import Tensor

from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.layout import Layout
from superpose_adapters.merge.deviation import Deviation, deviation_norms
from superpose_adapters.merge.merge import Part, merge_each
from superpose_adapters.merge.method import MergeError, Method
from superpose_adapters.mix import BoundMix
from superpose_adapters.peft.folder import Limits
from superpose_adapters.peft.writing import adapter_files
from superpose_adapters.provenance import METADATA_KEY, Provenance, Source
from superpose_server.errors import DataLoss, FailedPrecondition, QueueFull, ShuttingDown

# Seconds after which a merge may have ended.
_RETRY_AFTER_SECONDS = 10.0

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Merged:
    """An adapter that was merged, and is stored nowhere yet.

    Attributes:
        config: Its adapter_config.json.
        tensors: Its adapter_model.safetensors, which has the provenance too.
        provenance: How it was merged.
        deviation: Norm of its difference from the plain sum, over the norm of the sum.
        seconds: How long all of this took.
    """

    config: bytes
    tensors: bytes
    provenance: Provenance
    deviation: float
    seconds: float


class Merger:
    """Merges what it is asked for, in turn; belongs to one event loop."""

    def __init__(
        self, thread: Executor, layout: Layout, base: BaseFacts, limits: Limits, most: int
    ) -> None:
        """Merge on `thread`, into adapters of `base` within `limits`; `most` merges may wait."""
        self._thread = thread
        self._layout = layout
        self._base = base
        self._limits = limits
        self._most = most
        self._asked = 0
        self._ending = threading.Event()

    async def merge(self, mix: BoundMix, method: Method) -> Merged:
        """Merge the adapters of a mix, which holds one at least.

        Cancelled, it stops at the next module.

        Raises:
            FailedPrecondition: Nothing would be left, or more than an adapter may have.
            DataLoss: An adapter of the mix is damaged in memory.
            QueueFull: Too many merges wait.
            ShuttingDown: The server is stopping.
        """
        if self._asked > self._most:
            raise QueueFull(self._most, _RETRY_AFTER_SECONDS)
        given_up = threading.Event()
        self._asked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._merge, mix, method, given_up
            )
        finally:
            self._asked -= 1
            given_up.set()

    def end(self) -> None:
        """Let merges that run or wait fail with ShuttingDown, at their next module."""
        self._ending.set()

    def close(self) -> None:
        """End, and wait for the thread."""
        self.end()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _merge(self, mix: BoundMix, method: Method, given_up: threading.Event) -> Merged:
        began = time.monotonic()
        parts = [Part(entry.domain, entry.adapter, entry.weight) for entry in mix.entries]
        pairs = self._pairs(parts, method, given_up)
        lost = self._deviation(parts, pairs, given_up)
        _check_undamaged(mix)
        sources = tuple(Source(e.domain, e.adapter.digest, e.weight) for e in mix.entries)
        provenance = Provenance(method.name, method.options, sources)
        config, tensors = adapter_files(
            pairs,
            base=self._base.name,
            fan_in_fan_out=any(self._layout[module].transposed for module in pairs),
            metadata={METADATA_KEY: provenance.text},
        )
        return Merged(config, tensors, provenance, lost, time.monotonic() - began)

    def _pairs(
        self, parts: Sequence[Part], method: Method, given_up: threading.Event
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Merge module by module, and refuse what a push would, in words of merging."""
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        nbytes = 0
        self._check_wanted(given_up)
        try:
            for module, pair in merge_each(parts, method):
                self._check_wanted(given_up)
                # At once, since an adapter's modules are alike: one of the first has the rank.
                self._check_rank(module, len(pair[0]))
                pairs[module] = pair
                nbytes += sum(factor.nbytes for factor in pair)
                self._check_size(nbytes)
        except MergeError as error:  # Of one base: it can only be too large a number.
            raise FailedPrecondition(str(error), "NOT_FINITE") from error
        if not pairs:
            raise FailedPrecondition(
                f"{method.name} leaves nothing of this mix: use other weights, or other options",
                "ZERO_EFFECT",
            )
        return pairs

    def _deviation(self, parts: Sequence[Part], pairs: Pairs, given_up: threading.Event) -> float:
        norms: dict[str, tuple[float, float]] = {}
        for module, pair in deviation_norms(parts, pairs):
            self._check_wanted(given_up)
            norms[module] = pair
        return Deviation.of(norms).whole

    def _check_wanted(self, given_up: threading.Event) -> None:
        if self._ending.is_set():
            raise ShuttingDown
        if given_up.is_set():
            raise CancelledError

    def _check_rank(self, module: str, rank: int) -> None:
        if rank > self._limits.max_rank:
            raise FailedPrecondition(
                f"merged so, module {module} has rank {rank}, and the limit is "
                f"{self._limits.max_rank}: merge with method svd and a rank, or start the server "
                "with a larger --max-rank",
                "RANK_TOO_HIGH",
            )

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._limits.max_bytes:
            raise FailedPrecondition(
                f"merged so, the adapter has {nbytes} bytes or more, and the limit is "
                f"{self._limits.max_bytes}: merge with method svd and a rank, or start the server "
                "with a larger --max-adapter-mib",
                "TOO_LARGE",
            )


def _check_undamaged(mix: BoundMix) -> None:
    """Refuse to keep for good what was made of a bit that has flipped in memory."""
    for entry in mix.entries:
        if not all(factors.whole for factors in entry.adapter.modules.values()):
            raise DataLoss(
                f"{entry.domain} is not what was loaded any more: restart the server",
                "WEIGHTS_DAMAGED",
            )
