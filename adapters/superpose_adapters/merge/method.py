"""What every way of merging is: options, and a function of one module's terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from superpose_adapters.merge.term import Pair, Term
from superpose_adapters.provenance import Option


@dataclass(frozen=True)
class Method(ABC):
    """A way of merging. Its fields are its options, each with a default.

    Weights multiply the deltas before anything else, so what a method elects, trims or measures is
    weighted. A common factor of the result is no option: it is the weight that the merged adapter
    gets in a mix.

    A method reads terms alone, and no delta is ever formed: what it returns has low rank.
    """

    name: ClassVar[str]
    """The word by which users ask for it."""

    @abstractmethod
    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Merge one module.

        Args:
            module: Its name in the base.
            parts: How many adapters are merged. Those that leave this module alone have no term.
            terms: At least one, in ascending order of `part`.

        Returns:
            a (R, in) and b (out, R), float64; R may be 0, where nothing is left.
        """

    @property
    def options(self) -> dict[str, Option]:
        """The options by name, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
