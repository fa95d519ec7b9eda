"""Byte tokens, in which a SentencePiece vocabulary spells the characters that it does not have.

SentencePiece decodes a run of them character by character, and a byte that is no part of one to
U+FFFD (`SentencePieceProcessor::Decode`). tokenizers decodes a run as a whole: where one byte is
no part of a character, or the last one has not come yet, every character of the run is U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from typing import Any

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4  # bytes


def byte_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that a transformers tokenizer decodes to bytes; most have none."""
    decoder = tokenizer.backend_tokenizer.decoder if tokenizer.is_fast else None
    # What becomes of one tells whether the decoder knows them.
    if decoder is None or decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    return frozenset(token for text, token in vocabulary.items() if _is_byte(text))


def decode_with_bytes(backend: Any, ids: Iterable[int]) -> str:
    """Return the text of ids, none of them special, with U+FFFD for each byte of no character.

    Args:
        backend: A `tokenizers.Tokenizer` whose decoder knows byte tokens.
        ids: Of the text. One that is no token is no text.
    """
    tokens = [token for token in map(backend.id_to_token, ids) if token is not None]
    known: list[str] = []
    for are_bytes, group in groupby(tokens, _is_byte):
        run = list(group)
        known += _without_strays(run) if are_bytes else run
    return str(backend.decoder.decode(known))


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and _BYTE_TOKEN.fullmatch(token) is not None


def _without_strays(run: list[str]) -> list[str]:
    values = bytes(int(token[3:5], 16) for token in run)
    known: list[str] = []
    while len(known) < len(run):
        at = len(known)
        length = _character_length(values[at : at + _LONGEST_CHARACTER])
        known += run[at : at + length] if length else ["\N{REPLACEMENT CHARACTER}"]
    return known


def _character_length(values: bytes) -> int:
    """Return the length of the character that `values` begin with; 0: they do not."""
    for length in range(1, len(values) + 1):
        try:
            values[:length].decode()
        except UnicodeDecodeError:
            continue
        return length
    return 0
