"""PEFT's names of an adapter's factors, as its files have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]
"""{module of the base: (A, B)}."""

_PREFIX = "base_model.model."
_A, _B = ".lora_A.", ".lora_B."


def module_of_a(name: str) -> str | None:
    """Return the module whose A factor has this name, in a file or in a model; else None."""
    module, found, _ = name.removeprefix(_PREFIX).partition(_A)
    return module if found else None


def to_peft(factors: Factors) -> dict[str, Tensor]:
    """Return the factors under PEFT's names."""
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{_PREFIX}{module}{_A}weight"] = a
        tensors[f"{_PREFIX}{module}{_B}weight"] = b
    return tensors


def from_peft(tensors: Mapping[str, Tensor]) -> Factors:
    """Return what `to_peft` was given."""
    return {
        module: (a, tensors[name.replace(_A, _B)])
        for name, a in tensors.items()
        if (module := module_of_a(name)) is not None
    }


def factors_of(adapted: nn.Module) -> Factors:
    """Return the factors of a PEFT model with one adapter: the parameters themselves."""
    return from_peft(dict(adapted.named_parameters()))
