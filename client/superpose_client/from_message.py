"""How the dataclasses of `results` are filled from messages: each field by its name and type.

    str, int, ...   the value
    a StrEnum       its member of the name on the wire; a number of a later version reads as 0
    a FromMessage   that, from the message in the field
    tuple[X, ...]   X for each of a repeated field
    X | None        X, or None where the message leaves the field out
    dict[str, X]    the object that a Struct holds, its whole numbers as int

A field stands under its own name in the message, unless `at` puts it elsewhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message


class FromMessage:
    """A dataclass that has the fields of a message, named when it is declared.

        @dataclass(frozen=True)
        class Usage(FromMessage, message=inference_pb2.Usage): ...

    A field of the message that it lacks needs an entry in `left_out`, with the reason.
    """

    message_type: ClassVar[type[Message]]
    left_out: ClassVar[Mapping[str, str]]

    def __init_subclass__(
        cls, *, message: type[Message], left_out: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Take note of the message."""
        cls.message_type = message
        cls.left_out = left_out

    @classmethod
    def from_proto(cls, message: Message) -> Self:
        """Convert a message of `message_type`."""
        kind: type = cls
        return cls(*[read(message) for read in _readers(kind)])


def at(path: str) -> dict[str, str]:
    """Return the metadata of a field that stands at `path` in the message: names with dots."""
    return {"path": path}


def path_of(field: "dataclasses.Field[Any]") -> str:
    """Return where a field of a dataclass stands in the message."""
    path: str = field.metadata.get("path", field.name)
    return path


@cache
def _readers(kind: type[FromMessage]) -> tuple[Callable[[Any], Any], ...]:
    """Return for each field of a class what reads it. Found out once: streams convert a lot."""
    types = get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return tuple(_reader(kind, path_of(field), types[field.name]) for field in fields)


def _reader(kind: type[FromMessage], path: str, of: Any) -> Callable[[Any], Any]:
    get = attrgetter(path)
    inner, *rest = (of,) if get_origin(of) is dict else get_args(of) or (of,)
    convert = _converter(inner, _descriptor(kind, path))
    if rest == [type(None)]:
        return lambda message: convert(get(message)) if message.HasField(path) else None
    if rest == [...]:
        if convert is _as_it_is:
            return lambda message: tuple(get(message))
        return lambda message: tuple([convert(value) for value in get(message)])
    return get if convert is _as_it_is else lambda message: convert(get(message))


def _converter(of: type, field: Any) -> Callable[[Any], Any]:
    if get_origin(of) is dict:
        return _object
    if issubclass(of, FromMessage):
        return of.from_proto
    if issubclass(of, StrEnum):
        members = {value.number: of(value.name) for value in field.enum_type.values}
        return lambda number: members.get(number, members[0])
    return _as_it_is


def _object(struct: Any) -> dict[str, Any]:
    """Return what a Struct holds, by name: it keeps no order, and its numbers are doubles."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in sorted(MessageToDict(struct).items())
    }


def _as_it_is(value: Any) -> Any:
    return value


def _descriptor(kind: type[FromMessage], path: str) -> Any:
    """Return the descriptor of the field at `path`.

    Raises:
        TypeError: The message has no such field.
    """
    message: Any = kind.message_type.DESCRIPTOR
    *parents, name = path.split(".")
    try:
        for parent in parents:
            message = message.fields_by_name[parent].message_type
        return message.fields_by_name[name]
    except (KeyError, AttributeError):
        raise TypeError(
            f"{kind.__name__}: {kind.message_type.DESCRIPTOR.full_name} has no field {path}; "
            "say where it stands with field(metadata=at(...))"
        ) from None
