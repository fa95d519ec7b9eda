"""A checkpoint in, transformers' model out: whole, or refused in one line.

The checkpoint is the base. transformers would fill what is missing with random parameters, drop
what it has no place for, read integers as weights, merge an adapter that lies beside them, and warn
at most. None of that is ever served, or trained on.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from superpose_adapters.base.family import (
    refuse_class,
    refuse_config,
    refuse_settings,
)
from superpose_adapters.base.folder import (
    WRAPPERS,
    read_headers,
    read_settings,
    refuse,
    weight_files,
)
from superpose_adapters.base.quiet import quiet
from superpose_adapters.one_line import with_kind
from superpose_adapters.tensorfile import TensorEntry

_FLOATS = {"F64", "F32", "BF16", "F16"}
# What older classes stored although they could make it: positions, lower triangles, and a score.
_POSITION_IDS = re.compile(r"(^|\.)position_ids$")
_MASK = re.compile(r"(^|\.)att(n|ention)\.bias$")
_MASKED = re.compile(r"(^|\.)att(n|ention)\.masked_bias$")
_NAMED = 3  # tensors that a line names

_log = logging.getLogger(__name__)


def load_checkpoint(
    folder: Path, dtype: torch.dtype, adjust: Callable[[Any], None] | None = None
) -> nn.Module:
    """Load a base: on the CPU, in eval mode, without gradients.

    Parameters may lie in the mapped file. Code in the folder is never run.

    Args:
        folder: Of the checkpoint.
        dtype: Of the parameters.
        adjust: Changes its configuration before the model is made.

    Raises:
        CheckpointError: It cannot be served as it is; one line says why, and what to do.
        RuntimeError: There is no memory, as torch says it.
    """
    _refuse_if(folder, refuse_settings(read_settings(folder)))
    paths = weight_files(folder)
    with quiet():
        config = _config(folder)
        if adjust is not None:
            adjust(config)
        skeleton = _skeleton(folder, config, dtype)
        stored = read_headers(folder, paths)
        mapping = _unwrap(folder, stored)
        stored = {re.sub(WRAPPERS, "", name): entry for name, entry in stored.items()}
        _check_stored(folder, skeleton, stored)
        module = _load(folder, config, dtype, mapping, skeleton, stored)
    module.eval().requires_grad_(False)
    return module


def load_skeleton(folder: Path) -> nn.Module:
    """Return the model of a base without its parameters: names, shapes and ties, and no memory.

    Code in the folder is never run, and its files of parameters are not read.

    Raises:
        CheckpointError: It cannot be served as it is; one line says why, and what to do.
    """
    _refuse_if(folder, refuse_settings(read_settings(folder)))
    with quiet():
        skeleton: nn.Module = _skeleton(folder, _config(folder), torch.float32)
    return skeleton.eval().requires_grad_(False)


def _refuse_if(folder: Path, reason: str | None) -> None:
    if reason is not None:
        refuse(folder, reason)


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # As many kinds as there are fields that can be wrong.
        refuse(
            folder,
            f"has a config.json that transformers refuses ({with_kind(error)}): correct that field",
            error,
        )
    _refuse_if(folder, refuse_config(config))
    # What a file asks for may not be installed.
    config._attn_implementation = None
    return config


def _skeleton(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Build the model without memory, so that an unfit one is refused before its weights are read.

    It tells the names, shapes and buffers that the class has as well.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # From anywhere in the class's own code.
        refuse(
            folder,
            f"has a config.json of which no {config.model_type} can be built ({with_kind(error)}): "
            "correct that field",
            error,
        )
    _refuse_if(folder, refuse_class(config, skeleton))
    return skeleton


def _unwrap(folder: Path, names: Iterable[str]) -> dict[str, str] | None:
    """Return the renaming that takes a wrapper's prefix from every name; None: there is none."""
    prefixes: dict[str, str] = {}
    for name in names:
        match = re.match(WRAPPERS, name)
        prefixes.setdefault(match.group() if match else "", name)
    if set(prefixes) <= {""}:
        return None
    if len(prefixes) > 1:
        examples = " and ".join(sorted(prefixes.values())[:2])
        refuse(
            folder,
            f"names some tensors behind a wrapper's prefix and others not ({examples}): save it "
            "again from the model itself, not from torch.compile's or DataParallel's wrapper",
        )
    (prefix,) = prefixes
    _log.warning("base %s: every tensor is named behind %s; loaded without that", folder, prefix)
    return {WRAPPERS: ""}


