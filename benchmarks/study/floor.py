"""The floor of the cosine: what deltas have that share nothing, or nothing but their A."""

from __future__ import annotations

import math


def random_floor(inputs: int, outputs: int, shared_rank: int | None = None) -> float:
    """Return the RMS cosine of two random deltas B A of a module.

    Two independent directions among in x out have RMS cosine 1/sqrt(in out), whatever the rank.
    With one A for both, <B1 A, B2 A> = tr(B1^T B2 A A^T). A random A of few rows has A A^T close
    to a multiple of the identity, so the cosine is that of B1 and B2, two independent directions
    among r x out: 1/sqrt(r out). (For A of Gaussian entries 1/r becomes 1/r + 1/in, nearly.)

    Args:
        inputs: Of the module.
        outputs: Of the module.
        shared_rank: Rank of both, if A is shared; None if each delta has its own.
    """
    return 1 / math.sqrt((inputs if shared_rank is None else shared_rank) * outputs)
