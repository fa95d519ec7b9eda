"""A real server in the test's process, and one in a process of its own.

In-process servers share one event loop on a thread of its own, so that a test can reach the parts
behind the socket: `runtime`, and a `Recorder` that sees every step of the engine and can hold it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import grpc
import torch
from safetensors.torch import load_file
from torch import nn

from superpose_adapters.digest import hash_bytes
from superpose_adapters.mix import BoundMix
from superpose_client import Client
from superpose_server.config import ServerConfig
from superpose_server.door.server import Server
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.runtime import Limits, Runtime
from superpose_server.weights.resident import PreparedMix, ResidentWeights

T = TypeVar("T")

# TEST_DEVICE=cuda runs these tests on a GPU, with captured decode steps.
DEVICE = os.environ.get("TEST_DEVICE", "cpu")
# No test should come near; on a machine that is this slow it fails with words.
PATIENCE = 60.0


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(frozen=True)
class Step:
    """A decode step: who ran, and how many of them were corrected."""

    rows: tuple[Sequence, ...]
    corrected: int


@dataclass(frozen=True)
class Fold:
    """The end of a fold, and what is resident after it."""

    ok: bool
    resident: BoundMix


@dataclass(frozen=True)
class End:
    """The end of a row: a finish reason or an error."""

    row: Sequence
    reason: FinishReason | Exception


Event = Step | Fold | End


class Recorder(EngineObserver):
    """Keeps the engine's events in their order.

    Attributes:
        gate: Called on the engine thread in every step; while it waits, the engine is held.
        submitted: The rows that the engine was given.
        folds_asked: Released once for each fold that the engine was asked for.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gate: Callable[[Step], None] = lambda step: None
        self.submitted: SimpleQueue[Sequence] = SimpleQueue()
        self.folds_asked = threading.Semaphore(0)
        self._changed = threading.Condition()

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    @property
    def folds(self) -> list[Fold]:
        return [event for event in self.events if isinstance(event, Fold)]

    @property
    def ends(self) -> list[End]:
        return [event for event in self.events if isinstance(event, End)]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the events make `condition` true."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), "the engine did not get there"

    def forget(self) -> None:
        """Begin anew, as if nothing had happened yet."""
        with self._changed:
            self.events.clear()
        self.submitted = SimpleQueue()
        while self.folds_asked.acquire(blocking=False):
            pass

    def _record(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def stepped(self, rows: tuple[Sequence, ...], waiting: int, corrected: int) -> None:
        step = Step(rows, corrected)
        self._record(step)
        self.gate(step)

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        self._record(End(sequence, reason))

    def failed(self, sequence: Sequence, error: Exception) -> None:
        self._record(End(sequence, error))

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        self._record(Fold(succeeded, resident))


@dataclass(frozen=True)
class Fingerprint:
    """What a refused request must leave as it was: the default mix, Score bits, greedy text."""

    generation: int
    digest: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass
class Served:
    """A server that runs in this process.

    Attributes:
        client: Connected to it.
        channel: The same for raw stubs.
    """

    loop: LoopThread
    server: Server
    recorder: Recorder
    client: Client
    channel: grpc.Channel
    _stopped: bool = field(default=False)

    @property
    def runtime(self) -> Runtime:
        return self.server.runtime

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def weights(self) -> ResidentWeights:
        return self.runtime.local._weights

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.runtime.local.runner.model.module.named_parameters())

    def hashes(self) -> dict[str, str]:
        """Return a hash of every byte of every live parameter."""
        return {name: hash_bytes(parameter) for name, parameter in self.parameters().items()}

    def score_bits(self, mix: Mapping[str, float] | None = None) -> tuple[float, ...]:
        """Return the log-probability of every token of two texts, to the last bit."""
        scored = self.client.score(["The sum of two deltas", "abc"], mix=mix, logprobs=True)
        return tuple(value for item in scored.items for value in item.logprobs)

    def greedy(self, mix: Mapping[str, float] | None = None, tokens: int = 8) -> tuple[int, ...]:
        """Return the greedy tokens after a fixed prompt."""
        return self.client.generate(
            PROMPT, mix=mix, temperature=0, max_new_tokens=tokens, ignore_eos=True
        ).token_ids

    def wait_for_health(self, service: str, status: str) -> None:
        """Wait until a service reports `status`, which follows on the server's own loop."""
        deadline = time.monotonic() + PATIENCE
        while self.client.health(service) != status:
            assert time.monotonic() < deadline, f"{service} is not {status}"

    def fingerprint(self) -> Fingerprint:
        state = self.client.mix()
        return Fingerprint(state.generation, state.digest, self.score_bits(), self.greedy())

    def stop(self, grace: float = 0.0) -> None:
        if not self._stopped:
            self._stopped = True
            self.recorder.gate = lambda step: None
            self.client.close()
            self.channel.close()
            self.loop.run(self.server.stop(grace))


PROMPT = "The sum of"


