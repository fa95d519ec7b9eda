"""The server's engine in this process, without a socket: to measure what the engine alone does."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from benchmarks.options import Options
from benchmarks.target import Streamed, Weights
from superpose_adapters.mix import BoundMix, Mix
from superpose_server.config import ServerConfig
from superpose_server.control.actions import Operator
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import Chunk
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.errors import ServerError
from superpose_server.runtime import Runtime
from superpose_server.weights.resident import PreparedMix

T = TypeVar("T")

# Far above what any step takes; what is slower has died.
_PATIENCE = 300.0


class Local:
    """A runtime of its own, whose operators act on this thread's event loop.

    Attributes:
        runtime: The runtime.
    """

    def __init__(
        self,
        options: Options,
        base: Path,
        adapter_dir: Path | None,
        *,
        max_batch: int = 16,
        max_length: int | None = None,
    ) -> None:
        """Load base and adapters and start the engine."""
        self._folder = tempfile.TemporaryDirectory(prefix="superpose-bench-")
        # No asyncio.Runner: for a signal handler it formats the result of each run, tensors too.
        self._loop = asyncio.new_event_loop()
        self.runtime = Runtime(
            ServerConfig(
                base=str(base),
                adapter_dir=adapter_dir,
                state_dir=Path(self._folder.name),
                max_batch=max_batch,
                max_length=max_length,
                **options.server_fields(),
            )
        )

    def bind(self, weights: Weights) -> BoundMix:
        """Resolve the names of a mix."""
        return self.runtime.registry.bind(Mix.of(weights))

    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Prepare a fold on the operator's thread."""
        return self.operate(lambda operator: operator.prepare(mix))

    def operate(self, action: Callable[[Operator], T]) -> T:
        """Run an operator's action to its end."""
        return self.run(self.runtime.operate(action))

    def fold(self, prepared: PreparedMix) -> BoundMix:
        """Fold between two steps; return what is resident when the next step can run."""
        resident = self.runtime.local.fold(prepared).result(_PATIENCE)
        synchronise(self.runtime.local.runner.model.device)
        return resident

    def start(self, request: Streamed, mix: BoundMix, done: Callable[[], object]) -> Row:
        """Submit a request; `done` is called on the engine thread when it has ended."""

        def sink(chunk: Chunk) -> None:
            request.add(chunk.token_ids)
            if chunk.last:
                request.end("OK" if chunk.error is None else type(chunk.error).__name__)
                done()

        sampling: dict[str, Any] = {**request.sampling}
        params = SamplingParams(max_new_tokens=request.length, ignore_eos=True, **sampling)
        row = Row(list(request.prompt), mix, params, sink, self.runtime.tokenizer)
        self.runtime.engine.submit(row)
        return row

    def generate(
        self, prompts: Sequence[Sequence[int]], mixes: Sequence[BoundMix], length: int
    ) -> list[Streamed]:
        """Continue prompts that run together, each under its mix; return their requests."""
        ended = threading.Semaphore(0)
        requests = [Streamed(prompt, None, length) for prompt in prompts]
        for request, mix in zip(requests, mixes, strict=True):
            self.start(request, mix, ended.release)
        _await(ended, len(requests))
        failed = [request.status for request in requests if request.status != "OK"]
        if failed:
            raise RuntimeError(f"requests failed: {failed}")
        return requests

    def step_seconds(
        self,
        prompts: Sequence[Sequence[int]],
        mixes: Sequence[BoundMix],
        *,
        steps: int,
        warm_up: int = 3,
    ) -> float:
        """Return the mean time of `steps` decode steps with all these rows in the batch.

        Measured on the row that has its first token last, so that no prefill is in it.
        """
        context = self.runtime.base.context_length
        enough = threading.Semaphore(0)
        ended = threading.Semaphore(0)
        requests: list[Streamed] = []
        rows = []
        for prompt, mix in zip(prompts, mixes, strict=True):
            length = context - len(prompt)
            request = _Watched(prompt, length, warm_up + steps + 1, enough.release)
            requests.append(request)
            rows.append(self.start(request, mix, ended.release))
        _await(enough, len(rows))
        for row in rows:
            row.cancelled = True
        _await(ended, len(rows))
        last = max(requests, key=lambda request: request.arrivals[0][0])
        times = [at for at, count in last.arrivals for _ in range(count)]
        return (times[warm_up + steps] - times[warm_up]) / steps

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on this runtime's event loop."""
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        """End the engine."""
        self.runtime.close()
        self._loop.close()
        self._folder.cleanup()

    def __enter__(self) -> Local:
        """Return this."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the engine."""
        self.close()


class _Watched(Streamed):
    """A request that tells when it has `enough` tokens."""

    def __init__(
        self, prompt: Sequence[int], length: int, enough: int, tell: Callable[[], object]
    ) -> None:
        super().__init__(prompt, None, length)
        self._enough = enough
        self._tell = tell

    def add(self, tokens: Sequence[int]) -> None:
        had = len(self.tokens)
        super().add(tokens)
        if had < self._enough <= len(self.tokens):
            self._tell()


def _await(semaphore: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        if not semaphore.acquire(timeout=_PATIENCE):
            raise TimeoutError("the engine did not answer")


class LocalTarget:
    """The engine of a `Local` as something that can be put under load; for one event loop."""

    def __init__(self, local: Local) -> None:
        """Load `local`."""
        self._local = local

    async def stream(self, request: Streamed) -> None:
        """Run a request; its times are taken on the engine's thread."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        runtime = self._local.runtime
        mix = runtime.default_mix.state.mix
        if request.mix is not None:
            mix = self._local.bind(request.mix)
        request.used = {entry.domain: entry.weight for entry in mix.entries}

        def done() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        row = self._local.start(request, mix, done)
        try:
            await ended.wait()
        finally:
            row.cancelled = True

    async def change(self, mix: Weights) -> str:
        """Change the default mix."""
        wanted = Mix.of(mix)
        try:
            await self._local.runtime.operate(lambda operator: operator.set(wanted, None))
        except ServerError as error:
            return type(error).__name__
        return "OK"

    async def generation(self) -> int:
        """Return the generation of the default mix."""
        return self._local.runtime.default_mix.state.generation


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return how long an action takes, with all that it started on the device."""
    synchronise(device)
    began = time.perf_counter()
    action()
    synchronise(device)
    return time.perf_counter() - began
