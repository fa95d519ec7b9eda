"""What single tokens stand for, in bytes, as log-probabilities show them.

A token may be a part of a character, so its text alone would not do: the bytes of all tokens of a
text, one behind the other, are the text.
"""

from __future__ import annotations

from transformers.convert_slow_tokenizer import bytes_to_unicode

from superpose_server.engine.byte_fallback import byte_token_ids
from superpose_server.engine.tokenizer import Tokenizer

# The bytes that the characters of a byte-level vocabulary stand for.
_BYTE_LEVEL: dict[str, int] = {each: byte for byte, each in bytes_to_unicode().items()}


class TokenBytes:
    """The bytes of a base's tokens, found once each. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find those of `tokenizer`."""
        self._tokenizer = tokenizer
        self._special: dict[int, str] = {token: text for text, token in tokenizer.special.items()}
        self._byte_ids = byte_token_ids(tokenizer.inner)
        self._found: dict[int, bytes] = {}
        # A token in the midst of a text: SentencePiece leaves the space before the first word out.
        before = tokenizer.inner.encode("a", add_special_tokens=False)
        self._before = before, tokenizer.decode(before)

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; none for an id that the vocabulary does not have."""
        found = self._found.get(token)
        if found is None:
            found = self._found[token] = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        piece: str | None = self._tokenizer.inner.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._byte_ids:
            return bytes([int(piece.removeprefix("<").removesuffix(">"), 16)])
        before, known = self._before
        text = self._tokenizer.decode([*before, token]).removeprefix(known)
        if "\N{REPLACEMENT CHARACTER}" in text and all(each in _BYTE_LEVEL for each in piece):
            return bytes(_BYTE_LEVEL[each] for each in piece)
        return text.encode()
