"""What every way of merging is: options, and a function of one module's terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar

from superpose_adapters.merge.term import Pair, Term
from superpose_adapters.option_syntax import Option

LEARNED: Mapping[str, bool] = {"learned": True}
"""Metadata of a field that holds what a method has learned from rows: no option, None at first."""


class MergeError(ValueError):
    """Adapters that cannot be merged; one line names the module and the remedy."""


@dataclass(frozen=True)
class Method(ABC):
    """A way of merging. Its fields are its options, each with a default, and what it has learned.

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

        Raises:
            MergeError: The method cannot merge these adapters.
        """

    @property
    def options(self) -> dict[str, Option]:
        """The options by name, as JSON values."""
        return {each.name: getattr(self, each.name) for each in option_fields(type(self))}


def option_fields(kind: type[Method]) -> list[Field[Any]]:
    """Return the fields of a method that are options."""
    return [each for each in fields(kind) if each.metadata != LEARNED]
