"""Read the texts that `adapterctl score` scores and `adapterctl fit` fits on.

What a file holds is told by its content: a name may say anything, and standard input has none. JSON
is never scored as if it were text.
"""

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from superpose_client.errors import SuperposeError

_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"\s*")
# An object, or an array of anything but numbers: brackets with numbers stand in texts, too, and an
# empty pair before a text.
_JSON = re.compile(r'\s*(?:\{|\[\s*(?:[\[{"]|\]\s*\Z))')
_DECODER = json.JSONDecoder()
_AS_TEXT = 'to score it as a text, write it as a row {"text": ...}'


class ScoreFileError(SuperposeError):
    """A file holds no texts that can be scored; names the file and the line."""


@dataclass(frozen=True)
class PlacedText:
    """A text, or a question with its answer, and where it stands: the file, and with the line."""

    file: str
    place: str
    text: str | tuple[str, str]


def read_texts(name: str) -> list[PlacedText]:
    """Return what a file has to score, `-` being standard input.

    Rows are JSON objects with `question` and `answer`, or with `text`: one a line, or an array of
    them. Anything else is a text a line; blank lines are skipped. Either may be gzipped.

    Raises:
        ScoreFileError: It holds nothing, or what looks like rows but is none.
    """
    file = "standard input" if name == "-" else name
    content = _read(name, file)
    kind = Path(name.lower().removesuffix(".gz")).suffix
    if kind in (".csv", ".tsv"):
        raise ScoreFileError(f"{file}: {kind} is not read; make it JSON, an object a line")
    if kind in (".json", ".jsonl") or _JSON.match(content):
        texts = [
            PlacedText(file, place, _row(value, place)) for place, value in _values(content, file)
        ]
    else:
        texts = list(_lines(content, file))
    if not texts:
        raise ScoreFileError(f"{file} holds no text")
    return texts


def with_places(message: str, texts: Sequence[PlacedText]) -> str:
    """Return a message that counts texts, or items as the server does, with their places in it."""
    return re.sub(r"\b(?:texts|items)\[(\d+)\]", lambda found: texts[int(found[1])].place, message)


def _read(name: str, file: str) -> str:
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        if raw.startswith(_GZIP) or name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ScoreFileError(f"{file}:{line}: not UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise ScoreFileError(f"{file}: not a whole gzip file: {error}") from None


def _lines(content: str, file: str) -> Iterator[PlacedText]:
    # Not splitlines(), which breaks lines at characters that may stand inside a text.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        if _JSON.match(line) and _is_json(line):
            raise ScoreFileError(f"{place}: a row among texts; {_AS_TEXT}, as all other lines")
        yield PlacedText(file, place, line.removesuffix("\r"))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _values(content: str, file: str) -> Iterator[tuple[str, object]]:
    """Yield (place, value) of an array's items, or of values that each begin a line."""
    at = _skip(content, 0)
    array = content.startswith("[", at)
    at = _skip(content, at + array)
    line, counted = 1, 0
    while at < len(content) and not (array and content[at] == "]"):
        line, counted = line + content.count("\n", counted, at), at
        place = f"{file}:{line}"
        value, end = _decode(content, at, place)
        yield place, value
        at = _skip(content, end)
        if array and content.startswith(",", at):
            at = _skip(content, at + 1)
        elif array and not content.startswith("]", at):
            raise ScoreFileError(f"{place}: not JSON: no comma or closing bracket after this item")
        elif not array and at < len(content) and "\n" not in content[end:at]:
            raise ScoreFileError(f"{place}: not JSON: more than one value in this line; {_AS_TEXT}")
    if array and (not content.startswith("]", at) or _skip(content, at + 1) < len(content)):
        raise ScoreFileError(f"{file}: not JSON: the array is not closed, or not all; {_AS_TEXT}")


def _skip(content: str, at: int) -> int:
    space = _SPACE.match(content, at)
    assert space is not None  # it matches nothing, too
    return space.end()


def _decode(content: str, at: int, place: str) -> tuple[object, int]:
    try:
        return _DECODER.raw_decode(content, at)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        reason = str(error)
    raise ScoreFileError(f"{place}: not JSON: {reason}; {_AS_TEXT}")


def _row(value: object, place: str) -> str | tuple[str, str]:
    match value:
        case {"question": str(question), "answer": str(answer)}:
            row: tuple[str, ...] = (question, answer)
        case {"text": str(text)}:
            row = (text,)
        case _:
            raise ScoreFileError(f"{place}: needs the strings 'question' and 'answer', or 'text'")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        raise ScoreFileError(
            f"{place}: half a character, a surrogate alone: write it whole"
        ) from None
    return (row[0], row[1]) if len(row) == 2 else row[0]
