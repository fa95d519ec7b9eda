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
        head: True for the output embedding, which PEFT's `all-linear` leaves out.
    """

    in_features: int
    out_features: int
    transposed: bool
    tied: bool = False
    head: bool = False

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
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    layout: Layout = {}
    for name, module in model.named_modules():
        transposed = isinstance(module, Conv1D)
        if not transposed and not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        layout[name] = ModuleLayout(
            in_features=rows if transposed else columns,
            out_features=columns if transposed else rows,
            transposed=transposed,
            tied=owners[id(module.weight)] > 1,
            head=module is head,
        )
    return layout
