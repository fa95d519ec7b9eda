"""Everything that serves, put together from a configuration; knows neither grpc nor the wire."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from prometheus_client import CollectorRegistry

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.bundled import BUNDLES, resolve_base
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.mix_syntax import RESERVED_NAMES
from superpose_adapters.one_line import one_line
from superpose_adapters.peft.folder import Limits as AdapterLimits
from superpose_adapters.peft.folder import parse_adapter, read_files
from superpose_adapters.store import AdapterStore
from superpose_adapters.store_error import StoreError
from superpose_adapters.text_encoder import TextEncoder
from superpose_server.config import ServerConfig
from superpose_server.control.actions import Operator
from superpose_server.control.audit import Audit
from superpose_server.control.checked_file import FileDamaged
from superpose_server.control.default_mix import DefaultMix, MixState
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.following import Following
from superpose_server.control.guard import Guard
from superpose_server.control.integrity import Integrity
from superpose_server.control.journal import Journal, JournalEntry
from superpose_server.control.merger import Merger
from superpose_server.control.mix_file import MixFile
from superpose_server.control.named_mixes import NamedMixes
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.engine.engine import Engine
from superpose_server.engine.executor import Condition, Executor, ServedBase
from superpose_server.engine.job import JobResult
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.scheduler import RETRY_AFTER_SECONDS
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.errors import (
    QueueFull,
    ShuttingDown,
    StartupError,
)
from superpose_server.loading import read_base, shared_store, startup_error
from superpose_server.local import make_local_engine
from superpose_server.metrics import Metrics
from superpose_server.model.memory import MIB
from superpose_server.model.threads import compute_with, thread_of_one_core
from superpose_server.state_folder import state_folder
from superpose_server.weights.resident import Verification

T = TypeVar("T")
# Characters of a line that says why a folder is left out.
_LONGEST = 1000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Caps that are not set by flags."""

    max_domains_in_mix: int = 64
    max_score_items: int = 256
    max_score_rows: int = 2048


class Remote(Executor, Protocol):
    """An executor whose engines are those of other processes, its replicas.

    Attributes:
        integrity: Tells of what ends this server; replicas look after their own weights.
    """

    integrity: Integrity

    def base(self, folder: Path) -> ServedBase:
        """Return what is served, its checkpoint being in `folder` here."""

    async def conditions(self) -> list[Condition]:
        """Return how every replica is that answers, in the order of their names."""

    def scraped(self, own: CollectorRegistry) -> CollectorRegistry:
        """Return what is scraped: of `own` what replicas do not count, and their metrics."""


