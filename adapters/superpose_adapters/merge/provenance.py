"""Where a merged adapter comes from, as the adapter itself says.

It stands in the metadata of the tensor file, which PEFT and the digest leave alone: a merged
adapter is an ordinary PEFT folder of two files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from superpose_adapters.merge.method import Option

METADATA_KEY = "superpose_merge"


@dataclass(frozen=True)
class Source:
    """One adapter that was merged.

    Attributes:
        domain: What it was called then.
        digest: The adapter's.
        weight: What its delta was multiplied by.
    """

    domain: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Provenance:
    """How an adapter was merged.

    Attributes:
        method: Name of the method.
        options: All of its options, those that had their defaults too.
        sources: In the order of the fold.
    """

    method: str
    options: Mapping[str, Option]
    sources: tuple[Source, ...]
