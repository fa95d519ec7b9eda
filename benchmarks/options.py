"""The command line that every benchmark has."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told; see `--help`."""

    model: str
    dtype: str
    device: str
    compile: str | None
    seconds: float
    json: bool
    out: Path
    cache: Path
    label: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return _DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device, with `auto` decided."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def settings(self, **more: object) -> dict[str, object]:
        """Return what a report states about the run, plain values only."""
        return {
            "model": self.label_of_model,
            "dtype": self.dtype,
            "device": self.torch_device.type,
            "compile": self.compile or "server's default",
            "seconds": self.seconds,
            **more,
        }

    @property
    def label_of_model(self) -> str:
        """The model's name without the folders above it."""
        return Path(self.model).name

    def server_fields(self) -> dict[str, Any]:
        """Return the fields of `ServerConfig` that these options set."""
        fields: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if self.compile is not None:
            fields["compile"] = self.compile
        return fields

    def server_flags(self) -> list[str]:
        """Return the same as flags of `superpose-server`."""
        return [f"--{name}={value}" for name, value in self.server_fields().items()]


def make_parser(name: str, description: str, *, seconds: float) -> argparse.ArgumentParser:
    """Return a parser of the common options, to which a benchmark may add its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="small",
        help="tiny, small, medium or large (random weights in GPT-2's shapes), or a base as "
        "superpose-server takes it",
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(_DTYPES))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--compile", choices=("auto", "off"), help="as superpose-server's; without it its default"
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="budget of the measurement")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="where reports are written"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=_default_cache(),
        help="where generated models and adapters are kept",
    )
    parser.add_argument("--label", help="end of the reports' names; without it MODEL-DTYPE-DEVICE")
    return parser


def read_options(arguments: argparse.Namespace) -> Options:
    """Return the common options of a parsed command line."""
    names = ("model", "dtype", "device", "compile", "seconds", "json", "out", "cache")
    options = Options(**{name: getattr(arguments, name) for name in names}, label="")
    label = arguments.label or "-".join(
        (options.label_of_model, options.dtype, options.torch_device.type)
    )
    return Options(**{**vars(options), "label": label})


def numbers(text: str) -> list[int]:
    """Read a list such as 1,8,64."""
    return [int(part) for part in text.split(",")]


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "superpose-benchmarks"