class Runtime:
    """The parts of one running server.

    Building it takes as long as loading does, on whatever thread; `close` ends every thread of it.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        limits: Limits | None = None,
        observer: EngineObserver | None = None,
        fleet: Remote | None = None,
    ) -> None:
        """Load base and adapters, restore the default mix, and start the engine.

        Args:
            config: What the command line says.
            limits: Caps.
            observer: Receives the engine's events too, after the metrics.
            fleet: Replicas that run the rows; None: this process does.

        Raises:
            StartupError: Anything that keeps the server from starting.
        """
        self.config = config
        self.limits = limits or Limits()
        self.adapter_limits = AdapterLimits(
            max_rank=config.max_rank, max_bytes=config.max_adapter_mib * MIB
        )
        self.metrics = Metrics()
        self._guard: Guard | None = None  # Replicas have guards of their own.
        self.engine: Executor
        self._fleet = fleet
        self.started = time.monotonic()
        self.grpc_address = ""  # Set once that door is open, for who came by another.
        self.ending = asyncio.Event()
        self._actions: set[asyncio.Future[Any]] = set()
        self._left_out: dict[str, str] = {}  # Folders of --adapter-dir, and why.
        # Torch keeps workers for every thread that computes, and with more workers than cores they
        # go to sleep between products (OpenMP's rule): 4 ms a step of GPT-2 Small on 2 cores. So
        # what loads is a thread that ends, its workers too, and the operator has none.
        threads = config.threads or torch.get_num_threads()
        with ThreadPoolExecutor(1, "load", compute_with, (threads,)) as loader:
            loader.submit(self._load, observer or EngineObserver()).result()
        following = self.following
        if following is not None:
            try:
                following.start()
            except BaseException:
                self.close()
                raise
            self.metrics.following(lambda: following.state.reached)

    def _load(self, observer: EngineObserver) -> None:
        try:
            self._shared = shared_store(self.config.store)
            if self._fleet is None:
                self._load_here(observer)
            else:
                self._load_from(self._fleet)
        except Exception as error:
            raise startup_error(self.config, error) from error

    def _load_here(self, observer: EngineObserver) -> None:
        """Serve by an engine of this process."""
        read = read_base(self.config)
        self.tokenizer, self.texts = read.tokenizer, read.texts
        # Before what takes minutes: another server may hold it.
        with self._state(read.digest) as state_dir:
            local = make_local_engine(read, self.metrics, observer)
            self.base, self.engine, self.integrity = local.base, local.engine, local.integrity
            self.integrity.follow(self.metrics.intact)
            self._start(state_dir)
            local.engine.start()
            self._guard = local.guard
            self._guard.start()
            _log.info(
                "loaded base=%s digest=%s dtype=%s device=%s cache_mib=%.1f base_copy_mib=%.1f "
                "slots=%d context=%d adapters=%d generation=%d",
                self.config.base,
                self.base.digest[:12],
                self.base.dtype,
                self.base.device,
                local.cache_nbytes / MIB,
                local.weights.base_nbytes / MIB,
                self.base.max_batch,
                self.base.context_length,
                len(self.registry),
                self.default_mix.state.generation,
            )

    def _load_from(self, fleet: Remote) -> None:
        """Serve by the engines of replicas, whose base is read here for its texts alone."""
        folder = resolve_base(self.config.base)
        self.tokenizer = Tokenizer(folder)
        self.base, self.engine = fleet.base(folder), fleet
        self.texts = TextEncoder(
            self.tokenizer.inner, self.base.vocabulary, logits=self.base.logits
        )
        with self._state(self.base.digest) as state_dir:
            self.integrity = fleet.integrity
            self._start(state_dir)

    @contextmanager
    def _state(self, base_digest: str) -> Generator[Path]:
        """Hold the state folder of this base, for good unless what is done in it fails."""
        folder = state_folder(self.config, base_digest)
        self._store = AdapterStore(folder / "adapters", self._shared)
        try:
            yield folder
        except BaseException:
            self._store.close()
            raise

    def _start(self, state_dir: Path) -> None:
        """Serve the adapters and the default mix that were served when the last server stopped."""
        try:
            named_mixes = NamedMixes(state_dir)
        except FileDamaged as error:
            raise StartupError(str(error)) from error
        self.registry = Registry(self.base.digest, self.limits.max_domains_in_mix, named_mixes)
        self._register_all()
        for registered in self.registry.all():
            self.engine.keep(registered.adapter)
        journal = Journal(state_dir)
        state = self._restore(journal)
        self.engine.begin(state.mix, state.generation)
        self.default_mix = DefaultMix(journal, self.engine, state)
        self.audit = Audit(state_dir)
        followed = None if self.config.follow is None else FollowedFile(self.config.follow)
        self.following: Following | None = None
        if followed is not None:
            self.following = Following(followed, self.config.follow_every, self._reach)
        self._operator = Operator(
            self.registry,
            self.default_mix,
            self._store,
            self.engine,
            self.base,
            self.adapter_limits,
            self.audit,
            "" if followed is None else followed.short_name,
        )
        self._operator.collect()
        threads = torch.get_num_threads()
        self._operator_thread = thread_of_one_core("operator")
        self.merger = Merger(
            thread_of_one_core("merger", yields=True),
            self.base.layout,
            self.base.facts,
            self.adapter_limits,
            self.config.max_queue,
        )
        compute_with(threads)  # The last number that is set is the one for threads to come.
        self.metrics.follow(lambda: self.engine.running, lambda: self.engine.waiting)
        self.metrics.mix_changed(state)
        self.metrics.resident(self.engine.resident)
        self.default_mix.watch(self.metrics.mix_changed)

    def _register_all(self) -> None:
        bundle = BUNDLES.get(self.config.base)
        if bundle is not None:
            for domain, folder in bundle.adapters().items():
                self._register(domain, self._read(folder, folder.parent), Source.BUNDLED)
        root = self.config.adapter_dir
        if root is not None:
            self._register_folders(root)
        for domain, digest in self._store.names.items():
            adapter = self._pushed(domain, digest)
            # Its files may be those of another name, whose adapter has the same effect.
            said = self._store.named(domain)
            adapter = replace(adapter, warnings=said.warnings, provenance=said.provenance)
            self._register(domain, adapter, Source.PUSHED)

    def _register_folders(self, root: Path) -> None:
        """Register the adapters in a folder, where things lie that are none, such as `runs`."""
        for folder in sorted(root.iterdir()):
            if folder.is_file() or folder.name.startswith("."):
                continue
            try:
                adapter = self._read(folder, root)
            except StartupError as error:
                if self.config.strict:
                    raise StartupError(f"{error}; without --strict it is left out") from error
                self._left_out[folder.name] = str(error)
                _log.warning("left out: %s", one_line(error, _LONGEST))
            else:
                self._register(folder.name, adapter, Source.DIRECTORY)

    def _pushed(self, domain: str, digest: str) -> Adapter:
        try:
            return self._store.load(
                digest, self.base.layout, self.adapter_limits, base=self.base.facts
            )
        except AdapterError as error:
            raise StartupError(
                f"pushed adapter {domain}: {error}; or use another --state-dir"
            ) from error

    def _read(self, folder: Path, root: Path) -> Adapter:
        limits, base = self.adapter_limits, self.base
        try:
            files = read_files(folder, limits, root)
            adapter = parse_adapter(
                files.config,
                files.tensors,
                base.layout,
                limits,
                base=base.facts,
                training=files.training,
            )
        except AdapterError as error:
            raise StartupError(f"adapter {folder}: {error}") from error
        if self._fleet is not None:  # Replicas have no such folder, and read what is stored.
            try:
                self._store.put(files.config, files.tensors)
            except StoreError as error:
                try:
                    self._store.files(adapter.digest)  # A whole copy will do.
                except KeyError:
                    raise error from None
                _log.warning("replicas read %s from copies alone: %s", folder, error)
        return adapter

    def _register(self, domain: str, adapter: Adapter, source: Source) -> None:
        if self.registry.named_mixes.find(domain) is not None:
            remedy = "use another --state-dir"
            if source is Source.DIRECTORY:
                remedy = (
                    f"rename the folder {domain} in --adapter-dir {self.config.adapter_dir}, "
                    f"or start without it and run adapterctl unname {domain}"
                )
            raise StartupError(f"{domain} is both a domain and a named mix: {remedy}")
        before = self.registry.find(domain)
        if before is not None:
            # Which of them is meant nobody but the operator knows.
            sources = (before.source, source)
            if Source.DIRECTORY in sources:
                remedy = f"rename the folder {domain} in --adapter-dir {self.config.adapter_dir}"
                if Source.PUSHED in sources:
                    remedy += f", or start without it and run adapterctl delete {domain}"
            else:
                remedy = "use another --state-dir"
            raise StartupError(
                f"domain {domain} is both {before.source.value} and {source.value}: {remedy}"
            )
        registered = Registered(domain, adapter, source)
        self.registry.put(registered)
        registered.log_warnings()

    def _restore(self, journal: Journal) -> MixState:
        """Return the default mix as it was when the last server stopped."""
        try:
            record = journal.read()
        except FileDamaged as error:
            raise StartupError(str(error)) from error
        base_digest = self.base.digest
        if record is None:
            return MixState(0, BoundMix(base_digest))
        if record.base_digest != base_digest:
            raise StartupError(
                f"journal {journal.path} belongs to another base ({record.base_digest[:12]}, this "
                f"one is {base_digest[:12]}): use another --state-dir"
            )
        mix = BoundMix.of(
            base_digest,
            (
                BoundEntry(entry.domain, self._recall(entry, journal), entry.weight)
                for entry in record.entries
            ),
        )
        if mix.digest != record.mix_digest:
            raise StartupError(
                f"journal {journal.path} is damaged: its digest does not match its entries; "
                "restore it from a backup, or delete it to start from the base model"
            )
        return MixState(record.generation, mix)

    def _recall(self, entry: JournalEntry, journal: Journal) -> Adapter:
        reserved = RESERVED_NAMES.get(entry.domain)
        if reserved is not None:  # A server that had no such words may have taken it.
            raise StartupError(
                f"the default mix holds {entry.domain}, which is reserved for {reserved}: "
                f"delete {journal.path} to start from the base model"
            )
        registered = self.registry.find(entry.domain)
        if registered is not None and registered.adapter.digest == entry.adapter_digest:
            return registered.adapter
        if entry.adapter_digest in self._store:
            adapter = self._pushed(entry.domain, entry.adapter_digest)
            if registered is not None and registered.source is Source.PUSHED:
                # Name and mix change one after the other, so that a kill may come between.
                _log.warning("%s was being replaced and is what it was before", entry.domain)
                self._store.set_name(
                    entry.domain, adapter.digest, adapter.warnings, adapter.provenance
                )
                self.registry.put(replace(registered, adapter=adapter))
            return adapter
        if registered is not None:
            found = f"now has digest {registered.adapter.digest[:12]}"
        elif entry.domain in self._left_out:
            found = f"cannot be served ({self._left_out[entry.domain]})"
        else:
            found = "is gone"
        raise StartupError(
            f"the default mix holds {entry.domain} (adapter {entry.adapter_digest[:12]}), which "
            f"{found}: put that adapter back, or delete {journal.path} to start from the base model"
        )

    @property
    def scraped(self) -> CollectorRegistry:
        """What Prometheus reads; any thread but the event loop's may collect it."""
        own = self.metrics.registry
        return own if self._fleet is None else self._fleet.scraped(own)

    async def replicas(self) -> list[Condition]:
        """Return how every replica is that answers; none, if this process runs the rows."""
        return [] if self._fleet is None else await self._fleet.conditions()

    @property
    def local(self) -> Engine:
        """The engine of this process, for those who look into it.

        Raises:
            TypeError: Rows run in replicas.
        """
        if not isinstance(self.engine, Engine):
            raise TypeError("rows run in replicas")
        return self.engine

    @property
    def guard(self) -> Guard:
        """The guard of this process's engine.

        Raises:
            TypeError: Rows run in replicas.
        """
        if self._guard is None:
            raise TypeError("rows run in replicas")
        return self._guard

    async def operate(self, action: Callable[[Operator], T]) -> T:
        """Run an operator's action after all earlier ones, to its end even if nobody waits.

        Raises:
            ShuttingDown: The server is stopping.
            QueueFull: Too many actions wait.
        """
        if self.ending.is_set():
            raise ShuttingDown
        if len(self._actions) > self.config.max_queue:
            raise QueueFull(len(self._actions), RETRY_AFTER_SECONDS)
        loop = asyncio.get_running_loop()
        # In the call's own context, which knows whose it is.
        act = copy_context().run
        running = loop.run_in_executor(self._operator_thread, act, action, self._operator)
        self._actions.add(running)
        running.add_done_callback(self._forget_action)
        return await asyncio.shield(running)

    def _reach(self, wanted: MixFile) -> MixState:
        """Do what `operate` does, for a thread of our own that follows a file."""
        act = copy_context().run
        return self._operator_thread.submit(act, self._operator.reach, wanted).result()

    def _forget_action(self, done: asyncio.Future[Any]) -> None:
        self._actions.discard(done)
        if not done.cancelled():
            done.exception()  # Whoever asked for it may be gone, and nobody else has to read it.

    async def verify(self) -> JobResult[Verification]:
        """Verify the weights, to the end even if nobody waits for it."""
        return await asyncio.shield(asyncio.wrap_future(self.engine.verify()))

    async def finish(self, grace: float) -> None:
        """Refuse what is new, and merges; let actions and rows end within `grace` seconds."""
        self.ending.set()
        self.merger.end()
        if self.following is not None:
            self.following.stop()
        if self._guard is not None:
            await asyncio.to_thread(self._guard.stop)
        deadline = time.monotonic() + grace
        if self._actions:
            await asyncio.wait(set(self._actions), timeout=grace)
        left = max(0.0, deadline - time.monotonic())
        await asyncio.to_thread(self.engine.drain, left)

    def close(self) -> None:
        """End the threads and let another server have the state folder."""
        if self._guard is not None:
            self._guard.stop()
        if self.following is not None:
            self.following.stop()
        # First the engine, for which an action may be waiting.
        self.engine.stop()
        self._store.give_up()
        self._operator_thread.shutdown(wait=True, cancel_futures=True)
        if self.following is not None:
            self.following.close()
        self._store.close()
        # Last, since it waits for the module that is being merged, and nothing waits for that.
        self.merger.close()
