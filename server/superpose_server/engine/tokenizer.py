"""Messages in, text out: conversations to token ids, and new tokens to text as they come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from superpose_adapters.base.tokenizer import load_tokenizer
from superpose_server.engine.byte_fallback import byte_token_ids, decode_with_bytes
from superpose_server.engine.end_of_text import end_of_text_ids
from superpose_server.errors import InvalidArgument

# Tokens that the text of the next one may depend on: the word before it, or the bytes, at most
# three, of the character that it is a part of.
_CONTEXT_TOKENS = 4
# An end that the next token may turn into something else: the bytes of a character that is not
# whole, and CTRL's mark of a word that goes on.
_UNSURE_END = re.compile("(?:\N{REPLACEMENT CHARACTER}{1,3}|@@)\\Z")


class Tokenizer:
    """The base's tokenizer.

    Attributes:
        inner: transformers' own.
        ends: The tokens that end a text.
        special: {text: id} of the tokens that no text holds.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer beside the checkpoint.

        Raises:
            TokenizerError: There is none that can be used, or no token where one is named.
        """
        self.inner: Any = load_tokenizer(folder)
        self.ends = end_of_text_ids(folder, self.inner)
        self.special = {
            added.content: token
            for token, added in self.inner.added_tokens_decoder.items()
            if added.special
        }
        self._special_ids = frozenset(self.special.values())
        self._byte_ids = byte_token_ids(self.inner)

    @property
    def has_chat_template(self) -> bool:
        """Whether the base takes conversations."""
        return self.inner.chat_template is not None

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of a conversation of (role, content) in the base's template.

        Only the template writes control tokens: what the messages spell like one stays text.

        Raises:
            InvalidArgument: The base has no chat template, or the template refuses the roles.
        """
        if not self.has_chat_template:
            raise InvalidArgument(
                "this base has no chat template: send a prompt instead of a conversation",
                "NO_CHAT_TEMPLATE",
                field="chat",
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            encoded = self.inner.apply_chat_template(
                turns, add_generation_prompt=True, sanitize_control_tokens=True
            )
        except Exception as error:  # Templates are programs: they raise what they like.
            raise InvalidArgument(
                f"the base's chat template refuses the messages: {error}", "BAD_CHAT", field="chat"
            ) from error
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        if self._byte_ids.isdisjoint(ids):
            return str(
                self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
        return decode_with_bytes(self.inner.backend_tokenizer, self.text_ids(ids))

    def text_ids(self, ids: Iterable[int]) -> Iterator[int]:
        """Return the ids that are not special tokens."""
        return (token for token in ids if token not in self._special_ids)


class Detokenizer:
    """Turns one row's tokens into text, piece by piece, and finds stop strings in it.

    A piece never ends within a character, and never within what may become a stop string. All
    pieces are what the tokens add to the prompt's text; a character that the prompt left half is
    theirs.

    tokenizers' `DecodeStream` is quicker, but its texts differ. After a prompt that ends within a
    character it gives the end of the prompt again; with byte fallback it raises where bytes that
    are no character follow some that are, as a hot row may well have them; and half a character at
    the end stays in it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        """Begin the text that follows `prompt` and ends before the first of `stop`."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Decoding starts some tokens back, since a token's text can depend on those before (a
        # SentencePiece word at the very start has no space). Where it starts is of no matter, not
        # even within a character: what counts is by how much the text of the window grows.
        last = islice(tokenizer.text_ids(reversed(prompt)), _CONTEXT_TOKENS)
        self._window = list(last)[::-1]
        # The text of the window that is the prompt's, or was released.
        self._known = tokenizer.decode(self._window)
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; return the text that is certain now.

        With `may_stop` false, stop strings that end in this token are ordinary text.
        """
        self._window.extend(self._tokenizer.text_ids([token]))
        text = self._tokenizer.decode(self._window)
        unsure = _UNSURE_END.search(text)
        new = self._news(text, unsure.start() if unsure else len(text))
        self._narrow(text)
        return self._release(new, may_stop)

    def finish(self, *, may_stop: bool = True) -> str:
        """Return what is left when no more tokens come."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._window)
        rest = self._release(self._news(text, len(text)), may_stop)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _news(self, text: str, end: int) -> str:
        """Return what the window's text up to `end` has that was not known, and know it."""
        # The prompt's last character may have become another one: then that one is new.
        while not text.startswith(self._known):
            self._known = self._known[:-1]
        new = text[len(self._known) : end]
        self._known += new
        return new

    def _narrow(self, text: str) -> None:
        """Begin the window later, so that no step of a long text takes longer than one before."""
        if len(self._window) < 2 * _CONTEXT_TOKENS:
            return
        window = self._window[-_CONTEXT_TOKENS:]
        narrow, unknown = self._tokenizer.decode(window), text[len(self._known) :]
        if narrow.endswith(unknown):
            self._window, self._known = window, narrow.removesuffix(unknown)

    def _release(self, new: str, may_stop: bool) -> str:
        text = self._held + new
        if may_stop:
            # Those that end in what is held did so when they were ordinary text.
            ends = [
                at
                for stop in self._stop
                if (at := text.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if ends:
                self.stopped = True
                self._held = ""
                return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
