"""Rows to train on: from files or the Hub, split, sampled and encoded."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superpose_adapters.qa import Columns, Row, file_sha256, read_rows, row_of, split_rows
from superpose_adapters.scoring import EncodedText
from superpose_adapters.text_encoder import TextEncoder, TokenRefused
from superpose_train.options import Options

# owner/name or owner/name:configuration, as the Hub allows them.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?", re.ASCII)
_FILE_SUFFIXES = (".jsonl", ".json", ".gz")


@dataclass(frozen=True)
class Rows:
    """Encoded rows by part, of all sources together, with what the record says of them.

    Attributes:
        files: The sources.
        special_tokens: What stands before every row, as the base's tokenizer puts it there.
    """

    train: list[EncodedText]
    validation: list[EncodedText]
    test: list[EncodedText]
    files: list[dict[str, Any]]
    special_tokens: list[str]


def is_hub_id(source: str | Path) -> bool:
    """Return whether a source names a Hub dataset: like owner/name, and no file here."""
    return (
        isinstance(source, str)
        and _HUB_ID.fullmatch(source) is not None
        and not source.endswith(_FILE_SUFFIXES)
        and not Path(source).exists()
    )


def check_sources(options: Options) -> None:
    """Refuse files that do not exist, before a base is loaded, which may take minutes.

    Raises:
        ValueError: naming the file.
    """
    for source in options.data:
        if not is_hub_id(source) and not Path(source).is_file():
            raise ValueError(f"{source}: no such file; check the path")


def read_data(options: Options, encoder: TextEncoder) -> Rows:
    """Read, split and encode every source; limits of rows hold for each of them.

    A training row without a token to train on (with --loss-scope answer, one whose question fills
    --max-length) is left out and counted.

    Raises:
        ValueError: a bad row, one with a token that the base has no embedding for, or a source of
            which a part is empty.
    """
    parts: dict[str, list[EncodedText]] = {"train": [], "validation": [], "test": []}
    files: list[dict[str, Any]] = []
    columns = (options.question_column, options.answer_column)
    for source, limit in zip(options.data, options.row_limits, strict=True):
        rows, described = _read(source, columns)
        split = split_rows(rows)
        counts = {}
        for part, encoded in parts.items():
            most = limit if part == "train" else options.max_eval_rows
            chosen = _sample(getattr(split, part), most, options.seed)
            if not chosen:
                raise ValueError(
                    f"{source}: no row falls into the {part} part of the 80:10:10 split; "
                    "give more rows"
                )
            texts = [
                encode(encoder, row, source, options.max_length, options.template) for row in chosen
            ]
            scored = [text for text in texts if _scored(text, options)]
            if not scored:
                raise ValueError(
                    f"{source}: no answer of the {part} part begins within --max-length "
                    f"{options.max_length} tokens; raise it or use --loss-scope all"
                )
            encoded += scored
            counts[part] = len(scored)
            if len(scored) < len(texts):
                described.setdefault("rows_without_answer", {})[part] = len(texts) - len(scored)
        files.append({**described, "rows": counts})
    return Rows(**parts, files=files, special_tokens=encoder.tokens_before)


def encode(
    encoder: TextEncoder, row: Row, source: str | Path, max_length: int, template: str
) -> EncodedText:
    """Return the tokens of a row.

    Raises:
        ValueError: It holds a token that the base has no embedding for; names the source.
    """
    try:
        return encoder.row(row.question, row.answer, max_length, template)
    except TokenRefused as error:
        raise ValueError(
            f"{source}: the row with the question {row.question[:80]!r} {error}: write it otherwise"
        ) from error


def _scored(text: EncodedText, options: Options) -> bool:
    return text.first_scored(options.loss_scope) < len(text.ids)


def _read(source: str | Path, columns: Columns) -> tuple[list[Row], dict[str, Any]]:
    if is_hub_id(source):
        rows = read_hub_dataset(str(source), columns)
        return rows, {"name": str(source), "sha256": rows_sha256(rows)}
    path = Path(source)
    return read_rows(path, columns), {"name": path.name, "sha256": file_sha256(path)}


def read_hub_dataset(name: str, columns: Columns) -> list[Row]:
    """Return the rows of all parts of a Hub dataset, `owner/name` or `owner/name:configuration`.

    Its own parts are put together: the project's split decides, as it does for files.

    Raises:
        ValueError: `datasets` is missing, the dataset cannot be had, lacks a column, or is empty.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"--data {name} is a Hub dataset and needs the package `datasets`: "
            "pip install 'superpose[hub]'"
        ) from error
    identifier, _, configuration = name.partition(":")
    try:
        loaded: Any = load_dataset(identifier, configuration or None)
    except Exception as error:
        # `datasets` and what it calls raise dozens of kinds; the first line says what it was.
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"--data {name} cannot be loaded from the Hub: {first_line}") from error
    rows = [
        row_of(fields, f"{name}, part {part}, row {number}", columns)
        for part in loaded
        for number, fields in enumerate(loaded[part])
    ]
    if not rows:
        raise ValueError(f"--data {name}: the dataset has no rows")
    return rows


def rows_sha256(rows: Sequence[Row]) -> str:
    """Return the sha256 (hex) of rows as canonical JSONL: what a Hub dataset is recorded by."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.question, row.answer]).encode() + b"\n")
    return digest.hexdigest()


def _sample(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Return at most `limit` rows in the data's order: a prefix would favour the first topics."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in chosen]
