"""A base made ready as configured: whole, checked, on its device; or one line that says why not.

In two parts, since what is quickly refused comes first: `read_base` reads it, and who asks can see
to what belongs to this base before `ReadBase.make_model` takes minutes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.base.facts import BaseFacts, read_facts
from superpose_adapters.base.folder import CheckpointError
from superpose_adapters.base.tokenizer import TokenizerError
from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.fast_bfloat16 import has_fast_bfloat16
from superpose_adapters.one_line import one_line
from superpose_adapters.peft.folder import CONFIG_NAME
from superpose_adapters.shared_objects import SharedObjects
from superpose_adapters.store import is_adapter_store
from superpose_adapters.store_error import StoreError
from superpose_adapters.text_encoder import TextEncoder, logits_of, vocabulary_of
from superpose_server.config import ServerConfig
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.engine.trusted import Kind
from superpose_server.engine.twin_check import check_meaning
from superpose_server.engine.weights_check import Expected, expect
from superpose_server.errors import SelfCheckError, ServerError, StartupError
from superpose_server.model.capacity import positions_of
from superpose_server.model.kernels.build import CompilerError, load_kernels
from superpose_server.model.kernels.family import FamilyError
from superpose_server.model.memory import MIB, is_out_of_memory
from superpose_server.model.model import KERNEL_DTYPES, Model
from superpose_server.state_folder import check_state_folder

# Characters of a line that says why a server cannot start, as far as it is not ours alone.
_LONGEST = 2000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadBase:
    """A base as its checkpoint has it, on its device.

    Attributes:
        config: What it was read for.
        module: The model of transformers.
        kernels: Whether it is to run on kernels.
        facts: What else a reader of adapters needs to know of it.
        tokenizer: Of the base.
        texts: Makes token ids of texts by it.
        digest: sha256 of the checkpoint.
    """

    config: ServerConfig
    module: nn.Module
    kernels: bool
    facts: BaseFacts
    tokenizer: Tokenizer
    texts: TextEncoder
    digest: str

    def make_model(self) -> tuple[Model, Expected | None]:
        """Return the model that serves, and what its weights must give; None: nobody asks.

        Raises:
            Exception: As `read_base`.
        """
        config, module = self.config, self.module
        device = next(module.parameters()).device
        expected = None
        if config.self_check:
            _check_meaning(type(module), module.config, device, self.kernels)
            expected = expect(module, config.max_length)
        model = Model(
            module,
            base_digest=self.digest,
            device=device,
            max_batch=config.max_batch,
            max_length=config.max_length,
            cache_bytes=None if config.cache_mib is None else config.cache_mib * MIB,
            kernels=self.kernels,
        )
        return model, expected


def read_base(config: ServerConfig) -> ReadBase:
    """Read a base and check what needs no run of it, what is quickly refused first.

    Raises:
        Exception: As many kinds as there are things that fail; `startup_error` says each in a line.
    """
    folder = resolve_base(config.base)
    device = _device(config.device)
    _check_adapter_dir(config.adapter_dir)
    check_state_folder(config)
    dtype = _dtype(config.dtype, device)
    kernels = _has_kernels(config, device, dtype)
    module = load_checkpoint(folder, dtype)
    tokenizer = Tokenizer(folder)
    texts = TextEncoder(tokenizer.inner, vocabulary_of(module), logits=logits_of(module))
    _check_length(config, module)
    facts = read_facts(config.base, folder, module, texts.tokens_before)
    module = module.to(device)
    return ReadBase(config, module, kernels, facts, tokenizer, texts, checkpoint_digest(folder))


def startup_error(config: ServerConfig, error: Exception) -> StartupError:
    """Return the one line that a start ends with, whatever it was that failed."""
    line = one_line(error, _LONGEST)
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
    ours = CheckpointError | CompilerError | FamilyError | StoreError | ServerError
    if isinstance(error, ours) or line.startswith("base "):
        return StartupError(line)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return StartupError(f"base {config.base} cannot be served: {kind}{line}")


def _has_kernels(config: ServerConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether to serve on kernels, which are compiled now if this machine never did.

    Raises:
        CompilerError: They are insisted on, and cannot be compiled.
        FamilyError: Those that are asked for are none of this processor's.
    """
    if config.compile == "off":
        return False
    if device.type == "cpu" and dtype in KERNEL_DTYPES:
        try:
            load_kernels()
        except CompilerError as error:
            if config.compile == "on":
                raise
            _log.warning("serving without kernels, which is slower: %s", one_line(error))
            return False
    return True


def _check_adapter_dir(root: Path | None) -> None:
    if root is None:
        return
    if not root.is_dir():
        raise StartupError(f"--adapter-dir {root} is no folder: create it or leave it out")
    try:
        adapter = CONFIG_NAME in [path.name for path in root.iterdir()]
    except OSError as error:
        raise StartupError(f"--adapter-dir {root} cannot be read ({error.strerror})") from error
    if adapter:
        raise StartupError(
            f"--adapter-dir {root} is an adapter itself: name the folder that holds it"
        )


def shared_store(url: str | None) -> SharedObjects | None:
    """Return the store of `--store`; one that is away may not be needed, if all was copied.

    Raises:
        SharedStoreError: The URL means nothing.
        StartupError: It is where a server keeps adapters of its own, and removes others.
    """
    if url is None:
        return None
    shared = SharedObjects(url)
    try:
        _ = "0" * 64 in shared  # No adapter's, to see whether there is an answer.
    except StoreError as error:
        _log.warning("until the shared store is back, what is pushed is refused: %s", error)
        return shared
    if shared.folder is not None and is_adapter_store(shared.folder):
        raise StartupError(
            f"--store {shared.url} is a server's own folder of adapters, in its --state-dir, which "
            "removes what it has no name for: name another folder"
        )
    return shared


def _check_length(config: ServerConfig, module: Any) -> None:
    positions = positions_of(module.config.get_text_config(decoder=True))
    length = config.max_length
    if length is not None and positions is not None and length > positions:
        raise StartupError(f"--max-length is {length}: base {config.base} takes 2 to {positions}")


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StartupError(f"--device {name} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"--device {name} is none that is served on: use auto, cpu or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StartupError(f"--device {name}: no GPU that torch can use; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartupError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device.type) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
