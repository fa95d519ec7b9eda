"""The base of a training run, the modules that are adapted, and the first factors."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.base.tokenizer import TokenizerError, load_tokenizer
from superpose_train.options import Options
from superpose_train.peft_names import module_of_a

_LLAMA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
DEFAULT_TARGETS = {
    "gpt2": ("c_attn", "c_proj"),
    "llama": _LLAMA_TARGETS,
    "mistral": _LLAMA_TARGETS,
    "qwen2": _LLAMA_TARGETS,
    "qwen3": _LLAMA_TARGETS,
}


def load_base(base: str, folder: Path) -> tuple[Any, Any]:
    """Return (model in float32, tokenizer) of the base called `base` that lies in `folder`.

    The base's own dropout is off, so that --dropout is all there is.

    Raises:
        ValueError: It is no whole, unquantised checkpoint of a decoder, or has no tokenizer.
    """
    model: Any = load_checkpoint(folder, torch.float32, _without_dropout)
    model.requires_grad_(True)
    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError as error:
        raise ValueError(f"base {base} {error}") from error
    model.config.use_cache = False
    # GPT-2's class name does not tell transformers which loss is meant, and it says so each time.
    model.loss_type = "ForCausalLM"
    return model, tokenizer


def _without_dropout(config: Any) -> None:
    for field, value in config.to_dict().items():
        if isinstance(value, float) and field.endswith(("pdrop", "dropout")):
            setattr(config, field, 0.0)


def check_context(model: Any, max_length: int) -> None:
    """Refuse rows longer than the base's context.

    Raises:
        ValueError: naming both lengths.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(f"--max-length {max_length} is above the base's {context} tokens")


def choose_targets(model: nn.Module, model_type: str, requested: Sequence[str]) -> list[str]:
    """Return the sorted target modules: the requested ones, else the architecture's own.

    Each name must match, as PEFT matches it (the module's full name or its end after a dot), at
    least one Linear or Conv1D, and nothing else.

    Raises:
        ValueError: a name that matches no module, another kind of module, or the output layer; or
            an architecture without a default.
    """
    layers = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    output = model.get_output_embeddings()  # type: ignore[operator]
    leaves = sorted(
        {name.rpartition(".")[2] for name in layers if model.get_submodule(name) is not output}
    )
    targets = tuple(requested) or DEFAULT_TARGETS.get(model_type, ())
    if not targets:
        raise ValueError(
            f"no default --target-modules for a base of type {model_type}; "
            f"choose from {', '.join(leaves)}"
        )
    for target in targets:
        matched = [
            name
            for name, _ in model.named_modules()
            if name == target or name.endswith(f".{target}")
        ]
        if not matched:
            raise ValueError(
                f"--target-modules {target} matches nothing in this base; "
                f"choose from {', '.join(leaves)}"
            )
        for name in matched:
            if name not in layers or model.get_submodule(name) is output:
                raise ValueError(
                    f"--target-modules {target} matches {name}, which cannot be adapted here; "
                    f"choose from {', '.join(leaves)}"
                )
    return sorted(set(targets))


@contextmanager
def library_warnings_ignored() -> Iterator[None]:
    """Hide what the libraries say of each other and the user can do nothing about."""
    with warnings.catch_warnings():
        # PEFT asks transformers 5.23 under a name that transformers has replaced.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # On resuming, Trainer loads the scheduler before the optimiser's first step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def attach_adapter(model: Any, options: Options, targets: list[str]) -> Any:
    """Return the PEFT model: a fresh LoRA whose A factors follow from `--init-seed` alone.

    Raises:
        ValueError: layers of two layouts, or blocks of frozen A that do not fit.
    """
    conv = [
        isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets or name in targets
    ]
    if any(conv) and not all(conv):
        raise ValueError("--target-modules mix Conv1D and Linear layers; train them apart")
    torch.manual_seed(options.first_seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        # PEFT writes alpha as it was given; a whole number belongs there as one.
        lora_alpha=int(options.alpha) if float(options.alpha).is_integer() else options.alpha,
        target_modules=targets,
        lora_dropout=options.dropout,
        fan_in_fan_out=all(conv),
    )
    with library_warnings_ignored():
        adapted = get_peft_model(model, config)
    if options.frozen_a_block is not None:
        _freeze_a(adapted, options)
    return adapted


def _freeze_a(adapted: Any, options: Options) -> None:
    assert options.frozen_a_block is not None
    block, blocks = options.frozen_a_block
    for name, parameter in adapted.named_parameters():
        if module := module_of_a(name):
            factor = orthogonal_block(
                options.first_seed, module, parameter.shape[1], options.rank, block, blocks
            )
            parameter.data.copy_(factor)
            parameter.requires_grad = False


def orthogonal_block(
    seed: int, module: str, in_features: int, rank: int, block: int, blocks: int
) -> Tensor:
    """Return A (rank, in_features): rows of one random orthogonal basis of a module's inputs.

    The basis follows from seed and module alone, so blocks of the same rank share no row whoever
    asks for them; rows are as long as PEFT's fresh ones are on average.

    Args:
        seed: Of the basis.
        module: The module's name in the base.
        in_features: Dimension of the module's inputs.
        rank: Rows of a block.
        block: From 1.
        blocks: How many there are.

    Raises:
        ValueError: the module has too few inputs for so many rows.
    """
    if blocks * rank > in_features:
        raise ValueError(
            f"--frozen-a-block: {blocks} blocks of --rank {rank} do not fit into the "
            f"{in_features} inputs of {module}"
        )
    key = hashlib.sha256(f"{seed} {module}".encode()).digest()
    # Drawn row by row, so that a basis of more blocks begins with the same rows.
    rows = np.random.default_rng(list(key)).standard_normal((block * rank, in_features))
    basis, triangle = np.linalg.qr(rows.T)
    # QR leaves the signs open; a positive diagonal fixes them whatever library computes it.
    basis = basis * np.sign(np.diag(triangle))
    # kaiming_uniform(a=sqrt 5) draws from +-1/sqrt(in): a row's mean square norm is 1/3.
    chosen = basis.T[(block - 1) * rank :] / np.sqrt(3.0)
    return torch.from_numpy(chosen.astype(np.float32))
