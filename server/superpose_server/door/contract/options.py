"""Options of a merge method as a Struct, which is what JSON's objects are in protobuf."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.struct_pb2 import Struct, Value

from superpose_adapters.merge.methods import MethodError
from superpose_adapters.option_syntax import LARGEST_WHOLE, Option


def options_to_wire(options: Mapping[str, Option]) -> Struct:
    """Return options for a response."""
    struct = Struct()
    struct.update(options)
    return struct


def options_from_wire(options: Struct) -> dict[str, Option]:
    """Return the options that a client names.

    Raises:
        MethodError: A value that is neither a number, true or false, nor a word.
    """
    return {name: _option(name, value) for name, value in options.fields.items()}


def _option(name: str, value: Value) -> Option:
    match value.WhichOneof("kind"):
        case "number_value" if abs(value.number_value) <= LARGEST_WHOLE:
            return value.number_value
        case "bool_value":
            return value.bool_value
        case "string_value":
            return value.string_value
    raise MethodError(
        f"option {name[:80]!r} holds no number below 2^53, neither true or false, nor a word: send "
        "one of these"
    )
