"""Everything that serves, put together from a configuration; knows neither grpc nor the wire."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.bundled import mini_adapters, resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.fast_bfloat16 import has_fast_bfloat16
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.peft.folder import CONFIG_NAME, DEFAULT_LIMITS, read_adapter
from superpose_adapters.peft.folder import Limits as AdapterLimits
from superpose_adapters.store import AdapterStore, StoreError
from superpose_server.config import PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU, ServerConfig
from superpose_server.control.actions import Operator
from superpose_server.control.default_mix import DefaultMix, MixState
from superpose_server.control.integrity import Integrity
from superpose_server.control.journal import Journal, JournalDamaged, JournalEntry
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.engine.engine import Engine
from superpose_server.engine.job import JobResult
from superpose_server.engine.observer import EngineObserver, Observers
from superpose_server.engine.residency import Residency
from superpose_server.engine.scheduler import RETRY_AFTER_SECONDS, Scheduler
from superpose_server.engine.tokenizer import Tokenizer, TokenizerError
from superpose_server.engine.trusted import Kind
from superpose_server.engine.twin_check import check_meaning
from superpose_server.engine.weights_check import Expected, check_weights, expect
from superpose_server.errors import (
    QueueFull,
    SelfCheckError,
    ServerError,
    ShuttingDown,
    StartupError,
)
from superpose_server.metrics import Metrics
from superpose_server.model.capacity import positions_of
from superpose_server.model.checkpoint import load_checkpoint
from superpose_server.model.checkpoint_folder import CheckpointError
from superpose_server.model.memory import MIB, is_out_of_memory
from superpose_server.model.model import Model
from superpose_server.model.threads import compute_with
from superpose_server.weights.resident import ResidentWeights, Verification

T = TypeVar("T")
_log = logging.getLogger(__name__)
# Characters of a line that says why a server cannot start, as far as it is not ours alone.
_LONGEST = 2000


@dataclass(frozen=True)
class Limits:
    """Caps that are not set by flags."""

    adapter: AdapterLimits = DEFAULT_LIMITS
    max_domains_in_mix: int = 64
    max_score_items: int = 256


class Runtime:
    """The parts of one running server.

    Build it on the event loop's thread before the loop serves; `close` ends every thread of it.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        limits: Limits | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        """Load base and adapters, restore the default mix, and start the engine.

        Args:
            config: What the command line says.
            limits: Caps.
            observer: Receives the engine's events too, after the metrics.

        Raises:
            StartupError: Anything that keeps the server from starting.
        """
        self.config = config
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.started = time.monotonic()
        self.ending = asyncio.Event()
        self._actions: set[asyncio.Future[Any]] = set()
        # Torch keeps workers for every thread that computes, and with more workers than cores they
        # go to sleep between products (OpenMP's rule): 4 ms a step of GPT-2 Small on 2 cores. So
        # what loads is a thread that ends, its workers too, and the operator has none.
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(1, "load", compute_with, (threads,)) as loader:
            loader.submit(self._load, observer or EngineObserver()).result()

    def _load(self, observer: EngineObserver) -> None:
        try:
            state_dir, expected = self._load_base()
        except Exception as error:
            raise self._cannot_start(error) from error
        try:
            self._start(state_dir, observer, expected)
        except BaseException as error:
            self._store.close()
            if isinstance(error, Exception):
                raise self._cannot_start(error) from error
            raise

    def _load_base(self) -> tuple[Path, Expected | None]:
        """Load the base and open its state, what is quickly refused first."""
        config = self.config
        folder = resolve_base(config.base)
        device = _device(config.device)
        self._check_adapter_dir()
        module = load_checkpoint(folder, _dtype(config.dtype, device))
        self.tokenizer = Tokenizer(folder)
        self._check_length(module)
        module = module.to(device)
        base_digest = checkpoint_digest(folder)
        state_dir = config.state_dir or _default_state_dir(base_digest)
        self._store = _open_store(state_dir)
        try:
            kernels = config.compile == "auto"
            expected = None
            if config.self_check:
                _check_meaning(type(module), module.config, device, kernels)
                expected = expect(module, config.max_length)
            self.model = Model(
                module,
                base_digest=base_digest,
                device=device,
                max_batch=config.max_batch,
                max_length=config.max_length,
                cache_bytes=None if config.cache_mib is None else config.cache_mib * MIB,
                kernels=kernels,
            )
        except BaseException:
            self._store.close()
            raise
        return state_dir, expected

    def _check_adapter_dir(self) -> None:
        root = self.config.adapter_dir
        if root is None:
            return
        if not root.is_dir():
            raise StartupError(f"--adapter-dir {root} is no folder: create it or leave it out")
        if (root / CONFIG_NAME).exists():
            raise StartupError(
                f"--adapter-dir {root} is an adapter itself: name the folder that holds it"
            )

    def _check_length(self, module: Any) -> None:
        positions = positions_of(module.config.get_text_config(decoder=True))
        length = self.config.max_length
        if length is not None and positions is not None and length > positions:
            raise StartupError(
                f"--max-length is {length}: base {self.config.base} takes 2 to {positions}"
            )

    def _cannot_start(self, error: Exception) -> StartupError:
        """Return the one line that a start ends with, whatever it was that failed."""
        config = self.config
        line = _one_line(error)
        if isinstance(error, SelfCheckError):
            return StartupError(
                f"base {config.base} is refused: {line}; --no-self-check serves it all the same"
            )
        if isinstance(error, StartupError):
            return error
        if is_out_of_memory(error):
            length = "" if config.max_length is None else f" and --max-length {config.max_length}"
            return StartupError(
                f"base {config.base} does not fit the memory of --device {config.device} with "
                f"--max-batch {config.max_batch}{length}: {line}"
            )
        if isinstance(error, TokenizerError):
            return StartupError(f"base {config.base} {line}")
        # What says all by itself; other libraries raise OSError and ValueError, too.
        if isinstance(error, CheckpointError | StoreError | ServerError) or line.startswith(
            "base "
        ):
            return StartupError(line)
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return StartupError(f"base {config.base} cannot be served: {kind}{line}")

    def _start(self, state_dir: Path, observer: EngineObserver, expected: Expected | None) -> None:
        model = self.model
        self.registry = Registry(model.base_digest, self.limits.max_domains_in_mix)
        self._register_all()
        self._weights = ResidentWeights(
            model.module,
            model.layout,
            model.base_digest,
            torch.device("cpu") if self.config.base_copy == "host" else None,
        )
        self.integrity = Integrity(self._weights)
        self.integrity.follow(self.metrics.verified)
        for registered in self.registry.all():
            self._weights.keep_base(registered.adapter)
        journal = Journal(state_dir)
        state = self._restore(journal)
        scheduler = Scheduler(model.max_batch, self.config.max_queue, model.switch)
        self.engine = Engine(
            model,
            self._weights,
            scheduler,
            Observers(self.metrics, self.integrity, observer),
            prefill_tokens=self.config.prefill_tokens
            or (PREFILL_TOKENS_GPU if model.device.type == "cuda" else PREFILL_TOKENS_CPU),
            residency=Residency() if self.config.residency == "auto" else None,
        )
        if expected is not None:
            check_weights(self.engine.runner, expected)
        self._weights.fold(self._weights.prepare(state.mix))
        self.default_mix = DefaultMix(journal, self._weights, self.engine, state)
        self._operator = Operator(
            self.registry, self.default_mix, self._store, self._weights, self.limits.adapter
        )
        threads = torch.get_num_threads()
        self._operator_thread = ThreadPoolExecutor(1, "operator", compute_with, (1,))
        self._operator_thread.submit(torch.get_num_threads).result()
        compute_with(threads)  # The last number that is set is the one for threads to come.
        self.metrics.follow(lambda: self.engine.running, lambda: self.engine.waiting)
        self.metrics.mix_changed(state)
        self.metrics.resident(self.engine.resident)
        self.default_mix.watch(self.metrics.mix_changed)
        self.engine.start()
        _log.info(
            "loaded base=%s digest=%s dtype=%s device=%s cache_mib=%.1f base_copy_mib=%.1f "
            "slots=%d context=%d "
            "adapters=%d generation=%d",
            self.config.base,
            model.base_digest[:12],
            model.dtype,
            model.device,
            model.cache.nbytes / MIB,
            self._weights.base_nbytes / MIB,
            model.max_batch,
            model.context_length,
            len(self.registry),
            state.generation,
        )

    def _register_all(self) -> None:
        if self.config.base == "mini":
            for domain, folder in mini_adapters().items():
                self._register(domain, self._read(folder), Source.BUNDLED)
        root = self.config.adapter_dir
        if root is not None:
            for folder in sorted(root.iterdir()):
                if folder.is_dir() and not folder.name.startswith("."):
                    self._register(folder.name, self._read(folder, root), Source.DIRECTORY)
        for domain, digest in self._store.names.items():
            try:
                adapter = self._store.load(digest, self.model.layout, self.limits.adapter)
            except AdapterError as error:
                raise StartupError(
                    f"pushed adapter {domain}: {error}; use another --state-dir for this base"
                ) from error
            self._register(domain, adapter, Source.PUSHED)

    def _read(self, folder: Path, root: Path | None = None) -> Adapter:
        try:
            return read_adapter(folder, self.model.layout, self.limits.adapter, root=root)
        except AdapterError as error:
            raise StartupError(f"adapter {folder}: {error}") from error

    def _register(self, domain: str, adapter: Adapter, source: Source) -> None:
        before = self.registry.find(domain)
        if before is not None:
            raise StartupError(
                f"domain {domain} is both {before.source.value} and {source.value}: "
                "rename or remove one of them"
            )
        self.registry.put(Registered(domain, adapter, source))

    def _restore(self, journal: Journal) -> MixState:
        """Return the default mix as it was when the last server stopped."""
        try:
            record = journal.read()
        except JournalDamaged as error:
            raise StartupError(str(error)) from error
        base_digest = self.model.base_digest
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
        registered = self.registry.find(entry.domain)
        if registered is not None and registered.adapter.digest == entry.adapter_digest:
            return registered.adapter
        if entry.adapter_digest in self._store:
            return self._store.load(entry.adapter_digest, self.model.layout, self.limits.adapter)
        found = (
            "is gone" if registered is None else f"now has digest {registered.adapter.digest[:12]}"
        )
        raise StartupError(
            f"the default mix holds {entry.domain} (adapter {entry.adapter_digest[:12]}), which "
            f"{found}: put that adapter back, or delete {journal.path} to start from the base model"
        )

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
        running = loop.run_in_executor(self._operator_thread, action, self._operator)
        self._actions.add(running)
        running.add_done_callback(self._forget_action)
        return await asyncio.shield(running)

    def _forget_action(self, done: asyncio.Future[Any]) -> None:
        self._actions.discard(done)
        if not done.cancelled():
            done.exception()  # Whoever asked for it may be gone, and nobody else has to read it.

    async def verify(self) -> JobResult[Verification]:
        """Verify the weights and remember the outcome, even if nobody waits for it."""
        job = self.engine.verify()

        def note(done: Future[JobResult[Verification]]) -> None:
            if not done.cancelled() and done.exception() is None:
                self.integrity.note(done.result().value.ok)

        # On the engine thread, so that findings are noted in the order in which they were made.
        job.add_done_callback(note)
        return await asyncio.shield(asyncio.wrap_future(job))

    async def finish(self, grace: float) -> None:
        """Refuse what is new; let actions and rows end within `grace` seconds."""
        self.ending.set()
        deadline = time.monotonic() + grace
        if self._actions:
            await asyncio.wait(set(self._actions), timeout=grace)
        left = max(0.0, deadline - time.monotonic())
        await asyncio.to_thread(self.engine.drain, left)

    def close(self) -> None:
        """End the threads and let another server have the state folder."""
        # First the engine, for which an action may be waiting.
        self.engine.stop()
        self._operator_thread.shutdown(wait=True, cancel_futures=True)
        self._store.close()


def _check_meaning(
    model_class: type[nn.Module], model_config: Any, device: torch.device, kernels: bool
) -> None:
    """Check a base's kind, once on this machine."""
    kind = Kind(model_class, model_config, device, kernels=kernels)
    if not kind.trusted:
        started = time.monotonic()
        check_meaning(model_class, model_config, device, kernels=kernels)
        kind.trust()
        _log.info("checked the base's meaning seconds=%.2f", time.monotonic() - started)


def _open_store(state_dir: Path) -> AdapterStore:
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        return AdapterStore(state_dir / "adapters")
    except OSError as error:
        raise StartupError(
            f"--state-dir {state_dir} cannot be used ({error.strerror or _one_line(error)}): name "
            "a folder that can be written"
        ) from error


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"--device {name} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"--device {name}: no GPU that torch can use; use cpu")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device.type) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _default_state_dir(base_digest: str) -> Path:
    """Return a folder of this base's own, since adapters and mixes of another do not fit it."""
    home = os.environ.get("XDG_STATE_HOME")
    root = Path(home) if home else Path.home() / ".local" / "state"
    return root / "superpose" / base_digest[:16]
