"""Every way of merging that needs the adapters alone, by the word that users ask for it with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import get_type_hints

from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.dare import CoreDare
from superpose_adapters.merge.iso import CoreIso
from superpose_adapters.merge.knots_ties import KnotsTies
from superpose_adapters.merge.magnitude import CoreMagnitude
from superpose_adapters.merge.mean import Mean
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.svd import TruncatedSvd
from superpose_adapters.merge.ties import CoreTies
from superpose_adapters.merge.tsv import CoreTsv

METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        PlainSum,
        Mean,
        Cat,
        TruncatedSvd,
        CoreTsv,
        CoreIso,
        CoreTies,
        CoreDare,
        CoreMagnitude,
        KnotsTies,
    )
}


class MethodError(ValueError):
    """A method or an option that there is not; one line names it and what there is."""


def read_method(name: str, options: Mapping[str, object]) -> Method:
    """Return the method of this name with these options; those left out have their defaults.

    Raises:
        MethodError: There is no such method, no such option of it, or the value is none of it.
    """
    kind = METHODS.get(name)
    if kind is None:
        raise MethodError(f"no method is called {name[:80]!r}: use {', '.join(METHODS)}")
    types = get_type_hints(kind)
    known = {field.name: types[field.name] for field in fields(kind)}
    read = {}
    for option, value in options.items():
        if option not in known:
            has = ", ".join(known) or "none"
            raise MethodError(f"{name} has no option {option[:80]!r}; its options: {has}")
        read[option] = _value(f"{name}: {option}", value, known[option])
    try:
        return kind(**read)
    except ValueError as error:  # Of the method itself: out of range.
        raise MethodError(f"{name}: {error}") from error


def _value(what: str, value: object, kind: type) -> object:
    """Return a JSON value as an option's type; JSON writes whole numbers as floats too."""
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        word = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise MethodError(f"{what} is {str(value)[:80]!r}: use {word[kind]}")
    return value
