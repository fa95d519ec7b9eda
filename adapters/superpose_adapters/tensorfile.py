"""The safetensors format, read strictly: header first, every claim checked, data last.

A file is eight bytes of little-endian header length, a JSON header `{name: {dtype, shape,
data_offsets}}`, and the tensors' bytes without gaps or overlaps
(https://github.com/huggingface/safetensors#format). Read here, not by the library, because a bound
on what is read and an error that says what is wrong matter more for untrusted files than speed, and
because digests need the bytes of dtypes that torch may not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from superpose_adapters.strict_json import StrictJsonError, read_object

# Bits an element, by the dtype names of the format.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8
METADATA = "__metadata__"  # The one key of a header that is no tensor's.


class TensorFileError(ValueError):
    """A file that is not whole, valid safetensors."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file, and what it is.

    Attributes:
        name: The tensor's key.
        dtype: The format's name of its dtype, such as `BF16`.
        shape: Its shape; empty for a scalar.
        start: First byte, counted from the beginning of the file.
        nbytes: Number of bytes, which shape and dtype agree with.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says before its data.

    Attributes:
        entries: Its tensors, sorted by name.
        metadata: Texts of whoever wrote it, which nothing here believes.
    """

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def read_header(file: BinaryIO, size: int, max_header_bytes: int = MAX_HEADER_BYTES) -> Header:
    """Read and check the header of a file of `size` bytes.

    Raises:
        TensorFileError: The file is truncated, longer than its header says, or its header lies.
    """
    prefix = file.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise TensorFileError(f"is {size} bytes long, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > size - LENGTH_BYTES:
        raise TensorFileError(
            f"is truncated or no safetensors file: its header claims {length} bytes and "
            f"{size - LENGTH_BYTES} follow"
        )
    if length > max_header_bytes:
        raise TensorFileError(f"has a header of {length} bytes; the limit is {max_header_bytes}")
    text = file.read(length)
    if len(text) < length:
        raise TensorFileError("is truncated in its header")
    data_start = LENGTH_BYTES + length
    tensors = _parse_json(text)
    metadata = _metadata(tensors.pop(METADATA, {}))
    entries = [_entry(name, value, data_start) for name, value in tensors.items()]
    _check_cover(entries, data_start, size)
    return Header(tuple(sorted(entries, key=lambda entry: entry.name)), metadata)


def with_metadata(file: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a whole file that holds `metadata` in place of its own, in the order given.

    The library writes metadata in an order that changes from run to run, and so makes two files of
    one content.
    """
    end = LENGTH_BYTES + int.from_bytes(file[:LENGTH_BYTES], "little")
    tensors = json.loads(file[LENGTH_BYTES:end])
    tensors.pop(METADATA, None)
    # Compact, and in ASCII; the data begins at a multiple of eight, as the library has it.
    text = json.dumps({METADATA: dict(metadata), **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + file[end:]


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        return read_object(text)
    except StrictJsonError as error:
        raise TensorFileError(f"has a header that {error}") from error


def _metadata(value: Any) -> dict[str, str]:
    """Return the metadata; what the format's own library refuses is refused."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TensorFileError("has __metadata__ that is no object of texts")
    return value


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    label = repr(name[:200])
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(
            f"describes tensor {label} by other fields than dtype, shape, data_offsets"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise TensorFileError(f"gives tensor {label} the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or len(shape) > 8:
        raise TensorFileError(f"gives tensor {label} a shape that is not one")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorFileError(f"gives tensor {label} offsets that are not a range")
    begin, end = offsets
    expected = math.prod(shape) * DTYPE_BITS[dtype] // 8
    if end - begin != expected:
        raise TensorFileError(
            f"gives tensor {label} {end - begin} bytes where its shape and dtype need {expected}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, expected)


def _are_sizes(value: Any) -> bool:
    """Tell whether `value` is a list of integers from 0 to 2^53; JSON's true is not 1 here."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= 2**53 for n in value)


def _check_cover(entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Check that the tensors fill the file without gap or overlap."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.nbytes)):
        if entry.start != position:
            raise TensorFileError(
                f"has tensor {entry.name[:200]!r} at byte {entry.start} where the one before it "
                f"ends at {position}"
            )
        position += entry.nbytes
    if position > size:
        raise TensorFileError(f"is truncated: its tensors need {position} bytes and it has {size}")
    if position < size:
        raise TensorFileError(f"has {size - position} bytes that belong to no tensor")
