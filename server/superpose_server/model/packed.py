"""A linear layer whose parameter lies in panels, as the CPU kernels read it.

Panel p of the parameter holds output features 16p..16p+15 of every input feature, so that a product
streams through memory whatever the checkpoint's layout. Within it 4 bytes of an output feature lie
side by side, which is one input feature of float32 or two of bfloat16: (panels, in / side, 16,
side). The layout is a matter of the dtype alone, not of the processor. The packed parameter is the
only copy: folds write it, and an embedding that is tied to it reads it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from superpose_adapters.layout import Layout
from superpose_server.model.memory import lasting_zeros

PANEL = 16
# Input features of bfloat16 that instructions for it take at a time: a panel is filled up to them.
_TOGETHER = 32
# Numbers of one module's term; see `Term` in kernels/corrections.h.
TERM_FIELDS = 9


class PackedLinear(nn.Module):
    """x (..., in) to (..., out), in place of a Conv1D or nn.Linear."""

    term: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, out_features: int, term: Tensor | None = None
    ) -> None:
        """Take a packed weight (see `pack`), a bias (out,) and a place for the term."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features = out_features
        # The correction of the batch that runs; see `KernelCorrection`. All zeros: none.
        term = torch.zeros(TERM_FIELDS, dtype=torch.int64) if term is None else term
        self.register_buffer("term", term, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + bias + correction in x's dtype.

        Sums are float32, in an order that no batch changes.
        """
        result = torch.ops.superpose.linear(x, self.weight, self.bias, self.out_features, self.term)
        return cast(Tensor, result)


class PackedEmbedding(nn.Module):
    """Tokens (...) to (..., in): rows of the parameter that a tied head keeps in panels."""

    def __init__(self, weight: nn.Parameter, in_features: int) -> None:
        """Share a packed weight."""
        super().__init__()
        self.weight = weight
        self.in_features = in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Return the row of each token."""
        return cast(Tensor, torch.ops.superpose.embed(ids, self.weight, self.in_features))


def packed_depth(inputs: int, dtype: torch.dtype) -> int:
    """Return how many input features a panel holds, those included that fill it up with zeros."""
    return inputs if dtype.itemsize == 4 else -(-inputs // _TOGETHER) * _TOGETHER


def pack(parameter: Tensor, *, transposed: bool) -> Tensor:
    """Return a parameter, float32 or bfloat16, in panels.

    Args:
        parameter: (in, out) if `transposed`, else (out, in).
        transposed: See `parameter`.

    Returns:
        (panels, in / side, 16, side), with 4 / side bytes a number; in and out are filled up with
        zeros.
    """
    matrix = parameter if transposed else parameter.T  # (in, out)
    inputs, outputs = matrix.shape
    side = 4 // parameter.dtype.itemsize
    depth = packed_depth(inputs, parameter.dtype)
    panels, whole = -(-outputs // PANEL), outputs // PANEL
    packed = lasting_zeros((panels, depth // side, PANEL, side), parameter.dtype, parameter.device)
    for place in range(side):
        rows = matrix[place::side]
        to = packed[:, : len(rows), :, place].transpose(0, 1)  # (in / side, panels, 16)
        to[:, :whole] = rows[:, : whole * PANEL].view(len(rows), whole, PANEL)
        if whole < panels:
            to[:, whole, : outputs - whole * PANEL] = rows[:, whole * PANEL :]
    return packed


def unpack(packed: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return a parameter in panels as (in, out), in memory of its own: `pack` undone."""
    return packed.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:inputs, :outputs]


@torch.no_grad()
def pack_modules(module: nn.Module, layout: Layout) -> Tensor:
    """Replace every module of `layout` by a PackedLinear, one after the other to save memory.

    Embeddings that share the parameter of a tied head read the packed one from then on. One that
    does more than look up keeps its own.

    Returns:
        The terms of all of them in their order, int64 (modules, TERM_FIELDS): side by side, so that
        one copy corrects the next pass.
    """
    terms = torch.zeros(len(layout), TERM_FIELDS, dtype=torch.int64)
    for (name, shape), term in zip(layout.items(), terms, strict=True):
        old = module.get_submodule(name)
        weight = pack(cast(Tensor, old.weight), transposed=shape.transposed)
        bias = cast("Tensor | None", getattr(old, "bias", None))
        new = PackedLinear(weight, bias, shape.out_features, term)
        module.set_submodule(name, new)
        for other in _lookups(module, old) if shape.tied else ():
            module.set_submodule(other, PackedEmbedding(new.weight, shape.in_features))
    return terms


def _lookups(module: nn.Module, tied: nn.Module) -> list[str]:
    """Return the names of plain embeddings whose parameter is that of `tied`."""
    return [
        name
        for name, other in module.named_modules()
        if type(other) is nn.Embedding and other.weight is tied.weight and other.max_norm is None
    ]
