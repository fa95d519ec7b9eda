"""An adapter as a PEFT folder: the two files, and how they get there."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from superpose_adapters.durable import new_folder, write_file
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_adapters.peft.keys import factor_key
from superpose_adapters.tensorfile import with_metadata

# What PEFT and transformers write, and what some readers ask for.
_METADATA = {"format": "pt"}


def adapter_files(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    base: str | None,
    scaling: float = 1.0,
    fan_in_fan_out: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, bytes]:
    """Return the contents of adapter_config.json and adapter_model.safetensors.

    The same arguments give the same bytes. PEFT and our reader select the modules in `factors` and
    no others, each at its own rank.

    Args:
        factors: {full name of a module: (A, (r, in); B, (out, r))}, at least one.
        base: What the config names as the base.
        scaling: Factor of every delta B @ A.
        fan_in_fan_out: True for modules of the kind Conv1D. PEFT finds that out by itself, and
            warns where the config says otherwise.
        metadata: What the tensor file says beside its tensors.
    """
    ranks = {module: a.shape[0] for module, (a, _) in sorted(factors.items())}
    # The rank of most modules; the largest of those, where several are of as many.
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    others = dict(_patterns(ranks, rank))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(scaling * rank),
        "rank_pattern": others,
        "alpha_pattern": {pattern: _whole(scaling * r) for pattern, r in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole names: which layers are adapted is then said too.
        "target_modules": list(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[factor_key(module, "A")] = a.contiguous()
        tensors[factor_key(module, "B")] = b.contiguous()
    # Not sorted: of patterns the first one that matches counts.
    text = json.dumps(config, indent=2) + "\n"
    return text.encode(), with_metadata(save(tensors), {**_METADATA, **(metadata or {})})


def write_adapter(folder: Path, config: bytes, tensors: bytes, *, replace: bool = False) -> None:
    """Write an adapter's two files; the adapter is there whole or not at all.

    Args:
        folder: Nothing may be there, unless `replace`: then the two files of an adapter in it are
            written anew, and all else in it stays.
        config: Contents of adapter_config.json.
        tensors: Contents of adapter_model.safetensors.
        replace: See `folder`.

    Raises:
        FileExistsError: Something is there.
        OSError: It cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        if not replace:
            raise FileExistsError(f"{folder} exists: name another folder, or pass --replace")
        # Without its config a folder is no adapter, so the two never are those of different ones.
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        write_file(folder / TENSORS_NAME, tensors)
        write_file(folder / CONFIG_NAME, config)
        return
    with new_folder(folder) as fresh:
        (fresh / TENSORS_NAME).write_bytes(tensors)
        (fresh / CONFIG_NAME).write_bytes(config)


def _patterns(ranks: Mapping[str, int], default: int) -> Iterator[tuple[str, int]]:
    """Yield the entries of rank_pattern, in an order in which each module finds its own.

    PEFT takes a key for the end of a name, from a dot on, and the first that matches. So a module
    whose name ends in that of another one comes before it, and has a key of its own even where its
    rank is the default.
    """
    keys: list[str] = []
    for module in sorted(ranks, key=len):
        if ranks[module] != default or any(module.endswith(f".{key}") for key in keys):
            keys.append(module)
    for module in reversed(keys):
        yield re.escape(module), ranks[module]


def _whole(number: float) -> float:
    """Return a number as PEFT writes alphas: a whole one without a point."""
    return int(number) if float(number).is_integer() else number
