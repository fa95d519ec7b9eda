"""Mutations of valid inputs, all drawn from one `random.Random`.

Random bytes end at a parser's first check. These begin with something valid and break it in one
place or a few, at the level that the parser reads: bytes, characters, members of JSON, fields of a
message, claims of a header. So most of an input is right, and what is wrong lies deep.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

# Where integers of some width, or the numbers of JSON, end; and what parsers are known to mistake.
INTEGERS: tuple[int, ...] = (
    *(0, 1, -1, 2, 7, 127, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 10**400),
)
DOUBLES: tuple[float, ...] = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 5e-324, 1e4, 1e4 + 1, 1e38, 1.8e308),
    *(float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "\x00", "\n", "\r\n", "a\nb", "'", '"', "\\", "%s", "{0}", "../../etc/passwd"),
    *("/etc/passwd", "..", ".", "base", "default", "nobody", "Base", "a=1", "a,b", "a;b", "a" * 64),
    *("a" * 65, "b" * 5000, "\u0131", "\u0660", "\uff11", "\u202e", "\U0001f600", "\ud800"),
    *(
        "NaN",
        "Infinity",
        "true",
        "null",
        "1e999",
        "0x1",
        "1_0",
        "--1",
        "(a+)+$",
        "(?i)x",
        "[",
        "(?",
    ),
    *(
        "(" * 200,
        ".*" * 40,
        "(a|a)*b",
        "\\1",
        "x{99999}",
        "(" + "b" * 5000 + ")",
        "<|endoftext|>",
        "</s>",
        "\u00e9" * 300,
    ),
)
# Python reads nested values to a depth of about a thousand.
DEPTHS = (2, 50, 400, 700, 900, 960, 980, 990, 1000, 1100, 20_000)


def mutate_bytes(random: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return `data` with one to a few changes; `others` may lend a piece of theirs."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(changed) + 1)
        size = min(len(changed) - at, random.choice((1, 1, 2, 4, 8, 64, 1024)))
        match random.randrange(9):
            case 0 if changed:
                changed[at - 1] ^= 1 << random.randrange(8)
            case 1 if changed:
                changed[at - 1] = random.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x5C, 0x7B, 0x7D, 0x2C))
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                changed[at:at] = random.randbytes(size)
            case 5:
                width = random.choice((1, 2, 4, 8))
                number = random.choice(INTEGERS) % (1 << 8 * width)
                changed[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
            case 6:
                del changed[at:]
            case 7 if others:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                changed[at : at + size] = other[start : start + size]
            case _:
                changed[at:at] = random.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(changed)


def mutate_text(random: Random, text: str) -> str:
    """Return a text with a piece cut, doubled, moved or put in."""
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(text) + 1)
        piece = text[at : at + random.choice((1, 1, 2, 5))]
        match random.randrange(5):
            case 0:
                text = text[:at] + text[at + len(piece) :]
            case 1:
                text = text[:at] + piece + text[at:]
            case 2:
                text = text[:at] + random.choice(TEXTS) + text[at:]
            case 3:
                text = text[:at] + random.choice("=,;.+-eE0123456789 \tabz_{}[]()*|?\\") + text[at:]
            case _:
                text = text[at:] + text[:at]
    return text


def nested(random: Random) -> Any:
    """Return a value that is nested, from a little to far too deep."""
    value: Any = random.choice((1, "a", {}, []))
    named = random.random() < 0.5
    for _ in range(random.choice(DEPTHS[:-1])):
        value = {"a": value} if named else [value]
    return value


def json_value(random: Random) -> Any:
    """Return a value of JSON, or one of those that Python writes and JSON does not have."""
    match random.randrange(8):
        case 0:
            return random.choice((None, True, False, [], {}, [[]], [None], {"": None}))
        case 1:
            return random.choice(INTEGERS)
        case 2:
            return random.choice(DOUBLES)
        case 3 | 4:
            return random.choice(TEXTS)
        case 5:
            return [json_value(random) for _ in range(random.randrange(4))]
        case 6:
            return {random.choice(TEXTS): json_value(random) for _ in range(random.randrange(4))}
        case _:
            return nested(random) if random.random() < 0.1 else random.random() * 100


def mutate_json(random: Random, value: Any) -> Any:
    """Return a value with one node replaced, taken away, renamed, doubled or put elsewhere."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        if isinstance(value, str) and random.random() < 0.5:
            return mutate_text(random, value)
        if type(value) in (int, float) and random.random() < 0.5:
            return value + random.choice((-1, 1, 0.5, 10**9)) if abs(value) < 1e300 else 0
        return json_value(random)
    if isinstance(value, list):
        index = random.randrange(len(value))
        before, item, after = value[:index], value[index], value[index + 1 :]
        match random.randrange(6):
            case 0:
                return before + after
            case 1:
                return [*before, item, item, *after]
            case 2:
                return [*before, json_value(random), item, *after]
            case 3:
                return value * random.choice((2, 30))
            case _:
                return [*before, mutate_json(random, item), *after]
    name = random.choice(list(value))
    rest = {key: each for key, each in value.items() if key != name}
    match random.randrange(8):
        case 0:
            return rest
        case 1:
            return {**rest, mutate_text(random, name): value[name]}
        case 2:
            return {**value, random.choice(TEXTS): json_value(random)}
        case 3:
            return {**value, name: value[random.choice(list(value))]}
        case _:
            return {**value, name: mutate_json(random, value[name])}


