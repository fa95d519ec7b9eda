"""What a base is besides its adaptable modules, as far as a reader of adapters has to know it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from superpose_adapters.base.folder import find_tensors
from superpose_adapters.tensorfile import TensorEntry

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(?:/[\w.-]+)?", re.ASCII)
# A folder of the Hub's cache: .../models--owner--name/snapshots/...
_CACHED = re.compile(r"(?:^|[/\\])models--(?:[^/\\]+?--)?([^/\\]+)")


@dataclass(frozen=True)
class BaseFacts:
    """A base as it was before anything of it was replaced, packed or folded.

    Attributes:
        name: As a user named it.
        folder: Of the checkpoint.
        backbone: Name of the module that is the model without its head, such as `model`; empty if
            there is none.
        modules: {module that holds parameters itself: its class}.
        parameters: {parameter: all its names, which are several where it is tied}.
        special_tokens: What its tokenizer puts before every text.
    """

    name: str
    folder: Path
    backbone: str
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]]
    special_tokens: tuple[str, ...] = ()

    def owner(self, name: str) -> str | None:
        """Return the module that is `name`, or the nearest around it that holds parameters."""
        while name not in self.modules:
            name, dot, _ = name.rpartition(".")
            if not dot:
                return None
        return name

    def differs_from(self, name: str) -> bool:
        """Tell whether a base that somebody else called `name` clearly is another one.

        Only the last part of a Hub id, or of a folder of the Hub's cache, is a model's name; any
        other path may hold anything.
        """
        theirs = _model_name(name, folders=False)
        ours = {_model_name(self.name, folders=True), self.folder.name.lower()}
        return theirs is not None and theirs not in ours

    def stored(self, parameter: str) -> list[StoredParameter]:
        """Return a parameter as the checkpoint holds it: several times if it is tied, or never.

        Raises:
            CheckpointError: The checkpoint is no longer whole.
        """
        names = self.parameters[parameter]
        prefix = f"{self.backbone}."
        also = {name.removeprefix(prefix) for name in names}
        return [StoredParameter(*found) for found in find_tensors(self.folder, {*names, *also})]


@dataclass(frozen=True)
class StoredParameter:
    """One parameter in a checkpoint's file."""

    path: Path
    entry: TensorEntry

    def pieces(self, numbers: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield it flat, `numbers` at a time, as it is stored: in `dtype`.

        Raises:
            OSError: The file cannot be read.
        """
        step, left = numbers * dtype.itemsize, self.entry.nbytes
        with self.path.open("rb") as file:
            file.seek(self.entry.start)
            while left:
                data = bytearray(file.read(min(step, left)))
                if not data:
                    raise OSError(f"{self.path}: became shorter while it was read")
                left -= len(data)
                yield torch.frombuffer(data, dtype=dtype)


def read_facts(
    name: str, folder: Path, model: nn.Module, special_tokens: Iterable[str] = ()
) -> BaseFacts:
    """Return the facts of a model of transformers, just loaded from `folder` as the base `name`."""
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    backbone = str(getattr(model, "base_model_prefix", ""))
    return BaseFacts(
        name=name,
        folder=folder,
        backbone=backbone if isinstance(getattr(model, backbone or "_", None), nn.Module) else "",
        modules={
            module_name: type(module).__name__
            for module_name, module in model.named_modules()
            if module_name and next(module.parameters(recurse=False), None) is not None
        },
        parameters={one: tuple(all_) for all_ in names.values() for one in all_},
        special_tokens=tuple(special_tokens),
    )


def _model_name(name: str, *, folders: bool) -> str | None:
    """Return the part of a base's name that is a model's, in lower case; None: it has none."""
    if cached := _CACHED.search(name):
        return cached[1].lower()
    if folders or _HUB_ID.fullmatch(name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    return None
