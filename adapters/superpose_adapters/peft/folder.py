"""The one door by which an adapter comes in: untrusted bytes to a checked `Adapter`.

The order of the checks is part of their safety: sizes before contents, the config before the
tensors, the header before the data, and every tensor accounted for before one is decoded, because
the commonest bug with adapters is one whose tensors are silently not used.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter, AdapterError, Factors
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.digest import adapter_digest
from superpose_adapters.layout import Layout
from superpose_adapters.mix_syntax import check_name
from superpose_adapters.one_line import escaped
from superpose_adapters.peft.beside import check_bias, check_copies
from superpose_adapters.peft.config import parse_config
from superpose_adapters.peft.keys import PREFIX, factor_key, module_of, read_keys
from superpose_adapters.peft.targets import select_modules
from superpose_adapters.peft.training_record import (
    MAX_TRAINING_BYTES,
    TRAINING_NAME,
    training_warnings,
)
from superpose_adapters.provenance import (
    METADATA_KEY,
    Provenance,
    ProvenanceError,
    read_provenance,
)
from superpose_adapters.tensorfile import Header, TensorEntry, TensorFileError, read_header

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

MLX_TENSORS_NAME = "adapters.safetensors"

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle")
# Far above any real header (two keys of about 100 bytes a module), far below a decoded bomb.
_MAX_HEADER_BYTES = 4 << 20
# What is opened was resolved before: a link there was put in its place since. No pipe must block.
# Windows has neither flag, no pipes in folders, and links only by those who have a right to them.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


@dataclass(frozen=True)
class Limits:
    """Caps on an adapter.

    Attributes:
        max_rank: Largest rank of a module; the server's --max-rank.
        max_bytes: Largest tensor file; the server's --max-adapter-mib.
        max_config_bytes: Largest config file. PEFT writes about 1 KiB, and some 50 bytes more for
            each entry of rank_pattern.
    """

    max_rank: int = 256
    max_bytes: int = 256 << 20
    max_config_bytes: int = 256 << 10

    def __post_init__(self) -> None:
        """Check the caps.

        Raises:
            ValueError: A cap below 1.
        """
        for name in ("max_rank", "max_bytes", "max_config_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use a number above 0")


DEFAULT_LIMITS = Limits()


def read_adapter(
    folder: Path,
    layout: Layout,
    limits: Limits = DEFAULT_LIMITS,
    *,
    base: BaseFacts | None = None,
    root: Path | None = None,
) -> Adapter:
    """Read the PEFT folder `folder`, whose name must be fit for a domain.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors, and may hold the
            training.json of superpose-train; other files are not read.
        layout: The base's modules.
        limits: Caps on rank and sizes.
        base: What else is known of the base; without it everything that has to be compared with
            the base is refused.
        root: Nothing outside this directory is read, links resolved; default the folder's parent.

    Raises:
        AdapterError: It is refused; `reason` says why.
    """
    files = read_files(folder, limits, root)
    return parse_adapter(
        files.config, files.tensors, layout, limits, base=base, training=files.training
    )


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, not looked into.

    Attributes:
        config: adapter_config.json.
        tensors: adapter_model.safetensors.
        training: training.json; None: there is none.
    """

    config: bytes
    tensors: bytes
    training: bytes | None = None


def read_files(folder: Path, limits: Limits, root: Path | None = None) -> AdapterFiles:
    """Read the files of a PEFT folder; see `read_adapter`.

    Raises:
        AdapterError: One is missing, too large, or not to be read.
    """
    try:
        check_name(folder.name)
    except ValueError as error:
        raise AdapterError("NAME_INVALID", str(error)) from error
    home = _resolve(root if root is not None else folder.parent, None)
    inside = _resolve(folder, home)
    if not inside.is_dir():
        raise AdapterError("FILE_MISSING", f"{folder}: not a directory: name a PEFT folder")
    _check_kind(inside)
    config = _read_file(inside / CONFIG_NAME, home, limits.max_config_bytes)
    tensors = _read_file(inside / TENSORS_NAME, home, limits.max_bytes)
    record = inside / TRAINING_NAME
    training = None
    if record.is_file() and record.stat().st_size <= MAX_TRAINING_BYTES:
        training = _read_file(record, home, MAX_TRAINING_BYTES)
    return AdapterFiles(config, tensors, training)