def _check_stored(folder: Path, skeleton: Any, stored: dict[str, TensorEntry]) -> None:
    """Refuse what transformers would read as a parameter and is none, or as one and is two."""
    strange = [
        f"{name} is {entry.dtype}"
        for name, entry in stored.items()
        if entry.dtype not in _FLOATS and not _is_buffer(name, entry, skeleton)
    ]
    if strange:
        refuse(
            folder,
            f"stores what is no unquantised parameter ({_some(strange)}): only float32, "
            "bfloat16 and float16 checkpoints will do; save a dequantised one",
        )
    expected = skeleton.state_dict()
    prefix = f"{skeleton.base_model_prefix}."
    for name in stored:
        short = name.removeprefix(prefix)
        if short != name and short in stored and not {name, short} <= expected.keys():
            refuse(
                folder, f"stores one parameter twice, as {name} and as {short}: remove one of them"
            )


def _load(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    mapping: dict[str, str] | None,
    skeleton: Any,
    stored: dict[str, TensorEntry],
) -> nn.Module:
    """Let transformers load it, and believe only its account of what fitted."""
    kind = type(skeleton).__name__
    try:
        module, told = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=mapping,
            output_loading_info=True,
            # Otherwise it raises, with the names in its log only.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise
        # It stumbles over some parameters of another shape.
        reason = _unfit(kind, [], [], _other_shapes(skeleton, stored)) or (
            f"cannot be loaded as {kind} ({with_kind(error)}): save it again with save_pretrained"
        )
        refuse(folder, reason, error)
    surplus = [
        name
        for name in told["unexpected_keys"]
        if name not in stored or not _is_buffer(name, stored[name], skeleton)
    ]
    missing = sorted(told["missing_keys"])
    head = _head(skeleton)
    if missing and head and all(name.startswith(f"{head}.") for name in missing):
        also = f", and holds {_some(surplus)}" if surplus else ""
        refuse(
            folder,
            f"has no language model's head ({_some(missing)} is not stored{also}): use a "
            f"checkpoint that was saved as {kind}, not a backbone or a classifier; if its head is "
            "its embedding, set tie_word_embeddings to true in config.json",
        )
    shapes = [_shape_line(name, tuple(a), tuple(b)) for name, a, b in told["mismatched_keys"]]
    _refuse_if(folder, _unfit(kind, missing, surplus, shapes))
    loaded: nn.Module = module
    return loaded


def _unfit(
    kind: str, missing: Sequence[str], surplus: Sequence[str], shapes: Sequence[str]
) -> str | None:
    parts = []
    if missing:
        parts.append(f"lacks {_some(missing)}")
    if shapes:
        parts.append(f"in another shape: {_some(shapes)}")
    if surplus:
        parts.append(f"no place for {_some(surplus)}")
    if not parts:
        return None
    return (
        f"is not a whole {kind} as config.json describes it: {'; '.join(parts)}: copy it again, or "
        "save the model again with save_pretrained"
    )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _shape_line(name: str, stored: Sequence[int], wanted: Sequence[int]) -> str:
    return f"{name} is {list(stored)}, not {list(wanted)}"


def _other_shapes(skeleton: Any, stored: dict[str, TensorEntry]) -> list[str]:
    expected = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    lines = []
    for name, entry in stored.items():
        wanted = expected.get(name, expected.get(f"{prefix}.{name}"))
        if wanted is not None and tuple(wanted.shape) != entry.shape:
            lines.append(_shape_line(name, entry.shape, tuple(wanted.shape)))
    return lines


def _head(skeleton: Any) -> str | None:
    """Return the name of the module that makes logits."""
    output = skeleton.get_output_embeddings()
    return next((name for name, part in skeleton.named_modules() if part is output), None)


def _is_buffer(name: str, entry: TensorEntry, skeleton: Any) -> bool:
    """Tell whether a stored tensor is no parameter but what the class makes itself, or made once.

    Masks and positions are in many older checkpoints, under names that the class may have lost.
    """
    names = {name, f"{skeleton.base_model_prefix}.{name}"}
    if names & {parameter for parameter, _ in skeleton.named_parameters()}:
        return False
    patterns = skeleton._keys_to_ignore_on_load_unexpected or ()
    if _POSITION_IDS.search(name) or any(re.search(pattern, name) for pattern in patterns):
        return True
    if _MASK.search(name):
        return len(entry.shape) == 4 and entry.shape[-1] == entry.shape[-2]
    if _MASKED.search(name):
        return entry.shape in ((), (1,))
    return bool(names & {buffer for buffer, _ in skeleton.named_buffers()})