def write_json(random: Random, value: Any) -> bytes:
    """Return a value as a text, now and then with a member twice, too deep, or not quite JSON."""
    try:
        text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    except RecursionError:  # Written by hand, then.
        depth = random.choice(DEPTHS)
        text = '{"a":' * depth + "1" + "}" * depth
    if random.random() < 0.05 and isinstance(value, dict) and value:
        name = random.choice(list(value))
        text = f"{{{json.dumps(name)}: {random.choice(('1', 'null', '{}'))}, {text[1:]}"
    if random.random() < 0.05:
        text = mutate_text(random, text)
    return text.encode("utf-8", "surrogatepass")


def json_bytes(random: Random, data: bytes) -> bytes:
    """Return a text of JSON, mutated as a value or as bytes."""
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # A parser that takes anything has taken it.
        return mutate_bytes(random, data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = mutate_json(random, value)
    return write_json(random, value)


def safetensors_bytes(random: Random, data: bytes) -> bytes:
    """Return a safetensors file whose header lies, or whose length or data do."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [name for name in header if name != "__metadata__"]
    match random.randrange(8):
        case 0:
            return mutate_bytes(random, data)
        case 1:  # Of the numbers: NaN, infinities, others.
            return data[: 8 + length] + mutate_bytes(random, body)
        case 2:
            claimed = random.choice((0, 1, length - 1, length + 1, *INTEGERS)) % 2**64
            return claimed.to_bytes(8, "little") + data[8:]
        case 3:
            _lie(random, header, random.choice(tensors))
        case 4:  # Tensors that lie in one place, or in each other's.
            first, second = random.choices(tensors, k=2)
            header[first] = {**header[first], "data_offsets": header[second]["data_offsets"]}
        case 5:
            header["__metadata__"] = json_value(random)
        case _:
            header = mutate_json(random, header)
    text = write_json(random, header)
    return len(text).to_bytes(8, "little") + text + body


def _lie(random: Random, header: dict[str, Any], name: str) -> None:
    """Change a claim about a tensor; now and then together with what follows from it."""
    dtype, shape, (begin, end) = (header[name][k] for k in ("dtype", "shape", "data_offsets"))
    match random.randrange(6):
        case 0:
            dtype = random.choice(("F16", "BF16", "F64", "BOOL", "C64", "F4", "f32", "", None, 32))
        case 1:
            shape = [*shape[::-1]]
        case 2:
            shape = random.choice(
                ([], [0], [2**62, 2**62], [1] * 9, [-1], [1.0], [True], shape * 5)
            )
        case 3:
            begin, end = (each + random.choice((-8, -1, 0, 1, 4, 2**40)) for each in (begin, end))
        case 4:
            begin, end = random.choice(INTEGERS), random.choice(INTEGERS)
        case _:  # Half the rank, and the bytes that it needs: shorter, and so a gap behind it.
            shape = [max(1, size // 2) for size in shape]
            end = begin + (end - begin) // 4
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def mutate_message(random: Random, message: Message) -> None:
    """Change one field of a message, or of one that it holds, to something of the field's type."""
    fields: list[FieldDescriptor] = [*message.DESCRIPTOR.fields]
    field = random.choice(fields)
    if random.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.is_repeated:
        _mutate_repeated(random, message, field)
    elif field.message_type is not None:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if field.message_type.fields:
            mutate_message(random, inner)
    else:
        setattr(message, field.name, _scalar(random, field, getattr(message, field.name)))


def _mutate_repeated(random: Random, message: Message, field: FieldDescriptor) -> None:
    values: Any = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        if value.message_type is not None:
            mutate_message(random, values[_scalar(random, key)])
        else:
            values[_scalar(random, key)] = _scalar(random, value)
        return
    choice = random.randrange(5)
    if choice == 0 and values:
        del values[random.randrange(len(values))]
    elif choice == 1 and values:
        values.extend(list(values) * random.choice((1, 30)))
    elif field.message_type is None:
        values.extend(_scalar(random, field) for _ in range(random.choice((1, 1, 3, 80))))
    elif choice == 2 or not values:
        inner = values.add()
        if field.message_type.fields:
            mutate_message(random, inner)
    else:
        mutate_message(random, random.choice(values))


def _scalar(random: Random, field: FieldDescriptor, value: Any = None) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return mutate_bytes(random, value or b"")
        case FieldDescriptor.CPPTYPE_STRING:
            text = mutate_text(random, value or "a") if random.random() < 0.5 else None
            text = random.choice(TEXTS) if text is None else text
            return text.encode("utf-8", "ignore").decode()  # No half a character can be sent.
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return random.choice((*DOUBLES, random.uniform(-3, 3)))
        case FieldDescriptor.CPPTYPE_UINT64:
            return random.choice(INTEGERS) % 2**64
        case FieldDescriptor.CPPTYPE_UINT32:
            return random.choice((random.randrange(300), random.choice(INTEGERS))) % 2**32
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.choice((0, 1, 2, 3, 2**31 - 1, -1))
        case kind:
            raise NotImplementedError(f"{field.full_name} is of C++ type {kind}: mutate it too")


def message_bytes(kind: type[Message]) -> Callable[[Random, bytes], bytes]:
    """Return the mutation of messages of a kind: field by field, or as bytes on the wire."""

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.2:
            return mutate_bytes(random, data)
        message = kind.FromString(data)
        if message.DESCRIPTOR.fields:
            for _ in range(random.choice((1, 1, 2, 4))):
                mutate_message(random, message)
        return message.SerializeToString()

    return mutate
