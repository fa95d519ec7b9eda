"""Frozen A: A stays what it is at first, and B alone is trained.

So what the deltas of several runs read of their inputs is apart before any of them is trained.

`random` is A as PEFT draws it, as in LoRI (Zhang et al. 2025, arXiv 2504.07448): rows of two draws
are nearly orthogonal where a module has many inputs. A block I/N is disjoint by construction.
Either may have a sparse B, see `sparse_b`.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from superpose_train.peft_names import Factors

FrozenA = Literal["random"] | tuple[int, int]
"""`random`, or (i, n): block i, from 1, of n."""


def freeze_a(factors: Factors, frozen: FrozenA, seed: int) -> None:
    """Take the A's of a fresh adapter from training, after they are set to their block if need be.

    Raises:
        ValueError: so many blocks do not fit.
    """
    for module, (a, _) in factors.items():
        if frozen != "random":
            block, blocks = frozen
            rank, in_features = a.shape
            a.data.copy_(orthogonal_block(seed, module, in_features, rank, block, blocks))
        a.requires_grad = False


def orthogonal_block(
    seed: int, module: str, in_features: int, rank: int, block: int, blocks: int
) -> Tensor:
    """Return A (rank, in_features): rows of one random orthogonal basis of a module's inputs.

    The basis follows from seed and module alone, so blocks of the same rank share no row whoever
    asks for them; rows are as long as PEFT's fresh ones are on average.

    Args:
        seed: Of the basis.
        module: The module's name in the base.
        in_features: Dimension of the module's inputs.
        rank: Rows of a block.
        block: From 1.
        blocks: How many there are.

    Raises:
        ValueError: the module has too few inputs for so many rows.
    """
    if blocks * rank > in_features:
        raise ValueError(
            f"--frozen-a: {blocks} blocks of --rank {rank} do not fit into the "
            f"{in_features} inputs of {module}"
        )
    key = hashlib.sha256(f"{seed} {module}".encode()).digest()
    # Drawn row by row, so that a basis of more blocks begins with the same rows.
    rows = np.random.default_rng(list(key)).standard_normal((block * rank, in_features))
    basis, triangle = np.linalg.qr(rows.T)
    # QR leaves the signs open; a positive diagonal fixes them whatever library computes it.
    basis = basis * np.sign(np.diag(triangle))
    # kaiming_uniform(a=sqrt 5) draws from +-1/sqrt(in): a row's mean square norm is 1/3.
    chosen = basis.T[(block - 1) * rank :] / np.sqrt(3.0)
    return torch.from_numpy(chosen.astype(np.float32))
