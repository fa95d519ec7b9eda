"""The base of a training run, the modules that are adapted, and the first factors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.base.tokenizer import TokenizerError, load_tokenizer
from superpose_train.frozen_a import freeze_a
from superpose_train.options import Options
from superpose_train.peft_names import factors_of

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
    if options.frozen_a is not None:
        freeze_a(factors_of(adapted), options.frozen_a, options.first_seed)
    return adapted


def detach_adapter(adapted: Any) -> Any:
    """Return the base of a PEFT model, as it was before `attach_adapter`."""
    with library_warnings_ignored():
        return adapted.unload()
