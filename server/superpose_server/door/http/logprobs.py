"""Log-probabilities as OpenAI writes them, of which it has two forms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from superpose_server.engine.logprobs import TopLogprobs
from superpose_server.engine.token_bytes import TokenBytes
from superpose_server.engine.tokenizer import Detokenizer, Tokenizer

# What OpenAI writes for a probability of 0, as JSON has no infinity.
_LEAST = -9999.0


class ChatLogprobs:
    """The form of conversations: an object a token."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        """Write tokens by their bytes."""
        self._bytes = token_bytes

    def write(
        self, ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
    ) -> dict[str, Any]:
        """Return `logprobs` of a choice; `tops` is empty if none are asked for."""
        content = [
            {
                **self._token(token, logprob),
                "top_logprobs": [
                    self._token(*each)
                    for top in tops[at : at + 1]
                    for each in zip(top.token_ids, top.logprobs, strict=True)
                ],
            }
            for at, (token, logprob) in enumerate(zip(ids, logprobs, strict=True))
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        written = self._bytes(token)
        return {
            "token": written.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(written),
        }


class TextLogprobs:
    """The form of texts: lists, one behind the other as the text goes on."""

    def __init__(
        self, token_bytes: TokenBytes, tokenizer: Tokenizer, before: Sequence[int]
    ) -> None:
        """Begin behind the token ids `before`, whose text is not sent."""
        self._bytes = token_bytes
        self._text = Detokenizer(tokenizer, (), before)
        self._sent = 0

    def write(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[TopLogprobs | None],
    ) -> dict[str, list[Any]]:
        """Return `logprobs` of a choice for the next tokens; `tops` may be empty.

        A place without a log-probability, the first of a text, has null.
        """
        offsets = []
        for token in ids:
            offsets.append(self._sent)
            self._sent += len(self._text.push(token))
        return {
            "tokens": [self._name(token) for token in ids],
            "token_logprobs": [None if each is None else _finite(each) for each in logprobs],
            "top_logprobs": [
                None if logprob is None else self._top(token, logprob, top)
                for token, logprob, top in zip_longest(ids, logprobs, tops)
            ],
            "text_offset": offsets,
        }

    def _top(self, token: int, logprob: float, top: TopLogprobs | None) -> dict[str, float]:
        """Return the likeliest tokens and, whether it is one of them or not, the one that is there.

        Two tokens of one name are told as the likelier one.
        """
        found: dict[str, float] = {}
        if top is not None:
            for each, value in zip(top.token_ids, top.logprobs, strict=True):
                found.setdefault(self._name(each), _finite(value))
        found.setdefault(self._name(token), _finite(logprob))
        return found

    def _name(self, token: int) -> str:
        written = self._bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:  # A part of a character.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
