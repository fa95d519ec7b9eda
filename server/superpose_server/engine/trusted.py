"""Kinds of base that passed the check of meaning on this machine, so that it runs once for each.

A kind is all that the outcome depends on: class, configuration, how it is run, and the code that
runs it, ours and that of torch and transformers. Only what passed is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import superpose_adapters
import superpose_server
from superpose_adapters.cache_folder import cache_folder
from superpose_adapters.digest import canonical_json
from superpose_server.model.kernels.family import families

# What a configuration says of files, not of the model.
_NAMES = {"_name_or_path", "transformers_version", "architectures", "dtype"}

_log = logging.getLogger(__name__)


class Kind:
    """What a base is, as far as the check of its meaning goes."""

    def __init__(
        self, model_class: type[nn.Module], config: Any, device: torch.device, *, kernels: bool
    ) -> None:
        """Take what `check_meaning` takes."""
        fields = {k: v for k, v in config.to_dict().items() if k not in _NAMES}
        made_from = [
            *(model_class.__module__, model_class.__qualname__),
            *(device.type, torch.backends.cpu.get_cpu_capability()),
            families()[0].name if kernels and device.type == "cpu" else kernels,
            *(version(name) for name in ("torch", "transformers")),
            _our_code(),
        ]
        self.digest = sha256(
            canonical_json(made_from) + repr(sorted(fields.items())).encode()
        ).hexdigest()

    @property
    def trusted(self) -> bool:
        """True if it passed."""
        try:
            return self._path().exists()
        except (OSError, RuntimeError):
            return False

    def trust(self) -> None:
        """Note that it passed; without a place for notes it is checked again at each start."""
        try:
            self._path().parent.mkdir(parents=True, exist_ok=True)
            self._path().touch()
        except (OSError, RuntimeError) as error:
            _log.info("the outcome of the self-check is not kept: %s", error)

    def _path(self) -> Path:
        return cache_folder() / "trusted" / self.digest


@cache
def _our_code() -> str:
    """Return a digest of the source that a pass runs through."""
    state = sha256()
    for path in sorted(_sources()):
        state.update(path.read_bytes())
    return state.hexdigest()


def _sources() -> Iterator[Path]:
    for package in (superpose_server, superpose_adapters):
        for folder in package.__path__:
            for pattern in ("*.py", "*.cpp", "*.h"):
                yield from Path(folder).rglob(pattern)
