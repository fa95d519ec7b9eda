"""What a base model offers to adapters: its Conv1D and Linear modules and their shapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ModuleLayout:
    """Shape of one adaptable module.

    Attributes:
        in_features: Width of the module's input.
        out_features: Width of the module's output.
        transposed: True for GPT-2's Conv1D, which stores its parameter as (in, out); False for
            nn.Linear, which stores (out, in).
        tied: True if another module shares the parameter (`lm_head` with the embedding).
    """

    in_features: int
    out_features: int
    transposed: bool
    tied: bool = False

    def delta(self, product: Tensor) -> Tensor:
        """Return B @ A, (out, in), in the layout of the parameter."""
        return product.T if self.transposed else product


Layout = dict[str, ModuleLayout]


def read_layout(model: nn.Module) -> Layout:
    """Return {module name: layout} of every Conv1D and nn.Linear of a transformers model."""
    from transformers.pytorch_utils import Conv1D

    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layout: Layout = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            layout[name] = ModuleLayout(rows, columns, True, owners[id(module.weight)] > 1)
        elif isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            layout[name] = ModuleLayout(columns, rows, False, owners[id(module.weight)] > 1)
    return layout
