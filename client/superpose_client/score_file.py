"""Read the texts that `adapterctl score` scores."""

import gzip
import json
import sys
import zlib
from pathlib import Path

from superpose_client.errors import SuperposeError


class ScoreFileError(SuperposeError):
    """A file holds no texts that can be scored; names the file and the line."""


def read_texts(name: str) -> list[str | tuple[str, str]]:
    """Return the texts, or (question, answer) pairs, of a file.

    A .jsonl file has an object a line, with `question` and `answer` or with `text`; any other file
    has a text a line. Either may be gzipped (.gz), and `-` is text from standard input. Blank lines
    are skipped.
    """
    content = _read(name)
    is_json = name.removesuffix(".gz").endswith(".jsonl")
    # Not splitlines(), which breaks lines at characters that may stand inside a text.
    texts = [
        _row(line, f"{name}:{number}") if is_json else line.removesuffix("\r")
        for number, line in enumerate(content.split("\n"), start=1)
        if line.strip()
    ]
    if not texts:
        raise ScoreFileError(f"{name} holds no text")
    return texts


def _read(name: str) -> str:
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        if name.endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ScoreFileError(f"{name}:{line}: not UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise ScoreFileError(f"{name}: not a whole gzip file: {error}") from None


def _row(line: str, place: str) -> str | tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ScoreFileError(f"{place}: not JSON: {error}") from None
    match row:
        case {"question": str(question), "answer": str(answer)}:
            return question, answer
        case {"text": str(text)}:
            return text
    raise ScoreFileError(f"{place}: needs the strings 'question' and 'answer', or 'text'")
