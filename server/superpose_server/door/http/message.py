"""Messages of `superpose.v1` as JSON: the names of the contract, whatever wire carries them.

Unlike protobuf's own JSON, integers are numbers and a field that holds its default is there, as
`adapterctl --json` writes them. What JSON has no number for (a perplexity of nothing) is null; a
Struct is the object that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.CPPTYPE_STRING: {"type": "string"},
    FieldDescriptor.CPPTYPE_INT32: {"type": "integer"},
    FieldDescriptor.CPPTYPE_INT64: {"type": "integer"},
    FieldDescriptor.CPPTYPE_UINT32: {"type": "integer", "minimum": 0},
    FieldDescriptor.CPPTYPE_UINT64: {"type": "integer", "minimum": 0},
    FieldDescriptor.CPPTYPE_FLOAT: {"type": ["number", "null"]},
    FieldDescriptor.CPPTYPE_DOUBLE: {"type": ["number", "null"]},
}


def plain(message: Message) -> dict[str, Any]:
    """Return a message as JSON's own values; a field that may be absent and is, is None."""
    if isinstance(message, Struct):
        return {name: _number(value) for name, value in sorted(MessageToDict(message).items())}
    descriptor: Any = message.DESCRIPTOR  # in Python or in C: its type says one of the two
    return {field.name: _value(message, field) for field in descriptor.fields}


def _value(message: Message, field: FieldDescriptor) -> Any:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    return [_one(field, each) for each in value] if field.is_repeated else _one(field, value)


def _one(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(value: Any) -> Any:
    """Return a whole number without a point: in a Struct all are doubles."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def schema(message: Descriptor) -> Mapping[str, Any]:
    """Return the JSON Schema of what `plain` makes of such messages."""
    if message.full_name == Struct.DESCRIPTOR.full_name:
        return {"type": "object"}
    return {
        "type": "object",
        "properties": {field.name: _field_schema(field) for field in message.fields},
        "required": [field.name for field in message.fields],
        "additionalProperties": False,
    }


def _field_schema(field: FieldDescriptor) -> Mapping[str, Any]:
    one = _one_schema(field)
    if field.is_repeated:
        return {"type": "array", "items": one}
    return {"anyOf": [one, {"type": "null"}]} if field.has_presence else one


def _one_schema(field: FieldDescriptor) -> Mapping[str, Any]:
    if field.message_type is not None:
        return schema(field.message_type)
    if field.enum_type is not None:
        return {"enum": [value.name for value in field.enum_type.values]}
    return _SCALARS[field.cpp_type]
