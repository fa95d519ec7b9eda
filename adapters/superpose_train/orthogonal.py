"""O-LoRA's penalty, which keeps the A's of a new adapter orthogonal to those of past ones.

Wang et al. 2023, arXiv 2310.14152. The loss of a training step is cross-entropy plus

    lambda_1 * sum over modules of |A_past A_new^T|_1  +  lambda_2 * sum over A_new, B_new of |.|_2

The 1-norm is the sum of absolute entries, as in the authors' code; their paper states squares. The
2-norms, one a tensor, are not squared. A_past stacks the A's of all past adapters, without their
scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from superpose_train.peft_names import Factors


@dataclass(frozen=True)
class Penalty:
    """The penalty of one run.

    Attributes:
        past: {module: A's of the past adapters, stacked, (R, in)}.
        factors: What is trained.
        orthogonality: lambda_1.
        norms: lambda_2.
    """

    past: Mapping[str, Tensor]
    factors: Factors
    orthogonality: float
    norms: float

    def overlap(self) -> Tensor:
        """Return the sum of |A_past A_new^T|_1 over the modules that both adapt."""
        products = [
            (self.past[module].to(a.device) @ a.T).abs().sum()
            for module, (a, _) in self.factors.items()
            if module in self.past
        ]
        return torch.stack(products).sum() if products else torch.zeros(())

    def __call__(self) -> Tensor:
        """Return what is added to a step's cross-entropy; in float32, whatever the step is in."""
        factors = [factor for pair in self.factors.values() for factor in pair]
        with torch.autocast(factors[0].device.type, enabled=False):
            total = self.orthogonality * self.overlap()
            # Without this a weight of 0 would cost as much as any other.
            if self.norms:
                lengths = [torch.linalg.vector_norm(factor) for factor in factors]
                total = total + self.norms * torch.stack(lengths).sum()
            return total
