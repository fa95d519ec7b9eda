"""LoRI's sparse B: a first training says which entries matter, a second one trains those alone.

Zhang et al. 2025, arXiv 2504.07448. A is frozen. The first training, the calibration, is an
ordinary one; of its B's the largest entries are kept, by one threshold over all modules. The
second begins anew, at B = 0, and the other entries stay there. So do the authors' scripts, whose
second training has ten times the first one's learning rate; here both have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from functools import partial

import torch
from torch import Tensor

from superpose_train.peft_names import Factors

Mask = dict[str, Tensor]
"""{module: (out, r) of bool}, True where B is trained."""


def largest_entries(b_factors: Mapping[str, Tensor], sparsity: float) -> Mask:
    """Return which entries of the B's are the largest in magnitude, over all modules together.

    Of equal ones the earlier module's, and in it the earlier entries, are kept.

    Args:
        b_factors: {module: B (out, r)}.
        sparsity: Share of all entries that is not kept, rounded down to whole entries.
    """
    sizes = torch.cat([b.detach().abs().flatten().cpu() for b in b_factors.values()])
    # In decimals, for 0.29 * 100 is less than 29 in binary ones.
    dropped = int(Decimal(str(sparsity)) * len(sizes))
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.sort(descending=True, stable=True).indices[: len(sizes) - dropped]] = True
    parts = torch.split(kept, [b.numel() for b in b_factors.values()])
    return {
        module: part.view(b.shape).to(b.device)
        for (module, b), part in zip(b_factors.items(), parts, strict=True)
    }


def train_entries(factors: Factors, mask: Mask) -> None:
    """Let a fresh adapter's B's move where the mask is True alone.

    Elsewhere they stay exactly 0: AdamW without weight decay moves a parameter whose gradients
    were all 0 by 0 / (0 + epsilon).
    """
    for module, (_, b) in factors.items():
        b.register_hook(partial(_only, mask[module]))  # type: ignore[no-untyped-call]


def _only(kept: Tensor, gradient: Tensor) -> Tensor:
    return gradient.where(kept, 0.0)
