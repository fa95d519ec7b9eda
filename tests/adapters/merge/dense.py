"""Merge methods by their definitions, on whole deltas in numpy: slow, and the reference.

Shares nothing with the package: no factor, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
SMALL = 1e-10  # Singular values below this share of the largest are rounding.


def decompose(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """The singular values that are not rounding, with their vectors."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > SMALL * s[0]).sum()) if s[0] > 0 else 0
    return u[:, :rank], s[:rank], vh[:rank]


def plain_sum(deltas: Sequence[Matrix]) -> Matrix:
    total: Matrix = np.sum(deltas, axis=0)
    return total


def truncated(deltas: Sequence[Matrix], rank: int) -> Matrix:
    u, s, vh = decompose(plain_sum(deltas))
    best: Matrix = u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]
    return best


def iso(deltas: Sequence[Matrix]) -> Matrix:
    u, s, vh = decompose(plain_sum(deltas))
    level: Matrix = float(np.mean(s)) * u @ vh
    return level


def tsv(deltas: Sequence[Matrix]) -> Matrix:
    """With polar factors as X (X^T X)^(-1/2), by eigenvalues."""
    parts = [decompose(delta) for delta in deltas]
    left = _whiten(np.hstack([u for u, _, _ in parts]))
    right = _whiten(np.hstack([vh.T for _, _, vh in parts]))
    merged: Matrix = left @ np.diag(np.concatenate([s for _, s, _ in parts])) @ right.T
    return merged


def _whiten(columns: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > SMALL
    result: Matrix = columns @ vectors[:, kept] @ np.diag(values[kept] ** -0.5) @ vectors[:, kept].T
    return result


def bases(deltas: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
    """The bases of the core space: eigenvectors of the sums of |D^T| and of |D|, descending."""
    parts = [decompose(delta) for delta in deltas]
    outputs = sum(u @ np.diag(s) @ u.T for u, s, _ in parts)
    inputs = sum(vh.T @ np.diag(s) @ vh for _, s, vh in parts)
    return _eigenvectors(np.asarray(outputs)), _eigenvectors(np.asarray(inputs))


def _eigenvectors(matrix: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(matrix)
    found: Matrix = vectors[:, values > SMALL * values[-1]][:, ::-1]
    return found


def in_core(deltas: Sequence[Matrix], operator: Callable[[list[Matrix]], Matrix]) -> Matrix:
    """Apply an operator to the deltas as they are in the core space."""
    left, right = bases(deltas)
    merged: Matrix = left @ operator([left.T @ delta @ right for delta in deltas]) @ right.T
    return merged


def in_knots(deltas: Sequence[Matrix], operator: Callable[[list[Matrix]], Matrix]) -> Matrix:
    """Apply an operator to the coefficients of the deltas side by side."""
    u, s, vh = decompose(np.hstack(list(deltas)))
    coefficients = np.diag(s) @ vh
    width = deltas[0].shape[1]
    parts = [coefficients[:, i * width : (i + 1) * width] for i in range(len(deltas))]
    merged: Matrix = u @ operator(parts)
    return merged


def trimmed(matrix: Matrix, density: float) -> Matrix:
    """The largest entries, one after the other."""
    kept = max(1, round(density * matrix.size))
    result = np.zeros_like(matrix)
    for i in np.argsort(-np.abs(matrix), axis=None)[:kept]:
        if abs(matrix.flat[i]) > SMALL * np.abs(matrix).max():
            result.flat[i] = matrix.flat[i]
    return result


def ties(matrices: Sequence[Matrix], density: float, join: str) -> Matrix:
    """TIES, entry by entry."""
    kept = [trimmed(matrix, density) for matrix in matrices]
    result = np.zeros_like(kept[0])
    for place in product(*map(range, result.shape)):
        entries = [matrix[place] for matrix in kept if matrix[place] != 0]
        up = [entry for entry in entries if entry > 0]
        down = [entry for entry in entries if entry < 0]
        winners = up if sum(up) > -sum(down) else down
        if winners:
            result[place] = sum(winners) / (len(winners) if join == "mean" else 1)
    return result
