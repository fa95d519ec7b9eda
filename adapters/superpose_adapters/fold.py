"""Fold arithmetic: base + sum of weighted deltas, in one pass over concatenated factors.

Elsewhere this is called merging adapters into the weights.

A sum of adapters is a sum of *deltas*: factors are concatenated, A's and B's never added apart.
Factors and accumulation are float32 whatever the parameter's dtype, with one rounding at the end.
The result depends on the base, the factors and their order alone, never on what `out` held before:
that is what makes removal exact, where (W + d) - d is not W in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.layout import ModuleLayout

# Elements of float32 scratch of a fold into a narrower dtype: on a CPU 4 MiB, so that it stays in
# cache; elsewhere launching costs more than memory, and 64 MiB hold most parameters whole.
_CPU_TILE = 1 << 20
_DEVICE_TILE = 1 << 24


def concatenate_factors(
    weights: Mapping[Adapter, float], module: str
) -> tuple[Tensor, Tensor] | None:
    """Return the concatenated factors of all adapters that adapt `module`, in order of `weights`.

    Returns:
        A_cat, float32 (R, in), and B_cat, float32 (out, R), where R is the sum of the ranks and
        weight x scaling is multiplied into B in float64 and rounded once; None if no adapter of
        the mix adapts the module.
    """
    parts = [(a.modules[module], w) for a, w in weights.items() if w != 0 and module in a.modules]
    if not parts:
        return None
    a_cat = torch.cat([factors.a for factors, _ in parts])
    b_cat = torch.cat([(f.b.double() * (w * f.scaling)).float() for f, w in parts], dim=1)
    return a_cat, b_cat


def fold_into(
    out: Tensor, base: Tensor, a_cat: Tensor, b_cat: Tensor, layout: ModuleLayout
) -> None:
    """Write base + (B_cat @ A_cat), in the parameter's layout, into `out`, in place.

    Args:
        out: The parameter's storage, any floating dtype; keeps its address.
        base: The base parameter, same shape and dtype, on any device.
        a_cat: float32 (R, in), on the device of `out`.
        b_cat: float32 (out, R), on the device of `out`.
        layout: Tells whether the parameter is (in, out) or (out, in).
    """
    left, right = (a_cat.T, b_cat.T) if layout.transposed else (b_cat, a_cat)
    if out.dtype == torch.float32:
        torch.addmm(base.to(out.device), left, right, out=out)
        return
    # A plain addmm in bfloat16 would round its factors and its partial sums as well.
    elements = _CPU_TILE if out.device.type == "cpu" else _DEVICE_TILE
    rows = max(1, elements // out.shape[1])
    for start in range(0, out.shape[0], rows):
        tile = slice(start, start + rows)
        exact = base[tile].to(out.device, torch.float32)  # A copy, since `out` is narrower.
        out[tile].copy_(exact.addmm_(left[tile], right))


def fold_alike_into(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    layout: ModuleLayout,
) -> None:
    """Write base + (B_cat @ A_cat) into several alike parameters: `fold_into`, all at once.

    On a GPU launching a product of few ranks takes longer than computing it, so that one batched
    product for all of a model's layers takes a third of the time of one for each.

    Args:
        outs: Storages of the parameters, n of one shape, dtype and device; they keep their address.
        bases: The n base parameters, same shape and dtype, on any device.
        pairs: n times A_cat, float32 (R, in), and B_cat, float32 (out, R), on the device of `outs`.
        layout: Of each of them.
    """
    a, b = (torch.stack(factors) for factors in zip(*pairs, strict=True))
    left, right = (a.mT, b.mT) if layout.transposed else (b, a)
    exact = torch.empty((len(outs), *outs[0].shape), dtype=torch.float32, device=outs[0].device)
    parts = list(exact.unbind())
    torch._foreach_copy_(parts, list(bases))
    exact.baddbmm_(left, right)
    torch._foreach_copy_(list(outs), parts)
