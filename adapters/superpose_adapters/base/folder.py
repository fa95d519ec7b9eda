"""What lies in a checkpoint's folder: config.json and safetensors files, read and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from superpose_adapters.digest import checkpoint_files
from superpose_adapters.one_line import with_kind
from superpose_adapters.tensorfile import TensorEntry, TensorFileError, read_header

# What transformers' own format for several hosts is called, which it loads before anything else.
_DISTRIBUTED = "shard-*-model-*-of-*.safetensors"
# What torch.compile and DataParallel put before every name.
WRAPPERS = r"^(?:(?:_orig_mod|module)\.)+"


class CheckpointError(ValueError):
    """A folder that is no whole, unquantised checkpoint of a causal language model."""


def refuse(folder: Path, reason: str, error: Exception | None = None) -> NoReturn:
    """Raise the one line that says why `folder` is not served, and from what."""
    raise CheckpointError(f"base {folder} {reason}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder that is a base and nothing besides.

    Raises:
        CheckpointError: It is not.
    """
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        refuse(
            folder,
            "is an adapter and no base (adapter_config.json, no config.json): name the base that "
            "it was trained on, and pass the adapter by --adapter-dir or adapterctl push"
            if adapter
            else "has no config.json: name a folder written by transformers' save_pretrained",
        )
    if adapter:
        refuse(
            folder,
            "holds an adapter beside the base (adapter_config.json): move the adapter's files "
            "into a folder of their own, and pass it by --adapter-dir or adapterctl push",
        )
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        refuse(folder, f"has a config.json that cannot be read: {error.strerror}", error)
    except (ValueError, RecursionError) as error:
        said = with_kind(error)
        refuse(folder, f"has a config.json that is not JSON ({said}): copy it again", error)
    if not isinstance(settings, dict):
        refuse(folder, "has a config.json that is no JSON object: copy it again")
    return settings


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the parameters.

    Raises:
        CheckpointError: There is none, or one is missing.
    """
    if any(folder.glob(_DISTRIBUTED)):
        refuse(
            folder,
            f"holds a distributed checkpoint ({_DISTRIBUTED}): save the model with save_pretrained "
            "into another folder",
        )
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").is_file() and not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin") if "model" in p.name)
        found = f" but {pickled[0]}" if pickled else ""
        refuse(
            folder,
            f"has no model.safetensors{found}: load it with transformers and convert it with "
            "save_pretrained(folder), which writes one",
        )
    try:
        paths = checkpoint_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(
            folder,
            f"has a {index.name} that is no index of shards ({with_kind(error)}): copy it again",
            error,
        )
    for path in paths:
        if not path.is_file():
            refuse(folder, f"lacks {path.name}, which {index.name} names: copy that file too")
    return paths


def find_tensors(folder: Path, names: Collection[str]) -> list[tuple[Path, TensorEntry]]:
    """Return file and place of every tensor that has one of `names`, wrappers' prefixes taken off.

    Raises:
        CheckpointError: The folder is no whole checkpoint.
    """
    return [
        (path, entry)
        for path in weight_files(folder)
        for entry in read_headers(folder, [path]).values()
        if re.sub(WRAPPERS, "", entry.name) in names
    ]


def read_headers(folder: Path, paths: Sequence[Path]) -> dict[str, TensorEntry]:
    """Return {name: entry} of every tensor in the files.

    Raises:
        CheckpointError: A file is damaged, or a tensor is stored twice.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                header = read_header(file, path.stat().st_size)
        except OSError as error:
            refuse(folder, f"has a {path.name} that cannot be read: {error.strerror}", error)
        except TensorFileError as error:
            refuse(folder, f"has a damaged {path.name}, which {error}: copy it again", error)
        for entry in header.entries:
            if entry.name in entries:
                refuse(
                    folder,
                    f"stores {entry.name} in {path.name} and in another file: keep one of the two",
                )
            entries[entry.name] = entry
    return entries
