"""What a run leaves behind: a PEFT folder with training.json, there whole or not at all."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from superpose_adapters.durable import naming, new_folder
from superpose_train.data import Rows
from superpose_train.loss import Figures
from superpose_train.options import Options
from superpose_train.precision import trained_precision
from superpose_train.processes import process_count

_RECORD = "training.json"


def identity_of(
    options: Options,
    base_digest: str,
    rows: Rows,
    targets: list[str],
    past: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return what tells a run from others, as the record has it: base, data, parameters, past.

    `past` are the domains and digests of the adapters that are active while this one is trained.
    """
    return {
        "base_digest": base_digest,
        "data": rows.files,
        "special_tokens": rows.special_tokens,
        "orthogonal_to": list(past),
        "parameters": options.parameters(targets),
    }


def record_of(
    options: Options,
    identity: dict[str, Any],
    *,
    trained_parameters: int,
    steps: int,
    best_step: int,
    base_figures: Figures,
    adapter_figures: Figures,
    training: list[list[float]],
    validation: list[list[float]],
    resumed: bool,
    began: float,
    **more: Any,
) -> dict[str, Any]:
    """Return what training.json says of a run.

    Args:
        options: What was asked for.
        identity: See `identity_of`.
        trained_parameters: How many.
        steps: Taken.
        best_step: Whose adapter is the result.
        base_figures: Losses of the base alone.
        adapter_figures: Losses with the adapter, and with the past ones beside it if there are any.
        training: (step, mean loss since the entry before).
        validation: (step, loss).
        resumed: It was taken up again.
        began: `time.monotonic()` at its beginning.
        more: What only this way of training has.
    """
    return {
        "name": options.name,
        "base": options.shown_base,
        **identity,
        "trained_parameters": trained_parameters,
        "steps": steps,
        "best_step": best_step,
        "base_figures": base_figures,
        "adapter_figures": adapter_figures,
        "history": {"training": training, "validation": validation},
        "device": options.torch_device,
        "processes": process_count(),
        "precision_asked": options.precision,
        "resumed": resumed,
        **more,
        "wall_seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
    }


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

    with new_folder(out) as folder, writing(out):
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
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


# How torch.save says that it cannot write.
_TORCH_WRITER = re.compile("PytorchStreamWriter|file write failed|unexpected pos|iostream error")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise OSError that names `path` where a write fails.

    On a full disk safetensors raises an exception of its own, torch.save a RuntimeError. What else
    goes wrong passes as it is.
    """
    try:
        with naming(path):
            yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_WRITER.search(str(error)):
            raise
        first_line = str(error).strip().partition("\n")[0]
        raise OSError(f"{path}: cannot be written; is the disk full? ({first_line})") from error


def read_record(folder: Path) -> dict[str, Any]:
    """Return what training.json in an adapter's folder says."""
    record: dict[str, Any] = json.loads((folder / _RECORD).read_text("utf-8"))
    return record


def finished_record(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return training.json of a run that is done, None where nothing is.

    Args:
        out: The run's folder.
        identity: Of the run, see `identity_of`.

    Raises:
        ValueError: something else is there.
    """
    if not out.exists():
        return None
    try:
        record = read_record(out)
        _complete(record, identity["parameters"])
        if {name: record[name] for name in identity} == identity:
            return record
    except (OSError, ValueError, KeyError):
        pass
    raise ValueError(
        f"{out} exists and is not the result of this run; name another --out or delete it"
    )


def _complete(record: dict[str, Any], fields: Iterable[str]) -> None:
    """Give the record of an earlier version what it would say today of these parameters."""
    parameters = record["parameters"]
    parameters.setdefault("precision", trained_precision(record))
    if "frozen_a_block" in parameters:
        parameters["frozen_a"] = parameters.pop("frozen_a_block")
    for field in fields:
        parameters.setdefault(field, getattr(Options, field, None))
    # Rows did not begin as the base's tokenizer begins a text.
    record.setdefault("special_tokens", [])
    record.setdefault("orthogonal_to", [])