def parse_adapter(
    config: bytes,
    tensors: bytes,
    layout: Layout,
    limits: Limits = DEFAULT_LIMITS,
    *,
    base: BaseFacts | None = None,
    training: bytes | None = None,
) -> Adapter:
    """Check the contents of adapter_config.json and adapter_model.safetensors against a base.

    The result holds float32 copies that share no memory with `tensors`. For `base` see
    `read_adapter`; `training` is training.json, of which only warnings come.

    Raises:
        AdapterError: It is refused; `reason` says why.
    """
    _check_size(CONFIG_NAME, len(config), limits.max_config_bytes)
    _check_size(TENSORS_NAME, len(tensors), limits.max_bytes)
    for name, data in ((CONFIG_NAME, config), (TENSORS_NAME, tensors)):
        _check_content(name, data)
    parsed = parse_config(config)
    header = _header(tensors)
    entries = {entry.name: entry for entry in header.entries}
    keys = read_keys(entries)
    prefix = _missing_prefix(keys.factors, layout, base)
    # As the adapter was trained: without the head, the names of modules lack the prefix.
    seen = {
        module.removeprefix(prefix): shape
        for module, shape in layout.items()
        if module.startswith(prefix)
    }
    selected = select_modules(parsed, seen, base.modules if base else {})
    check_bias(parsed.bias, (prefix + module for module in selected), base)
    copies = {name: entries[key] for name, key in keys.others.items()}
    others = check_copies(copies, tensors, base, prefix)
    factors = {name: entries[key] for name, key in keys.factors.items()}
    _check_surplus({**factors, **others}, selected, layout, base, prefix)
    _check_missing(factors, selected)
    for module, (rank, _) in selected.items():
        _check_module(module, rank, factors, seen, limits)
    stored = {name: _decode(tensors, entry) for name, entry in factors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                "NOT_FINITE", f"tensor {name} holds NaN or infinity: the training diverged"
            )
    modules = {
        prefix + module: Factors(
            a=stored[factor_key(module, "A")].float(),
            b=stored[factor_key(module, "B")].float().T.contiguous().T,
            scaling=parsed.scaling(rank, alpha),
        )
        for module, (rank, alpha) in selected.items()
    }
    if not any(f.scaling != 0 and f.a.any() and f.b.any() for f in modules.values()):
        raise AdapterError(
            "ZERO_EFFECT",
            "every delta is zero (all of lora_A or lora_B, or alpha): the adapter was saved before "
            "it was trained, or its tensors were lost",
        )
    provenance, unreadable = _provenance(header.metadata)
    return Adapter(
        digest=adapter_digest(stored, parsed.effect),
        modules=modules,
        config=parsed.summary,
        nbytes=len(tensors),
        warnings=tuple(
            map(
                escaped,
                (
                    *keys.warnings,
                    *_put_in_front(prefix),
                    *parsed.warnings,
                    *_other_base(parsed.base_model_name_or_path, base),
                    *training_warnings(training, base),
                    *unreadable,
                ),
            )
        ),
        provenance=provenance,
    )


def files_digest(config: bytes, tensors: bytes) -> str:
    """Return the adapter digest of two files that were accepted before, without a base.

    Raises:
        AdapterError: They are no longer an adapter's files.
    """
    entries = {entry.name: entry for entry in _header(tensors).entries}
    factors = {name: entries[key] for name, key in read_keys(entries).factors.items()}
    for entry in factors.values():
        _check_dtype(entry)
    stored = {name: _decode(tensors, entry) for name, entry in factors.items()}
    return adapter_digest(stored, parse_config(config).effect)