def start(
    loop: LoopThread,
    base: Path | str,
    state_dir: Path,
    *,
    limits: Limits | None = None,
    **config: Any,
) -> Served:
    """Start a server on free ports; `config` are fields of `ServerConfig`.

    Without kernels, whose compilation takes its time; `compile="auto"` uses them.
    """
    recorder = Recorder()
    whole = ServerConfig(
        **{
            "base": str(base),
            "state_dir": state_dir,
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "device": DEVICE,
            "dtype": "float32",
            "compile": "off" if config.get("device", DEVICE) == "cpu" else "auto",
            **config,
        }
    )

    async def boot() -> Server:
        server = Server(Runtime(whole, limits=limits, observer=recorder))
        try:
            await server.start()
        except BaseException:
            server.runtime.close()
            raise
        return server

    server = loop.run(boot())
    _watch(server.runtime, recorder)
    return Served(
        loop,
        server,
        recorder,
        # Tests hear the first answer.
        Client(server.address, timeout=PATIENCE, retries=0),
        grpc.insecure_channel(server.address),
    )


def _watch(runtime: Runtime, recorder: Recorder) -> None:
    """Let the recorder see what is asked of the engine."""
    engine = runtime.local
    submit, fold = engine.submit, engine.fold

    def counted_submit(sequence: Sequence) -> None:
        submit(sequence)
        recorder.submitted.put(sequence)

    def counted_fold(target: PreparedMix) -> Future[BoundMix]:
        future = fold(target)
        recorder.folds_asked.release()
        return future

    engine.submit = counted_submit  # type: ignore[method-assign]
    engine.fold = counted_fold  # type: ignore[method-assign]


@dataclass(frozen=True)
class Family:
    """A tiny base and PEFT adapters for it: `a`, `b`, `c`, and `a2` to take the place of `a`."""

    model: nn.Module
    base: Path
    adapters: Mapping[str, Path]

    def push_all(self, client: Client) -> None:
        for domain in ("a", "b", "c"):
            client.push(domain, self.adapters[domain])

    def folded(self, mix: Mapping[str, float]) -> nn.Module:
        """Return the base with the dense float64 sum of weighted deltas, cast to float32.

        Written without any of the product's code, so that it can be its reference. A key of `mix`
        is the name of an adapter of this family.
        """
        import copy

        from transformers.pytorch_utils import Conv1D

        model = copy.deepcopy(self.model)
        modules = dict(model.named_modules())
        sums = {name: m.weight.detach().double() for name, m in modules.items() if _adaptable(m)}
        for adapter, weight in mix.items():
            folder = self.adapters[adapter]
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            scaling = weight * config["lora_alpha"] / config["r"]
            for key, a in tensors.items():
                if not key.endswith(".lora_A.weight"):
                    continue
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[key.replace("lora_A", "lora_B")]
                delta = scaling * (b.double() @ a.double())
                sums[name] += delta.T if isinstance(modules[name], Conv1D) else delta
        with torch.no_grad():
            for name, total in sums.items():
                modules[name].weight.copy_(total.float())
        return model


def _adaptable(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D | nn.Linear)


def check_greedy(model: nn.Module, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Check that `tokens` is what greedy decoding on `model` gives after `prompt`.

    One pass over prompt and tokens is enough: if each token is the likeliest after all those before
    it, then greedy decoding, which begins with the same prompt, has chosen the same ones.
    """
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logits = model.double()(ids, use_cache=False).logits[0, len(prompt) - 1 :]
    model.float()
    best = logits.topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    assert margin > 2e-5, f"a tie ({margin:g}) that rounding can turn: choose another seed"
    assert logits.argmax(-1).tolist() == list(tokens)


def spawn(
    base: Path | str,
    state_dir: Path,
    *flags: str,
    module: str = "superpose_server",
    **environment: str,
) -> tuple[subprocess.Popen[str], Path]:
    """Begin `superpose-server` on free ports; return the process and the file of its stderr.

    Without kernels, as `start`, unless a flag says `--compile=auto`. `module` runs the command.
    """
    errors = state_dir.parent / f"{state_dir.name}.stderr"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", module, f"--base={base}"),
                *(f"--state-dir={state_dir}", "--listen=127.0.0.1:0"),
                *("--metrics-listen=127.0.0.1:0", f"--device={DEVICE}", "--dtype=float32"),
                *("--compile=off", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        )
    return process, errors


class ServerProcess:
    """A `superpose-server` in a process of its own, as `spawn` begins it, that is ready.

    Attributes:
        ready: The words of the ready line, {name: value}; empty if it ended before.
    """

    def __init__(self, base: Path | str, state_dir: Path, *flags: str, **environment: str) -> None:
        self.process, self.errors = spawn(base, state_dir, *flags, **environment)
        assert self.process.stdout is not None
        # Ends with the process at the latest; pytest-timeout bounds the rest.
        self.ready_line = self.process.stdout.readline()
        self.ready = dict(word.partition("=")[::2] for word in self.ready_line.split()[1:])

    @property
    def address(self) -> str:
        return self.ready["address"]

    def client(self) -> Client:
        return Client(self.address, timeout=PATIENCE, retries=0)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and all of stderr."""
        status = self.process.wait(PATIENCE)
        return status, self.errors.read_text()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


def wait_until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Wait for what the server does by itself and tells nobody."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"


@contextlib.contextmanager
def held(recorder: Recorder) -> Iterator[threading.Event]:
    """Hold the engine in its next step, until the event is set or the block is left."""
    let_go = threading.Event()

    def gate(_: Step) -> None:
        assert let_go.wait(PATIENCE)

    recorder.gate = gate
    try:
        yield let_go
    finally:
        let_go.set()
        recorder.gate = lambda step: None
