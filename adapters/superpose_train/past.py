"""Adapters that were trained before, whose deltas are active and frozen while another is trained.

They are folded into the base at weight 1, as a server folds them. So a training step costs no more,
what is measured is the sum, and in bfloat16 a step sees of their deltas what a fold in bfloat16
keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.fold import concatenate_factors, fold_into
from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, files_digest, read_adapter
from superpose_train.processes import is_main_process
from superpose_train.record import read_record


def check_past(folders: Sequence[Path]) -> None:
    """Refuse folders that hold no adapter, before a base is loaded, which may take minutes.

    Raises:
        ValueError: naming the folder.
    """
    for folder in folders:
        for name in (CONFIG_NAME, TENSORS_NAME):
            if not (folder / name).is_file():
                raise ValueError(f"--orthogonal-to {folder}: no {name} there; name a PEFT folder")


def named(folders: Sequence[Path]) -> list[dict[str, str]]:
    """Return the domains and digests of the adapters in PEFT folders, as the record has them.

    Raises:
        ValueError: they are no adapters.
        OSError: they cannot be read.
    """
    return [
        {
            "domain": folder.name,
            "digest": files_digest(
                (folder / CONFIG_NAME).read_bytes(), (folder / TENSORS_NAME).read_bytes()
            ),
        }
        for folder in folders
    ]


class Past:
    """Past adapters on one base; there may be none."""

    def __init__(self, adapters: Mapping[str, Adapter], model: Any) -> None:
        """Take {domain: adapter} and the bare base in float32, which `fold` alone changes."""
        self.named = [
            {"domain": domain, "digest": adapter.digest} for domain, adapter in adapters.items()
        ]
        # The order in which a server folds.
        ordered = sorted(adapters.values(), key=lambda adapter: adapter.digest)
        self._weights = dict.fromkeys(ordered, 1.0)
        self._layout = read_layout(model)
        # The parameters themselves: their memory is another one when the model moves to a GPU.
        self._parameters: dict[str, nn.Parameter] = {
            module: model.get_submodule(module).weight
            for module in sorted({module for adapter in ordered for module in adapter.modules})
        }
        self._base: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self._weights)

    def a_factors(self) -> dict[str, Tensor]:
        """Return {module: A's of all, stacked, (R, in)}."""
        return {
            module: torch.cat([p.modules[module].a for p in self._weights if module in p.modules])
            for module in self._parameters
        }

    def fold(self) -> None:
        """Add the deltas to the base."""
        self._base = self._copies()
        for module, parameter in self._parameters.items():
            factors = concatenate_factors(self._weights, module)
            assert factors is not None
            fold_into(parameter.detach(), self._base[module], *factors, self._layout[module])

    @contextmanager
    def absent(self) -> Iterator[None]:
        """Put the base back, bit for bit, for a while."""
        folded = self._copies()
        self._write(self._base)
        try:
            yield
        finally:
            self._write(folded)

    def _copies(self) -> dict[str, Tensor]:
        return {module: p.detach().clone() for module, p in self._parameters.items()}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for module, parameter in self._parameters.items():
            parameter.copy_(values[module])


def read_past(folders: Sequence[Path], model: Any, facts: BaseFacts, base_digest: str) -> Past:
    """Read the adapters in PEFT folders; what a server would warn of goes to stderr.

    Args:
        folders: Each called as the domain.
        model: The bare base in float32.
        facts: What else is known of it.
        base_digest: Of its checkpoint.

    Raises:
        ValueError: one is refused, is another base's, or is there twice.
    """
    adapters: dict[str, Adapter] = {}
    layout = read_layout(model)
    for folder in folders:
        try:
            adapter = read_adapter(folder, layout, base=facts)
        except AdapterError as error:
            raise ValueError(f"--orthogonal-to {folder}: {error}") from error
        if _trained_on(folder) not in (None, base_digest):
            raise ValueError(
                f"--orthogonal-to {folder}: its training.json says that it was trained on another "
                "base; name adapters of this --base"
            )
        for domain, other in adapters.items():
            if other == adapter:
                raise ValueError(
                    f"--orthogonal-to {folder}: the same adapter as {domain}; name each once"
                )
        adapters[folder.name] = adapter
        if is_main_process():
            for warning in adapter.warnings:
                print(f"superpose-train: {folder}: {warning}", file=sys.stderr)
    return Past(adapters, model)


def _trained_on(folder: Path) -> object:
    """Return the digest of the base in the record of an adapter; None: there is no record of ours.

    The record may be another trainer's, and then hold anything.
    """
    try:
        record: object = read_record(folder)
    except (OSError, ValueError):
        return None
    return record.get("base_digest") if isinstance(record, dict) else None
