"""How far a merged adapter is from the plain sum of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superpose_adapters.merge.low_rank_svd import NEGLIGIBLE
from superpose_adapters.merge.merge import Part, modules_of, terms_of
from superpose_adapters.merge.plain_sum import PlainSum


@dataclass(frozen=True)
class Deviation:
    """Norm of the difference between a merged delta and the plain sum, over the norm of the sum.

    0 is the sum itself, to float32's 1e-7. Of `svd` it is what the lower rank loses. Of others,
    which scale, it says little about quality: half of the sum is at 0.5.

    Attributes:
        whole: Over all modules.
        by_module: The same, module by module; infinite where the sum is zero and the merge is not.
    """

    whole: float
    by_module: Mapping[str, float]

    @classmethod
    def of(cls, norms: Mapping[str, tuple[float, float]]) -> Deviation:
        """Put together what `deviation_norms` yields."""
        differences, sums = zip(*norms.values(), strict=True)
        return cls(
            whole=_share(math.hypot(*differences), math.hypot(*sums)),
            by_module={module: _share(*pair) for module, pair in norms.items()},
        )


def deviation(parts: Sequence[Part], merged: Mapping[str, tuple[Tensor, Tensor]]) -> Deviation:
    """Measure what `merge` has made of these parts, whatever the method.

    Raises:
        MergeError: A module has several shapes.
    """
    return Deviation.of(dict(deviation_norms(parts, merged)))


def deviation_norms(
    parts: Sequence[Part], merged: Mapping[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each module with the norms of its difference from the plain sum, and of the sum.

    From the factors, and not from their Gram matrix, where squares lose half of the digits. Whoever
    stops asking stops the measuring.

    Raises:
        MergeError: A module has several shapes.
    """
    for module in modules_of(parts):
        terms = terms_of(parts, module)
        # Beside the terms: a sum that cancels is zero.
        rounding = NEGLIGIBLE * max(_norm(term.a, term.b) for term in terms)
        a, b = PlainSum().merge(module, len(parts), terms)
        whole = _unless_rounding(_norm(a, b), rounding)
        if module in merged:
            a = torch.cat([a, merged[module][0].double()])
            b = torch.cat([b, -merged[module][1].double()], dim=1)
        yield module, (_unless_rounding(_norm(a, b), rounding), whole)


def _norm(a: Tensor, b: Tensor) -> float:
    left, right = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.T, mode="r").R
    return float((left @ right.T).norm())


def _unless_rounding(norm: float, rounding: float) -> float:
    return norm if norm > rounding else 0.0


def _share(difference: float, of: float) -> float:
    if of > 0:
        return difference / of
    return math.inf if difference > 0 else 0.0
