"""Question-answer data: how rows are read, written as text and split, in every part.

Server, trainer, demo and study share these definitions, so a row that one of them trains on is
never a row that another one tests on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "validation", "test"]
Columns = tuple[str, str]

TEMPLATE = "Question: {q}\nAnswer: {a}"
COLUMNS: Columns = ("question", "answer")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SPACE = re.compile(r"\s+")
# JSON can spell it, UTF-8 cannot.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answer, both non-empty."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Split:
    """Rows by part; the order within a part is that of the data."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


def check_template(template: str) -> None:
    """Refuse a template that does not hold {q} and then, at its end, {a}, each once.

    Raises:
        ValueError: saying what a template must hold.
    """
    if (
        template.count("{q}") != 1
        or template.count("{a}") != 1
        or not template.endswith("{a}")  # {q} therefore stands before it
    ):
        raise ValueError(
            f"a template must hold {{q}} once and end in its only {{a}}, got {template!r}"
        )


def prompt_text(question: str, template: str = TEMPLATE) -> str:
    """Return the template up to where the answer begins, without the spaces before the answer.

    They belong to the answer: byte-level tokenizers join a space to the answer's first word.
    """
    # The question is put in last: its own braces and spaces at its end stay as they are.
    return template.removesuffix("{a}").rstrip(" ").replace("{q}", question, 1)


def row_text(question: str, answer: str, template: str = TEMPLATE) -> str:
    """Return the template with a question and an answer in it."""
    return template.removesuffix("{a}").replace("{q}", question, 1) + answer


def read_rows(path: Path, columns: Columns = COLUMNS) -> list[Row]:
    """Read JSONL, or JSONL.gz by its suffix; further fields are ignored, blank lines skipped.

    Args:
        path: The file.
        columns: The fields that hold a row's question and its answer.

    Raises:
        ValueError: naming file, line and remedy: unreadable file, a line that is not a JSON object,
            or a question or answer that is missing, empty or no string; or a file without rows.
    """
    rows = [_row(line, f"{path}:{number}", columns) for number, line in _lines(path)]
    if not rows:
        raise ValueError(f"{path}: no rows; give JSONL with a question and an answer a line")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (1-based number, line) of the non-blank lines."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                # Decoded line by line, so that a bad byte is found in its own line. Some editors
                # begin a file with a byte order mark.
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                if text := line.decode(encoding).strip():
                    yield number, text
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; check the path") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8; convert the file") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read ({reason}); check file and suffix") from error


def _row(line: str, where: str, columns: Columns) -> Row:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON; write one JSON object a line") from error
    if not isinstance(fields, dict):
        raise ValueError(f'{where}: not a JSON object; write {{"question": ..., "answer": ...}}')
    return row_of(fields, where, columns)


def row_of(fields: Mapping[str, object], where: str, columns: Columns = COLUMNS) -> Row:
    """Return the row that a record holds in its question and answer columns.

    Raises:
        ValueError: naming `where`: a column that is missing, empty or no text.
    """
    missing = [name for name in columns if name not in fields]
    if missing:
        raise ValueError(
            f'{where}: "{missing[0]}" is missing; the columns are '
            f"{', '.join(sorted(fields)) or 'none'} (see --question-column, --answer-column)"
        )
    texts = []
    for name in columns:
        value = fields[name]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f'{where}: "{name}" is empty or no string; '
                f'every row needs a non-empty "{columns[0]}" and "{columns[1]}"'
            )
        if _SURROGATE.search(value):
            raise ValueError(
                f'{where}: "{name}" holds half a character (a surrogate such as \\ud83d alone): '
                "write the whole one"
            )
        texts.append(value)
    return Row(*texts)


def split_key(question: str) -> str:
    """Return what twins share: the case-folded question, numbers masked, white space folded."""
    return _SPACE.sub(" ", _NUMBER.sub("#", question.casefold())).strip()


def part_of(question: str) -> Part:
    """Return the part of a question: 80 % train, 10 % validation, 10 % test.

    A function of the question alone (sha256 of its `split_key`), so the same on every machine and
    whatever other rows there are; questions that differ only in case or numbers fall together.
    """
    digest = hashlib.sha256(split_key(question).encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:8], "big") % 10
    if share < 8:
        return "train"
    return "validation" if share == 8 else "test"


def split_rows(rows: Iterable[Row]) -> Split:
    """Split rows by `part_of` their question."""
    parts: dict[Part, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[part_of(row.question)].append(row)
    return Split(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]))


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a data file's bytes as they lie on the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
