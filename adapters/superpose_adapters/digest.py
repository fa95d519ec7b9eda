"""Digests: one sha256 for what an adapter, a base or a mix is, the same on every machine.

Tensors are framed as one length-prefixed canonical JSON header (every name, dtype and shape, sorted
by name, and whatever else belongs to the content) followed by their bytes in that order. The header
fixes the length of each tensor's bytes, so no two different contents are hashed as the same text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from superpose_adapters.tensorfile import TensorEntry, TensorFileError, read_header

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_CHUNK_BYTES = 1 << 22


def canonical_json(value: Any) -> bytes:
    """Return `value` as canonical JSON: sorted keys, no spaces, ASCII, no NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def canonical_digest(value: Any) -> str:
    """Return the sha256 (hex) of `value` as canonical JSON: sorted keys, no spaces, no NaN."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _framed_digest(
    specs: Iterable[tuple[str, str, Iterable[int]]], extra: Any, chunks: Iterable[Any]
) -> str:
    header = canonical_json([[[n, d, list(s)] for n, d, s in specs], extra])
    state = hashlib.sha256(len(header).to_bytes(8, "little"))
    state.update(header)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def _bits(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of `tensor` in logical (row-major) order, a bounded piece at a time.

    The piece is copied to the CPU, so that a parameter of any size on any device can be hashed.
    """
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].cpu().contiguous()
        yield piece.view(torch.uint8).numpy().data


def hash_bytes(tensor: Tensor) -> str:
    """Return the sha256 (hex) of the bits of a tensor of any dtype, layout and device.

    Shape and dtype are not part of it. 0.0 and -0.0 differ, as do two NaN of different bits.
    """
    slices = hash_slices(tensor)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            found: str = end.value
            return found


def hash_slices(tensor: Tensor) -> Generator[int, None, str]:
    """Return what `hash_bytes` returns; yields after every few MiB how many bytes they were."""
    state = hashlib.sha256()
    for chunk in _bits(tensor):
        state.update(chunk)
        yield len(chunk)
    return state.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor], extra: Any = None) -> str:
    """Return the sha256 of {name: tensor} (name, dtype, shape, bytes) and of `extra`, JSON values.

    Raises:
        ValueError: A dtype that has no name in the safetensors format.
    """
    ordered = sorted(tensors.items())
    for name, tensor in ordered:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name} has dtype {tensor.dtype}: no digest is defined for it")
    specs = [(name, DTYPE_NAMES[tensor.dtype], tensor.shape) for name, tensor in ordered]
    return _framed_digest(specs, extra, (c for _, tensor in ordered for c in _bits(tensor)))


def adapter_digest(tensors: Mapping[str, Tensor], config_effect: Mapping[str, Any]) -> str:
    """Return the digest of an adapter: its tensors as stored and the config that scales them.

    Args:
        tensors: {key in the file: tensor in the file's dtype}.
        config_effect: The config fields that change the effect, see `PeftConfig.effect`.
    """
    return tensor_digest(tensors, dict(config_effect))


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads from `folder`, or every safetensors file in it.

    A folder may hold the same model a second time under other names (`consolidated.safetensors`),
    which must not count.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    return sorted(folder.glob("*.safetensors"))


def checkpoint_digest(folder: Path) -> str:
    """Return the base digest of a transformers checkpoint folder, whole or in shards.

    It is the digest of the (name, dtype, shape, bytes) of every tensor, sorted by name, so it does
    not depend on the split into files. Reads a few MiB at a time.

    Raises:
        ValueError: No safetensors file, a damaged one, or a tensor that two files hold.
    """
    paths = checkpoint_files(folder)
    if not paths:
        raise ValueError(
            f"{folder}: no *.safetensors file: save the model with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    entries: list[tuple[TensorEntry, Path]] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                entries += [(e, path) for e in read_header(file, path.stat().st_size).entries]
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing, yet its index names it: copy it again") from error
        except TensorFileError as error:
            raise ValueError(f"{path}: {error}: copy it again") from error
    entries.sort(key=lambda pair: pair[0].name)
    for (first, path), (second, other) in pairwise(entries):
        if first.name == second.name:
            raise ValueError(
                f"{folder}: tensor {first.name} is in {path.name} and in {other.name}: "
                "keep one of the two files"
            )
    specs = [(e.name, e.dtype, e.shape) for e, _ in entries]
    return _framed_digest(specs, None, _checkpoint_bytes(entries))


def _checkpoint_bytes(entries: list[tuple[TensorEntry, Path]]) -> Iterator[bytes]:
    files: dict[Path, BinaryIO] = {}
    try:
        for entry, path in entries:
            if path not in files:
                files[path] = path.open("rb")
            files[path].seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = files[path].read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise ValueError(f"{path}: became shorter while it was read: copy it again")
                left -= len(chunk)
                yield chunk
    finally:
        for file in files.values():
            file.close()
