"""What an adapter may have beside its factors without being another method: nothing that changes.

PEFT saves parameters of the base along with an adapter: an embedding and a head that it took for
resized (`save_embedding_layers`), a head below an adapter of its own (`base_layer`), biases. Where
they are the base's own numbers they change nothing. Anything else was trained, and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from superpose_adapters.adapter import AdapterError
from superpose_adapters.base.facts import BaseFacts, StoredParameter
from superpose_adapters.base.folder import CheckpointError
from superpose_adapters.digest import DTYPE_NAMES
from superpose_adapters.peft.keys import PREFIX
from superpose_adapters.tensorfile import TensorEntry

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
_log = logging.getLogger(__name__)
# Numbers that are compared at a time, widened to float64.
_PIECE = 1 << 20


def check_bias(bias: str, modules: Iterable[str], base: BaseFacts | None) -> None:
    """Refuse an adapter whose config says that biases were trained, unless there is none.

    Args:
        bias: Of the config: none, lora_only or all.
        modules: The adapted ones, by their names in the base.
        base: None: nothing is known of its biases.

    Raises:
        AdapterError: UNSUPPORTED_FEATURE.
    """
    if bias == "none":
        return
    owners = set(modules)
    trained = [
        name
        for name in (base.parameters if base else ())
        if name.rpartition(".")[2] == "bias"
        and (bias == "all" or name.rpartition(".")[0] in owners)
    ]
    if base is None or trained:
        which = f" (this base has {trained[0]})" if trained else ""
        raise AdapterError(
            "UNSUPPORTED_FEATURE",
            f'adapter_config.json: bias is "{bias}": trained biases are not served{which}; train '
            'with bias="none"',
        )


def check_copies(
    copies: Mapping[str, TensorEntry], tensors: bytes, base: BaseFacts | None, prefix: str
) -> dict[str, TensorEntry]:
    """Check that tensors are the base's own parameters, number for number.

    The numbers are compared as the file and the checkpoint hold them, both widened without loss: a
    copy that was rounded to a narrower dtype is another parameter than the base's.

    Args:
        copies: {PEFT's name: tensor of the file}, none of them a factor.
        tensors: The file.
        base: None: there is nothing to compare with.
        prefix: What the names lack if they are those of the model without its head.

    Returns:
        Those that are no parameters of the base.

    Raises:
        AdapterError: UNSUPPORTED_FEATURE: one differs from the base's.
    """
    others = {}
    for key, entry in copies.items():
        name = prefix + key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if base is None or name not in base.parameters:
            others[key] = entry
        elif reason := _difference(entry, tensors, base, name):
            raise AdapterError(
                "UNSUPPORTED_FEATURE",
                f"tensor {entry.name[:200]} {reason}: only the factors of LoRA are served; if "
                "that parameter was not trained, save with save_embedding_layers=False",
            )
    return others


def _difference(entry: TensorEntry, tensors: bytes, base: BaseFacts, name: str) -> str | None:
    """Return what a tensor is instead of the base's parameter `name`; None: it is that."""
    try:
        copies = base.stored(name)
        if not copies:
            return f"cannot be compared with the base, whose checkpoint does not name {name}"
        for stored in copies:
            shape = stored.entry.shape
            if shape != entry.shape:
                return f"was resized: its shape is {entry.shape}, that of the base's {name} {shape}"
            for dtype in (entry.dtype, stored.entry.dtype):
                if dtype not in _DTYPES:
                    return f"cannot be compared with the base's {name} in dtype {dtype}"
            if not _is_same(entry, tensors, stored):
                return f"differs from the base's {name}"
    except (OSError, CheckpointError):
        _log.warning("a copy of %s cannot be compared with the base", name, exc_info=True)
        return f"cannot be compared with the base's {name}, which can no longer be read"
    return None


def _is_same(entry: TensorEntry, tensors: bytes, stored: StoredParameter) -> bool:
    dtype, at = _DTYPES[entry.dtype], entry.start
    for theirs in stored.pieces(_PIECE, _DTYPES[stored.entry.dtype]):
        data = bytearray(memoryview(tensors)[at : at + theirs.numel() * dtype.itemsize])
        at += len(data)
        if not torch.equal(torch.frombuffer(data, dtype=dtype).double(), theirs.double()):
            return False
    return True