def inner_adapter(folder: Path) -> Path | None:
    """Return the first folder just below `folder` that holds an adapter's config, if one does."""
    return next((path.parent for path in sorted(folder.glob(f"*/{CONFIG_NAME}"))), None)


def _missing_prefix(factors: Iterable[str], layout: Layout, base: BaseFacts | None) -> str:
    """Return what the modules' names lack if they are those of the model without its head."""
    modules = {module_of(name) for name in factors}
    if base is None or not base.backbone or not modules or modules & layout.keys():
        return ""
    prefix = f"{base.backbone}."
    return prefix if all(f"{prefix}{module}" in layout for module in modules) else ""


def _put_in_front(prefix: str) -> tuple[str, ...]:
    if not prefix:
        return ()
    return (f"trained on the model without its head; {prefix} is put in front",)


def _other_base(name: str | None, base: BaseFacts | None) -> tuple[str, ...]:
    if name is None or base is None or not base.differs_from(name):
        return ()
    return (
        f"its base_model_name_or_path is {name[:200]}, and this base is {base.name}: on another "
        "model than the one it was trained on it means nothing",
    )


def _provenance(metadata: Mapping[str, str]) -> tuple[Provenance | None, tuple[str, ...]]:
    """Return where the adapter was merged from, and a warning where that cannot be read."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None, ()
    try:
        return read_provenance(text), ()
    except ProvenanceError as error:
        return None, (
            f"{METADATA_KEY} of {TENSORS_NAME} cannot be read ({error}): what the adapter "
            "was merged from is not known",
        )


def _check_kind(folder: Path) -> None:
    """Refuse a folder that is known to be something else than PEFT's."""
    if not os.path.lexists(folder / TENSORS_NAME):
        if (folder / MLX_TENSORS_NAME).exists() and (folder / CONFIG_NAME).exists():
            raise AdapterError(
                "UNSUPPORTED_FEATURE",
                f"{folder}: an adapter of MLX ({MLX_TENSORS_NAME}): convert it with "
                "superpose-convert",
            )
        for path in sorted(folder.iterdir()):
            if path.suffix in _PICKLE_SUFFIXES and path.name.startswith("adapter_model"):
                raise _pickle(path.name)
    if not os.path.lexists(folder / CONFIG_NAME) and (inner := inner_adapter(folder)):
        raise AdapterError(
            "FILE_MISSING", f"{folder}: no {CONFIG_NAME}, but {inner} holds one: name that folder"
        )


def _check_content(name: str, data: bytes) -> None:
    if data.startswith(_GIT_LFS):
        raise AdapterError(
            "FILE_CORRUPT",
            f"{name} is a Git LFS pointer, not the file itself: run git lfs pull, or download it",
        )


def _pickle(name: str) -> AdapterError:
    return AdapterError(
        "PICKLE_REFUSED", f"{name}: pickle files are refused; save with safe_serialization=True"
    )


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        remedy = (
            "train a smaller rank, or start the server with a larger --max-adapter-mib"
            if name == TENSORS_NAME
            else "PEFT writes some KiB"
        )
        raise AdapterError(
            "TOO_LARGE", f"{name} is larger than the limit of {limit} bytes: {remedy}"
        )


def _resolve(path: Path, home: Path | None) -> Path:
    """Return `path` without links, if it is inside `home`."""
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise AdapterError(
            "FILE_MISSING",
            f"{path}: no such file: a PEFT folder holds {CONFIG_NAME} and {TENSORS_NAME}",
        ) from error
    except (OSError, RuntimeError) as error:  # a loop of links, no permission
        raise AdapterError("FILE_MISSING", f"{path}: cannot be reached ({error})") from error
    if home is not None and not resolved.is_relative_to(home):
        raise AdapterError("PATH_ESCAPE", f"{path}: leads outside {home}: copy the files into it")
    return resolved


