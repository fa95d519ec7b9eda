"""Refusals of values that no study can use, each naming its key in the config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

# Seeds that experiments derive from these still fit the trainer's 32 bits.
_MOST_SEED = 999_999


def at_least(least: int, values: Mapping[str, int | None]) -> None:
    """Refuse numbers below `least`; None stands for no limit.

    Raises:
        ValueError: Naming the key.
    """
    for key, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{key} is {value}; it must be at least {least}")


def positive(values: Mapping[str, float]) -> None:
    """Refuse what is not a finite number above 0.

    Raises:
        ValueError: Naming the key.
    """
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key} is {value}; it must be a finite number above 0")


def within(low: float, high: float, key: str, values: Sequence[float]) -> None:
    """Refuse numbers that do not lie between two others, both included.

    Raises:
        ValueError: Naming the key.
    """
    for value in values:
        if not low <= value <= high:  # so that NaN is refused too
            raise ValueError(f"{key} has {value}; it must lie between {low:g} and {high:g}")


def distinct(key: str, values: Sequence[object], least: int = 1) -> None:
    """Refuse a list with too few entries, or one that names something twice.

    Raises:
        ValueError: Naming the key.
    """
    if len(values) < least:
        raise ValueError(f"{key} has {len(values)} entries; it needs at least {least}")
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{key} names {value} twice")


def seeds(key: str, values: Sequence[int], least: int = 1) -> None:
    """Refuse seeds that are no replicates of each other, or that a trainer refuses.

    Raises:
        ValueError: Naming the key.
    """
    distinct(key, values, least)
    within(0, _MOST_SEED, key, values)
