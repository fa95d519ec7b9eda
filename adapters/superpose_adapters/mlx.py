"""Adapters of Apple's MLX (mlx-lm): what they mean, and the same in PEFT's form.

mlx-lm adds scale * (x @ lora_a) @ lora_b to a module's output, with lora_a (in, r) and lora_b
(r, out) (`LoRALinear` in mlx_lm/tuner/lora.py). PEFT adds alpha / r * (x @ lora_A.T) @ lora_B.T. So
lora_A is lora_a transposed, lora_B is lora_b transposed, and alpha is scale * r.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import load
from torch import Tensor

from superpose_adapters.peft.folder import CONFIG_NAME, MLX_TENSORS_NAME
from superpose_adapters.peft.writing import adapter_files, write_adapter
from superpose_adapters.tensorfile import TensorFileError, read_header

_FACTOR = re.compile(r"(.+)\.lora_([ab])")
_DTYPES = ("F32", "F16", "BF16")
# mlx-lm adapts embeddings too, by tensors of the same names.
_EMBEDDING = re.compile(r"(^|\.)(wte|[^.]*embed[^.]*)$")


class MlxError(ValueError):
    """A folder that is no adapter of MLX that can be converted; one line says why."""


@dataclass(frozen=True)
class MlxAdapter:
    """An adapter as MLX keeps it.

    Attributes:
        base: The model that it was trained on, as its config names it.
        rank: r of every module.
        scale: Factor of the deltas.
        factors: {module: (lora_a, (in, r); lora_b, (r, out))}, sorted by name.
    """

    base: str | None
    rank: int
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_mlx(folder: Path, scale: float | None = None) -> MlxAdapter:
    """Read adapters.safetensors and adapter_config.json, as mlx-lm writes them.

    Args:
        folder: Holds both.
        scale: Factor of the deltas, in place of what the config says.

    Raises:
        MlxError: A file is missing or damaged, or the adapter is more than LoRA on linear layers.
    """
    config = _read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora" or config.get("use_dora"):
        what = "dora" if config.get("use_dora") else kind
        _refuse(folder, f"fine_tune_type is {what!r}: only lora can be converted")
    if config.get("peft_type") is not None and not (folder / MLX_TENSORS_NAME).exists():
        _refuse(folder, "is an adapter of PEFT already: use it as it is")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        _refuse(folder, f"{CONFIG_NAME} has no lora_parameters: is it an adapter of mlx-lm?")
    factors = _factors(folder, _read_tensors(folder))
    (rank,) = {a.shape[1] for a, _ in factors.values()}
    if parameters.get("rank", rank) != rank:
        _refuse(
            folder,
            f"{CONFIG_NAME} says rank {parameters['rank']}, and the tensors have rank {rank}: the "
            "two files are not of one adapter",
        )
    base = config.get("model", config.get("base_model_name_or_path"))
    return MlxAdapter(
        base=base if isinstance(base, str) else None,
        rank=rank,
        scale=_scale(folder, parameters, rank) if scale is None else scale,
        factors=factors,
    )


def write_peft(adapter: MlxAdapter, folder: Path, *, replace: bool = False) -> None:
    """Write an adapter in PEFT's form; see `write_adapter`, which this is."""
    factors = {module: (a.T, b.T) for module, (a, b) in adapter.factors.items()}
    files = adapter_files(factors, base=adapter.base, scaling=adapter.scale)
    write_adapter(folder, *files, replace=replace)


def _refuse(folder: Path, reason: str) -> NoReturn:
    raise MlxError(f"{folder}: {reason}")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        _refuse(folder, f"not a folder: name the one that holds {MLX_TENSORS_NAME}")
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        _refuse(folder, f"no {CONFIG_NAME}: name the folder that mlx_lm.lora wrote")
    except (ValueError, RecursionError):
        _refuse(folder, f"{CONFIG_NAME} is not JSON: copy it again")
    if not isinstance(config, dict):
        _refuse(folder, f"{CONFIG_NAME} is not a JSON object: copy it again")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        data = (folder / MLX_TENSORS_NAME).read_bytes()
    except FileNotFoundError:
        old = (folder / "adapters.npz").exists()
        _refuse(
            folder,
            f"no {MLX_TENSORS_NAME}"
            + (", but adapters.npz: save it again with a newer mlx-lm" if old else ""),
        )
    try:
        entries = read_header(io.BytesIO(data), len(data)).entries
    except TensorFileError as error:
        _refuse(folder, f"{MLX_TENSORS_NAME} {error}: save or copy it again")
    for entry in entries:
        if entry.dtype not in _DTYPES:
            _refuse(folder, f"tensor {entry.name[:200]} has dtype {entry.dtype}: it is quantised")
    tensors: dict[str, Tensor] = load(data)
    return tensors


def _factors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the factors, and refuse everything that is none."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            _refuse(
                folder,
                f"tensor {name[:200]} is no factor of LoRA: only lora can be converted, no DoRA "
                "and no parameters that were trained whole",
            )
        if _EMBEDDING.search(match[1]):
            _refuse(folder, f"tensor {name[:200]} adapts an embedding, which is not served")
        if tensor.dim() != 2:
            _refuse(
                folder,
                f"tensor {name[:200]} has {tensor.dim()} dimensions: adapters of experts "
                "(SwitchLinear) are not served",
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        _refuse(folder, f"{MLX_TENSORS_NAME} holds no tensor")
    pairs = {}
    for module, both in sorted(found.items()):
        if len(both) < 2:
            missing = "b" if "a" in both else "a"
            _refuse(folder, f"tensor {module[:200]}.lora_{missing} is missing: copy it again")
        if both["a"].shape[1] != both["b"].shape[0]:
            _refuse(
                folder,
                f"{module[:200]}: lora_a is {tuple(both['a'].shape)} and lora_b "
                f"{tuple(both['b'].shape)}, which is no (in, r) and (r, out)",
            )
        pairs[module] = (both["a"], both["b"])
    ranks = sorted({a.shape[1] for a, _ in pairs.values()})
    if len(ranks) > 1:
        _refuse(folder, f"modules have ranks {ranks}, and mlx-lm gives all the same")
    return pairs


def _scale(folder: Path, parameters: Mapping[str, Any], rank: int) -> float:
    scale: Any = parameters.get("scale")
    if type(scale) not in (int, float) or not math.isfinite(scale):
        _refuse(folder, f"lora_parameters has no scale that is a number ({scale!r}): pass --scale")
    alpha = parameters.get("alpha", rank)
    if alpha != rank:
        # The config does not tell which version trained it.
        old = f"{scale} * {alpha} / {rank}"
        _refuse(
            folder,
            f"lora_parameters has an alpha, {alpha}, by which old versions of mlx-lm multiply "
            f"({old}) and new ones do not ({scale}): pass the factor that is meant as --scale",
        )
    return float(scale)
