"""One replica: an engine of its own behind calls that Ray Serve routes.

It knows digests, no names: every call says which adapters its mixes hold, and what the default mix
should be. So a row's text does not depend on what a replica holds in its weights, which is a matter
of speed; and none serves anything before it holds what its caller knew to be the default mix.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import Executor as Thread
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from prometheus_client import generate_latest

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.cached_objects import CachedObjects
from superpose_adapters.geometry import Analysis
from superpose_adapters.mix import BoundMix
from superpose_adapters.objects import Objects
from superpose_adapters.one_line import one_line
from superpose_adapters.peft.folder import Limits, parse_adapter
from superpose_adapters.shared_objects import SharedObjects
from superpose_adapters.store_error import StoreError
from superpose_server.cluster.answer import Answer, told
from superpose_server.cluster.desired import Desired, MixOfDigests, Order
from superpose_server.cluster.follower import Follower, Overruled
from superpose_server.cluster.known_adapters import KnownAdapters
from superpose_server.config import ServerConfig
from superpose_server.control.default_mix import MixState
from superpose_server.engine.executor import Condition, ServedBase
from superpose_server.engine.job import JobResult
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import RowScore, ScoreRow
from superpose_server.engine.sequence import Chunk
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.errors import AdapterAway, ReplicaUnfit, Unavailable
from superpose_server.inference.delivery import Delivery
from superpose_server.inference.generation import Generation
from superpose_server.loading import read_base
from superpose_server.local import LocalEngine, make_local_engine
from superpose_server.metrics import Metrics
from superpose_server.model.memory import MIB
from superpose_server.model.threads import compute_with, thread_of_one_core
from superpose_server.weights.resident import Findings, PreparedMix

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteRow:
    """A row as it goes to a replica; see `Sequence`."""

    prompt: Sequence[int]
    mix: MixOfDigests
    params: SamplingParams


@dataclass(frozen=True)
class Readiness:
    """What a replica says of a change that it was to prepare.

    Attributes:
        held: The order of what it holds.
        fold_error: Expected of the mix; None: the change comes too late.
    """

    held: Order
    fold_error: float | None = None


@dataclass(frozen=True)
class RemoteVerification:
    """What was found of a replica's weights; see `Verification`.

    Attributes:
        digest: Of the mix in them.
        hash: Of their bits.
        findings: What differs.
    """

    digest: str
    hash: str
    findings: Findings


class Replica:
    """What Ray Serve runs copies of. Its methods are called through a handle."""

    def __init__(self, config: ServerConfig, folder: Path, name: str, node: str) -> None:
        """Load the base and start the engine.

        Args:
            config: Of the server that this is a replica of.
            folder: Where that server keeps adapters, or, if the configuration has a store, where
                copies of those in the store are kept.
            name: What this replica is called.
            node: What the machine is called that it runs on.
        """
        self.name, self._node = name, node
        self._metrics = Metrics()
        self._unfit = ""
        self._objects: Objects | CachedObjects
        if config.store is None:
            self._objects = Objects(folder)
        else:
            self._objects = CachedObjects(Objects(folder), SharedObjects(config.store))
        self._limits = Limits(max_rank=config.max_rank, max_bytes=config.max_adapter_mib * MIB)
        threads = config.threads or torch.get_num_threads()
        # As in `Runtime`: what loads is a thread that ends.
        with ThreadPoolExecutor(1, "load", compute_with, (threads,)) as loader:
            self._local = loader.submit(self._load, config).result()
        self._known = KnownAdapters(self._read)
        empty = MixOfDigests.of(BoundMix(self._local.base.digest))
        self._follower: Follower[PreparedMix] = Follower(empty, self._prepare, self._fold)
        self._changes: Thread = thread_of_one_core("changes")
        compute_with(threads)
        self._delivery: Delivery | None = None

    def _load(self, config: ServerConfig) -> LocalEngine:
        read = read_base(config)
        self._tokenizer = read.tokenizer
        local = make_local_engine(read, self._metrics, EngineObserver())
        local.integrity.follow(self._metrics.intact)
        self._metrics.follow(lambda: local.engine.running, lambda: local.engine.waiting)
        local.engine.start()
        local.guard.start()
        return local

    # On the thread of changes.

    def _read(self, digest: str) -> Adapter:
        """Return an adapter that somebody has stored and checked before.

        Raises:
            AdapterAway: It cannot be had here.
        """
        try:
            config, tensors = self._objects.files(digest)
            base = self._local.base
            adapter = parse_adapter(config, tensors, base.layout, self._limits, base=base.facts)
        except (KeyError, StoreError, AdapterError) as error:
            why = "it is not in the store" if isinstance(error, KeyError) else str(error)
            _log.error("adapter %s cannot be had: %s", digest[:12], why)
            raise AdapterAway(f"adapter {digest[:12]} cannot be had: {why}") from error
        self._local.engine.keep(adapter)
        return adapter

    def _bind(self, mix: MixOfDigests) -> BoundMix:
        return mix.bind(self._known.__getitem__)

    def _prepare(self, mix: MixOfDigests) -> PreparedMix:
        return self._local.engine.prepare(self._bind(mix))

    def _fold(self, prepared: PreparedMix) -> None:
        self._local.engine.fold(prepared).result()

    async def _change(self, act: Callable[[], T]) -> Answer[T]:
        """Do something that changes what is held, after all earlier ones; say what came of it."""
        loop = asyncio.get_running_loop()
        try:
            self._check_fit()
            return Answer(self.name, await loop.run_in_executor(self._changes, act))
        except Exception as error:
            return self._answer_of(error)

    def _answer_of(self, error: Exception) -> Answer[T]:
        if isinstance(error, ReplicaUnfit) and not self._unfit:
            _log.error("unfit: %s", error.why)
            self._unfit = error.why
        return Answer(self.name, error=told(error), unfit=bool(self._unfit))

    def _check_fit(self) -> None:
        """Refuse every call from the first fault on, until Ray Serve has found out.

        Raises:
            ReplicaUnfit: This replica is at fault.
        """
        if self._unfit:
            raise ReplicaUnfit(self._unfit)

    async def _reach(self, desired: Desired) -> None:
        """Hold what is desired, or something later.

        Raises:
            ServerError: It cannot.
        """
        self._check_fit()
        if desired.order > self._follower.held.order:
            answer = await self._change(lambda: self._reach_now(desired))
            answer.get()

    def _reach_now(self, desired: Desired) -> Order:
        try:
            self._follower.reach(desired)
        except Exception as error:
            # Others hold it, so it can be held; and of one order that has two mixes, whoever is
            # right, this one may be wrong.
            why = error.why if isinstance(error, AdapterAway) else one_line(error)
            raise ReplicaUnfit(f"{desired.order} cannot be reached: {why}") from error
        held = self._follower.held
        self._metrics.mix_changed(MixState(held.order.generation, self._bind(held.mix)))
        return held.order

    # Called through a handle.

    async def base(self) -> Answer[ServedBase]:
        """Return what is served here."""
        return Answer(self.name, self._local.base)

    async def term(self) -> Answer[int]:
        """Return the number of the server whose change is held here; 0: none was made."""
        return Answer(self.name, self._follower.held.order.term)

    async def condition(self) -> Answer[Condition]:
        """Return how this replica is now, be it behind or not."""
        engine, held = self._local.engine, self._follower.held
        condition = Condition(
            self.name,
            self._node,
            held.order.generation,
            held.mix.digest,
            engine.running,
            engine.waiting,
            self._metrics.generated_tokens,
            self._local.integrity.intact,
        )
        return Answer(self.name, condition)

    async def keep(self, digest: str) -> Answer[None]:
        """Read an adapter that calls may name from now on."""

        def read() -> None:
            self._known[digest]

        return await self._change(read)

    async def prepare(self, desired: Desired) -> Answer[Readiness]:
        """Make ready for a change, unless it comes too late."""
        return await self._change(lambda: self._prepare_now(desired))

    def _prepare_now(self, desired: Desired) -> Readiness:
        try:
            prepared = self._follower.prepare(desired)
        except Overruled as error:
            return Readiness(error.held)
        return Readiness(self._follower.held.order, prepared.fold_error)

    async def commit(self, desired: Desired) -> Answer[Order]:
        """Make a change, unless a later one was made; returns the order of what is held then."""
        return await self._change(lambda: self._reach_now(desired))

    async def generate(self, desired: Desired, row: RemoteRow) -> AsyncGenerator[Answer[Chunk]]:
        """Run a row; yields its chunks, several steps' in one for who is slow to take them."""
        try:
            await self._reach(desired)
            self._check_room(len(row.prompt) + row.params.limit)
            mix = await self._bound(row.mix)
            if self._delivery is None:
                self._delivery = Delivery(asyncio.get_running_loop())
            inbox = self._delivery.inbox()
            running = Row(row.prompt, mix, row.params, inbox.put, self._tokenizer)
            self._local.engine.submit(running)
            generation = Generation("", MixState(desired.order.generation, mix), running, inbox)
            async with aclosing(aiter(generation)) as chunks:
                async for chunk in chunks:
                    yield Answer(self.name, chunk)
        except Exception as error:
            yield self._answer_of(error)

    async def score(
        self, desired: Desired, rows: Sequence[ScoreRow], mixes: Sequence[MixOfDigests]
    ) -> Answer[JobResult[list[RowScore]]]:
        """Score rows under the mix in the place of each."""

        async def run() -> JobResult[list[RowScore]]:
            await self._reach(desired)
            self._check_room(max((row.length for row in rows), default=0))
            bound = {mix: await self._bound(mix) for mix in {*mixes}}
            job = self._local.engine.score(rows, [bound[mix] for mix in mixes])
            return await asyncio.wrap_future(job)

        return await self._answered(run())

    async def analyze(self, mix: MixOfDigests) -> Answer[Analysis]:
        """Return the geometry of a mix against this base."""
        engine = self._local.engine
        return await self._change(lambda: engine.analyze(self._prepare(mix)))

    async def measure_fold_error(self, mix: MixOfDigests) -> Answer[JobResult[float]]:
        """Measure what folding a mix would lose."""

        async def run() -> JobResult[float]:
            prepared = (await self._change(lambda: self._prepare(mix))).get()
            return await asyncio.wrap_future(self._local.engine.measure_fold_error(prepared))

        return await self._answered(run())

    async def verify(self, desired: Desired) -> Answer[JobResult[RemoteVerification]]:
        """Compare the weights with a fresh fold of what is desired, and more with its hash."""

        async def run() -> JobResult[RemoteVerification]:
            await self._reach(desired)
            done = await asyncio.wrap_future(self._local.engine.verify())
            found = done.value
            remote = RemoteVerification(found.mix.digest, found.resident_hash, found.findings)
            return JobResult(remote, done.longest_stall_seconds, done.seconds)

        return await self._answered(run())

    async def metrics(self) -> Answer[str]:
        """Return this replica's metrics as Prometheus reads them."""
        return Answer(self.name, generate_latest(self._metrics.registry).decode())

    def check_health(self) -> None:
        """Raise if this replica must begin anew; Ray Serve asks now and then."""
        why = self._unfit or self._local.integrity.hopeless
        if why:
            raise RuntimeError(f"replica {self.name} begins anew: {why}")

    def close(self) -> None:
        """End its threads."""
        self._local.guard.stop()
        self._local.engine.stop()
        self._changes.shutdown(wait=True, cancel_futures=True)

    async def _bound(self, mix: MixOfDigests) -> BoundMix:
        """Return a mix of adapters, read where they must be, beside the event loop."""
        found = {entry.digest: self._known.find(entry.digest) for entry in mix.entries}
        adapters = {digest: adapter for digest, adapter in found.items() if adapter is not None}
        if len(adapters) == len(found):
            return mix.bind(adapters.__getitem__)
        return (await self._change(lambda: self._bind(mix))).get()

    def _check_room(self, tokens: int) -> None:
        """Refuse a row that other replicas, which found more memory, have room for.

        Raises:
            Unavailable: It is longer than rows are here.
        """
        if tokens > self._local.base.context_length:
            raise Unavailable(
                f"a row of {tokens} tokens is longer than a replica holds, which has "
                f"{self._local.base.context_length}: start the server with --max-length, so that "
                "all of them hold as much",
                "REPLICA_TOO_SMALL",
            )

    async def _answered(self, call: Coroutine[Any, Any, T]) -> Answer[T]:
        try:
            return Answer(self.name, await call)
        except Exception as error:
            return self._answer_of(error)