def _read_file(path: Path, home: Path, limit: int) -> bytes:
    resolved = _resolve(path, home)
    try:
        descriptor = os.open(resolved, _READ)
    except OSError as error:
        raise AdapterError(
            "FILE_MISSING", f"{path}: cannot be opened ({error.strerror})"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError("FILE_CORRUPT", f"{path}: not a regular file: copy it again")
        _check_size(path.name, status.st_size, limit)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            # Memory for that, whatever the limit is; one byte more tells of a file that grows.
            data = file.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(data) > status.st_size:
        raise AdapterError("FILE_CORRUPT", f"{path}: grew while it was read: copy it again")
    return data


def _header(tensors: bytes) -> Header:
    try:
        return read_header(io.BytesIO(tensors), len(tensors), _MAX_HEADER_BYTES)
    except TensorFileError as error:
        if tensors.startswith(b"PK\x03\x04") or tensors[:1] == b"\x80":
            raise _pickle(TENSORS_NAME) from error
        raise AdapterError(
            "FILE_CORRUPT", f"{TENSORS_NAME} {error}: save or copy it again"
        ) from error


def _check_surplus(
    entries: Mapping[str, TensorEntry],
    selected: Iterable[str],
    layout: Layout,
    base: BaseFacts | None,
    prefix: str,
) -> None:
    expected = {factor_key(module, factor) for module in selected for factor in "AB"}
    surplus = sorted(set(entries) - expected)
    for name in surplus:
        module, lora, _ = name.removeprefix(PREFIX).partition(".lora_")
        owner = base.owner(prefix + module) if base and lora else None
        if base and owner is not None and owner not in layout:
            raise AdapterError(
                "TARGET_NOT_ADAPTABLE",
                f"tensor {name[:200]}: module {owner} ({base.modules[owner]}) is in this base, but "
                "cannot be adapted here: train without it in target_modules",
            )
    if surplus:
        named = ", ".join(entries[name].name[:200] for name in surplus[:3])
        mlx = any(name.endswith((".lora_a", ".lora_b")) for name in surplus)
        remedy = (
            "they are named as MLX's: convert its folder with superpose-convert"
            if mlx
            else "the delta would be incomplete; save with peft's save_pretrained for this base"
        )
        raise AdapterError(
            "TENSOR_SURPLUS",
            f"{len(surplus)} tensors that the config or the base has no use for ({named}): "
            f"{remedy}",
        )


def _check_missing(factors: Mapping[str, TensorEntry], selected: Iterable[str]) -> None:
    expected = {factor_key(module, factor) for module in selected for factor in "AB"}
    missing = sorted(expected - set(factors))
    if missing:
        raise AdapterError(
            "TENSOR_MISSING",
            f"{len(missing)} tensors are missing that target_modules call for "
            f"({', '.join(missing[:3])}): save with peft's save_pretrained for this base",
        )


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in _DTYPES:
        raise AdapterError(
            "DTYPE_UNSUPPORTED",
            f"tensor {entry.name} has dtype {entry.dtype}: save it as {', '.join(_DTYPES)}",
        )


def _check_module(
    module: str, rank: int, entries: Mapping[str, TensorEntry], layout: Layout, limits: Limits
) -> None:
    if rank > limits.max_rank:
        raise AdapterError(
            "RANK_TOO_HIGH",
            f"module {module} has rank {rank}: the limit is {limits.max_rank}; train a smaller "
            "rank, or start the server with a larger --max-rank",
        )
    size = layout[module]
    shapes = {"A": (rank, size.in_features), "B": (size.out_features, rank)}
    for factor, shape in shapes.items():
        entry = entries[factor_key(module, factor)]
        _check_dtype(entry)
        if entry.shape != shape:
            raise AdapterError(
                "SHAPE_MISMATCH",
                f"tensor {entry.name} has shape {entry.shape} where base and config call for "
                f"{shape}: was the adapter trained on another base?",
            )


def _decode(tensors: bytes, entry: TensorEntry) -> Tensor:
    """Return one tensor in the file's dtype, in memory of its own."""
    data = bytearray(memoryview(tensors)[entry.start : entry.start + entry.nbytes])
    return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)
