"""What a run leaves behind: a PEFT folder with training.json, there whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from superpose_train.precision import trained_precision


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
    }


def write_adapter(
    tensors: dict[str, Tensor],
    config: LoraConfig,
    label: str,
    record: dict[str, Any],
    out: Path,
) -> None:
    """Write the PEFT folder and its record.

    Args:
        tensors: Factors under PEFT's own names.
        config: PEFT's; it is changed to say what is written.
        label: What the config calls the base.
        record: For training.json.
        out: The folder; nothing may be there.

    Raises:
        OSError: It could not be written; nothing is left.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def fill(folder: Path) -> None:
        save_file(on_host, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.base_model_name_or_path = label
        config.inference_mode = True
        config.save_pretrained(folder)
        path = folder / "adapter_config.json"
        fields = json.loads(path.read_text("utf-8"))
        # PEFT keeps the names in a set, whose order changes from process to process.
        fields["target_modules"] = sorted(fields["target_modules"])
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
        for file in folder.iterdir():
            # safetensors makes its file readable to the owner alone.
            file.chmod(0o644)
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")

    write_folder(out, fill)


# How torch.save says that it cannot write.
_TORCH_WRITER = re.compile("PytorchStreamWriter|file write failed|unexpected pos|iostream error")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OSError that names `path` where a write fails.

    A write to a full disk raises an OSError that names no file, in safetensors an exception of its
    own, in torch.save a RuntimeError. What else goes wrong passes as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITER.search(str(error)):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise OSError(f"{path}: cannot be written; is the disk full? ({first_line})") from error


def write_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside `out`, then rename it into place; a failure leaves nothing."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        with writing(out):
            fill(temporary)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file beside `path`, then rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            temporary.write_text(text, "utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finished_record(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return training.json of a run that is done, None where nothing is.

    Args:
        out: The run's folder.
        identity: Base, data and parameters, as the record states them.

    Raises:
        ValueError: something else is there.
    """
    if not out.exists():
        return None
    try:
        record = json.loads((out / "training.json").read_text("utf-8"))
        # Of a record from before --precision.
        record["parameters"].setdefault("precision", trained_precision(record))
    except (OSError, ValueError, KeyError):
        record = {}
    if {name: record.get(name) for name in identity} != identity:
        raise ValueError(
            f"{out} exists and is not the result of this run; name another --out or delete it"
        )
    return dict(record)
