"""Peers as benchmarks use them: which there are, and each in a process of its own.

with PeerProcess(VARIANTS[0], Settings(model=folder)) as peer:
    answer = peer.run(prompts, new_tokens=64)
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from benchmarks.peers.peer import Answer, Prompts, Settings

ROOT = Path(__file__).resolve().parents[2]
# The environment that install.sh makes. If it is elsewhere, this variable names its python.
ENVIRONMENT = Path(__file__).resolve().parent / ".venv"
PYTHON_VARIABLE = "SUPERPOSE_PEERS_PYTHON"


class PeerError(Exception):
    """A peer could not start, or failed; one line."""


@dataclass(frozen=True)
class Variant:
    """A peer in one configuration."""

    name: str  # as shown in tables
    peer: str  # its module
    dtype: str
    weights_bits: int
    package: str  # what must be installed
    own_environment: bool  # whether it runs in the environment of the peers
    adapter: bool = False  # whether it serves base and adapter, not the base alone


VARIANTS = (
    Variant(
        "transformers generate float32", "transformers_generate", "float32", 32, "torch", False
    ),
    Variant(
        "transformers generate bfloat16", "transformers_generate", "bfloat16", 16, "torch", False
    ),
    Variant(
        "transformers generate_batch float32",
        "transformers_continuous",
        "float32",
        32,
        "torch",
        False,
    ),
    Variant(
        "transformers generate_batch bfloat16",
        "transformers_continuous",
        "bfloat16",
        16,
        "torch",
        False,
    ),
    Variant("PEFT unmerged float32", "peft_unmerged", "float32", 32, "peft", False, adapter=True),
    Variant("llama.cpp f32", "llama_cpp", "float32", 32, "llama_cpp", True),
    Variant("llama.cpp f16", "llama_cpp", "float16", 16, "llama_cpp", True),
    Variant("llama.cpp f16 + LoRA", "llama_cpp", "float16", 16, "llama_cpp", True, adapter=True),
    Variant("CTranslate2 float32", "ctranslate2_generate", "float32", 32, "ctranslate2", True),
    Variant("CTranslate2 int8", "ctranslate2_generate", "int8", 8, "ctranslate2", True),
    *(
        Variant(
            f"OpenVINO {dtype}{' + LoRA' if adapter else ''}",
            "openvino_genai",
            dtype,
            bits,
            "openvino_genai",
            True,
            adapter=adapter,
        )
        for dtype, bits in (("float32", 32), ("bfloat16", 16), ("int8", 8))
        for adapter in (False, True)
    ),
)
# The project's own engine without adapters; the dtype is the run's.
BARE_VARIANTS = (
    Variant("bare", "bare_engine", "float32", 32, "torch", False),
    Variant("bare transformers", "bare_transformers", "float32", 32, "torch", False),
)


def peers_python() -> Path:
    """Return the python of the environment of the peers, whether it exists or not."""
    named = os.environ.get(PYTHON_VARIABLE)
    return Path(named) if named else ENVIRONMENT / "bin" / "python"


@functools.cache
def installed(python: Path, package: str) -> bool:
    """Return whether an interpreter finds a package."""
    if python == Path(sys.executable):
        return importlib.util.find_spec(package) is not None
    code = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({package!r}))"
    # Run elsewhere: files here are named like the packages that are asked for.
    return subprocess.run([python, "-c", code], cwd="/", capture_output=True).returncode == 0


def close_pipe(pipe: IO[bytes]) -> None:
    """Close a pipe, even if the process at its other end is gone with things unread."""
    with suppress(OSError):
        pipe.close()


class PeerProcess:
    """One variant of a peer, in a process of its own."""

    def __init__(self, variant: Variant, settings: Settings) -> None:
        """Prepare a variant. Its own dtype holds, and an adapter only if it serves one."""
        self.variant = variant
        self.settings = replace(
            settings, dtype=variant.dtype, adapter=settings.adapter if variant.adapter else None
        )
        self.python = peers_python() if variant.own_environment else Path(sys.executable)
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] = io.BytesIO()
        self.opened = ExitStack()
        self.pending = b""
        # What the worker said of itself: version, weights_bits and more.
        self.ready: dict[str, Any] = {}

    def unavailable(self) -> str | None:
        """Return in one line why this peer cannot run here, or None if it can."""
        if self.variant.adapter and self.settings.adapter is None:
            return "no adapter is given"
        if not self.python.exists():
            return "the environment of the peers is not installed: run benchmarks/peers/install.sh"
        if not installed(self.python, self.variant.package):
            return f"{self.variant.package} is not installed"
        if self.settings.device != "cpu" and self.variant.own_environment:
            return "it is built for the processor only"
        return None

    def available(self) -> bool:
        """Return whether this peer can run here."""
        return self.unavailable() is None

    def start(self, timeout: float = 300.0) -> None:
        """Start the process and wait until the model is loaded, converted first if need be.

        Raises:
            PeerError: if it cannot, with the reason.
        """
        reason = self.unavailable()
        if reason is not None:
            raise PeerError(reason)
        settings = self.settings
        command = [str(self.python), "-m", "benchmarks.peers.worker", "--peer", self.variant.peer]
        command += ["--model", str(settings.model.resolve()), "--cache", str(settings.cache)]
        if settings.adapter is not None:
            command += ["--adapter", str(settings.adapter.resolve())]
        command += ["--dtype", settings.dtype, "--device", settings.device]
        command += ["--threads", str(settings.threads)]
        command += ["--rows", str(settings.rows), "--length", str(settings.length)]
        # This interpreter's packages may lie where only its own path leads; another's do not.
        path = [] if self.variant.own_environment else sys.path
        environment = os.environ | {
            "OMP_NUM_THREADS": str(settings.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *path]),
        }
        self.errors = self.opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=ROOT,
            env=environment,
        )
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            self.opened.callback(close_pipe, pipe)
        try:
            self.ready = self.read(timeout)
            if not self.ready.get("ready"):
                raise PeerError(self.ready.get("error", "the worker is not ready"))
        except PeerError:
            self.close()
            raise

    def run(self, prompts: Prompts, new_tokens: int, timeout: float = 600.0) -> Answer:
        """Continue prompts greedily, each by exactly `new_tokens` tokens.

        The seconds are those of the worker: they hold no JSON and no pipe.

        Raises:
            PeerError: if the peer fails or is too slow; too slow is the end of its process.
        """
        if self.process is None or self.process.stdin is None:
            raise PeerError("the peer is not running")
        request = json.dumps({"prompts": prompts, "new_tokens": new_tokens})
        try:
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise PeerError(self.last_words()) from None
        answer = self.read(timeout)
        if "error" in answer:
            raise PeerError(answer["error"])
        return Answer(answer["tokens"], answer["first_token_seconds"], answer["seconds"])

    def read(self, timeout: float) -> dict[str, Any]:
        """Return the next message of the worker."""
        assert self.process is not None
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.pending:
            readable, _, _ = select.select([descriptor], [], [], timeout)
            if not readable:
                self.close(kill=True)
                raise PeerError(f"no answer within {timeout:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise PeerError(self.last_words())
            self.pending += chunk
        line, _, self.pending = self.pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used; 0 if unknown."""
        assert self.process is not None
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return 0.0
        # The name of the command, in parentheses, may hold spaces.
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def last_words(self) -> str:
        """Return how the process ended and the last line that it wrote to standard error."""
        assert self.process is not None
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"the worker ended with code {code}: {lines[-1].strip() if lines else 'no message'}"

    def close(self, kill: bool = False) -> None:
        """End the process; harmless if it has ended."""
        if self.process is not None:
            if kill:
                self.process.kill()
            # The end of its input is the end of the worker.
            self.opened.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
        self.pending = b""

    def __enter__(self) -> Self:
        """Start the process."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close(kill=error is not None)
