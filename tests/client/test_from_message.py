import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from superpose_client import results
from superpose_client.from_message import FromMessage, at, path_of
from superpose_client.results import AdapterSource, FinishReason
from superpose_proto.v1 import adapter_pb2, audit_pb2, inference_pb2, mix_pb2, server_pb2

FILES = (adapter_pb2, audit_pb2, inference_pb2, mix_pb2, server_pb2)
STRUCT = Struct.DESCRIPTOR
KINDS = [
    kind
    for kind in vars(results).values()
    if isinstance(kind, type) and issubclass(kind, FromMessage) and kind is not FromMessage
]


def received() -> dict[str, Any]:
    """The descriptors of all messages of ours that can arrive, by name."""
    found: dict[str, Any] = {}

    def walk(message: Any) -> None:
        if message.full_name not in found:
            found[message.full_name] = message
            for inner in message.fields:
                if inner.message_type is not None and inner.message_type is not STRUCT:
                    walk(inner.message_type)

    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                walk(method.output_type)
    return found


def unread(message: Any, read: set[str], prefix: str = "") -> Iterator[str]:
    """The paths of a message that are not read, neither as a whole nor in all their parts."""
    for inner in message.fields:
        path = prefix + inner.name
        if path in read:
            continue
        if any(name.startswith(path + ".") for name in read):
            yield from unread(inner.message_type, read, path + ".")
        else:
            yield path


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_field_of_a_message_is_dropped(kind: Any) -> None:
    read = {path_of(field) for field in dataclasses.fields(kind)}
    dropped = set(unread(kind.message_type.DESCRIPTOR, read))
    assert dropped == set(kind.left_out), "add the field to the dataclass, or to its left_out"
    assert all(kind.left_out.values()), "say why it is left out"


def test_no_message_is_dropped() -> None:
    """A response that only wraps one value is returned as that value; all others are results."""
    known = {kind.message_type.DESCRIPTOR.full_name for kind in KINDS}
    wrappers = [m for name, m in received().items() if name not in known]
    for message in wrappers:
        assert len(message.fields) <= 1, f"{message.full_name} needs a dataclass in results.py"
    assert known <= received().keys()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_results_are_in_the_order_of_the_proto(kind: Any) -> None:
    names = [path_of(field).partition(".")[0] for field in dataclasses.fields(kind)]
    order = [f.name for f in kind.message_type.DESCRIPTOR.fields if f.name in names]
    assert list(dict.fromkeys(names)) == order


def test_the_enums_are_those_of_the_proto() -> None:
    assert [kind.value for kind in FinishReason] == inference_pb2.FinishReason.keys()
    assert [kind.value for kind in AdapterSource] == adapter_pb2.AdapterSource.keys()


def fill(message: Any, numbers: Iterator[int]) -> Any:
    """Give every field a value of its own, repeated ones two."""
    for inner in message.DESCRIPTOR.fields:
        for _ in range(2 if inner.is_repeated else 1):
            number = next(numbers)
            if inner.message_type is STRUCT:
                getattr(message, inner.name).update({"a": number + 0.5, "b": True, "c": "d"})
                continue
            if inner.message_type is not None:
                part = getattr(message, inner.name)
                fill(part.add() if inner.is_repeated else part, numbers)
                continue
            value: Any = number
            if inner.enum_type is not None:
                value = inner.enum_type.values[-1].number
            elif inner.cpp_type in (inner.CPPTYPE_DOUBLE, inner.CPPTYPE_FLOAT):
                value = number + 0.5
            elif inner.cpp_type == inner.CPPTYPE_BOOL:
                value = True
            elif inner.cpp_type == inner.CPPTYPE_STRING:
                value = f"text {number}"
            if inner.is_repeated:
                getattr(message, inner.name).append(value)
            else:
                setattr(message, inner.name, value)
    return message


def plain(value: Any) -> Any:
    """Both sides as nested dicts and lists; protobuf writes integers of 64 bits as strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if type(value) in (int, str) or isinstance(value, StrEnum) else value


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_value_is_what_protobuf_itself_reads(kind: Any) -> None:
    message = fill(kind.message_type(), itertools.count(1))
    made = kind.from_proto(message)
    whole = plain(MessageToDict(message, preserving_proto_field_name=True))
    for part in dataclasses.fields(kind):
        expected = whole
        for name in path_of(part).split("."):
            expected = expected[name]
        value = getattr(made, part.name)
        assert plain(value) == expected
        assert not isinstance(value, list)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_empty_message_is_read_too(kind: Any) -> None:
    made = kind.from_proto(kind.message_type())
    for inner in kind.message_type.DESCRIPTOR.fields:
        if inner.has_presence and inner.message_type is None:
            assert getattr(made, inner.name) is None, "an optional field is X | None"


@dataclass(frozen=True)
class Renamed(FromMessage, message=mix_pb2.GetMixResponse):
    number: int = field(metadata=at("resident.generation"))
    mix: results.MixState | None


@dataclass(frozen=True)
class Optional(FromMessage, message=mix_pb2.AddDomainRequest):
    weight: float | None
    expected_generation: int | None


@dataclass(frozen=True)
class Misspelt(FromMessage, message=mix_pb2.Mix):
    entry: tuple[str, ...]


@dataclass(frozen=True)
class Astray(FromMessage, message=mix_pb2.AddDomainRequest):
    length: int = field(metadata=at("domain.length"))


def test_a_field_may_stand_elsewhere_or_be_absent() -> None:
    message = mix_pb2.GetMixResponse(resident=mix_pb2.MixState(generation=7))
    assert Renamed.from_proto(message) == Renamed(7, None)
    message.mix.SetInParent()
    assert Renamed.from_proto(message) == Renamed(7, results.MixState(0, "", ()))


def test_an_optional_value_is_none_only_where_it_is_absent() -> None:
    assert Optional.from_proto(mix_pb2.AddDomainRequest()) == Optional(None, None)
    message = mix_pb2.AddDomainRequest(weight=0, expected_generation=0)
    assert Optional.from_proto(message) == Optional(0.0, 0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Misspelt, "Misspelt: superpose.v1.Mix has no field entry"),
        (Astray, "Astray: superpose.v1.AddDomainRequest has no field domain.length"),
    ],
)
def test_a_field_that_the_message_lacks_is_named(kind: Any, text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)):
        kind.from_proto(kind.message_type())
