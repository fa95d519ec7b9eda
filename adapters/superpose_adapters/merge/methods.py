"""Every way of merging, by the word that users ask for it with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_type_hints

from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.dare import CoreDare
from superpose_adapters.merge.do_merging import DoMerging
from superpose_adapters.merge.iso import CoreIso
from superpose_adapters.merge.knots_ties import KnotsTies
from superpose_adapters.merge.lego import Lego
from superpose_adapters.merge.lorahub import LoraHub
from superpose_adapters.merge.magnitude import CoreMagnitude
from superpose_adapters.merge.mean import Mean
from superpose_adapters.merge.method import Method, option_fields
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.regmean import RegMean
from superpose_adapters.merge.soups import Soups
from superpose_adapters.merge.svd import TruncatedSvd
from superpose_adapters.merge.ties import CoreTies
from superpose_adapters.merge.tsv import CoreTsv
from superpose_adapters.option_syntax import LARGEST_WHOLE

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
        DoMerging,
        Lego,
    )
}
"""Those that need the adapters alone."""

DATA_METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (RegMean, Soups, LoraHub)
}
"""Those that learn from rows first, under the base: `superpose_train.merging` has them do it."""


class MethodError(ValueError):
    """A method or an option that there is not; one line names it and what there is."""


def read_method(
    name: str, options: Mapping[str, object], among: Mapping[str, type[Method]] = METHODS
) -> Method:
    """Return the method of this name with these options; those left out have their defaults.

    Args:
        name: Its word.
        options: JSON values.
        among: `METHODS`, or `DATA_METHODS`, whose learned part is still to be put in.

    Raises:
        MethodError: There is no such method, no such option of it, or the value is none of it.
    """
    kind = among.get(name)
    if kind is None:
        if name in DATA_METHODS:
            raise MethodError(
                f"{name} learns from rows: merge offline, with superpose-merge --data"
            )
        raise MethodError(f"no method is called {name[:80]!r}: use {', '.join(among)}")
    types = get_type_hints(kind)
    known = {field.name: types[field.name] for field in option_fields(kind)}
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
    if type(value) is int and abs(value) > LARGEST_WHOLE:
        raise MethodError(f"{what} is beyond 2^53, from where on numbers are not exact: use less")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        word = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise MethodError(f"{what} is {str(value)[:80]!r}: use {word[kind]}")
    return value
