"""Text in, text out: prompts to token ids, and new tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from superpose_adapters.one_line import with_kind
from superpose_server.errors import InvalidArgument

# Tokens of the prompt that the text of the first new token may depend on.
_CONTEXT_TOKENS = 8


class TokenizerError(ValueError):
    """A base has no tokenizer that can be used; the message continues "base X"."""


def _reason(folder: Path, error: Exception) -> str:
    files = "copy tokenizer.json and tokenizer_config.json there from where the base came from"
    if "trust_remote_code" in str(error):
        return (
            "has a tokenizer that needs code of its own (auto_map in tokenizer_config.json), which "
            "is never run: use a base with a tokenizer.json"
        )
    if not (folder / "tokenizer.json").is_file():
        return f"has no tokenizer.json, and no other tokenizer that can be used: {files}"
    return f"has a tokenizer that cannot be used ({with_kind(error)}): {files}"


class Tokenizer:
    """The base's tokenizer."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer beside the checkpoint.

        Raises:
            TokenizerError: There is none that can be used.
        """
        try:
            # Unless told, transformers would ask on the terminal about code in the folder.
            self.inner: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # As many kinds as there are things wrong with a file.
            raise TokenizerError(_reason(folder, error)) from error
        if len(self.inner) <= len(self.inner.all_special_ids):
            # Of some classes transformers makes an empty one where there are no files at all.
            raise TokenizerError(_reason(folder, ValueError("it has no words")))
        self.eos_token_id: int | None = self.inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, special tokens added as the base wants them."""
        return list(self.inner(text)["input_ids"])

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the token ids of a conversation of (role, content) in the base's template.

        Raises:
            InvalidArgument: The base has no chat template, or the template refuses the roles.
        """
        if self.inner.chat_template is None:
            raise InvalidArgument(
                "this base has no chat template: send prompt instead of chat",
                "NO_CHAT_TEMPLATE",
                field="chat",
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            encoded = self.inner.apply_chat_template(turns, add_generation_prompt=True)
        except Exception as error:  # Templates are programs: they raise what they like.
            raise InvalidArgument(
                f"the base's chat template refuses the messages: {error}", "BAD_CHAT", field="chat"
            ) from error
        return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(
            self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


class Detokenizer:
    """Turns one row's tokens into text, piece by piece, and finds stop strings in it.

    A piece never ends within a character, and never within what may become a stop string.

    tokenizers' `DecodeStream` does the first of these and is quicker, but its texts differ. After a
    prompt that ends within a character it gives the end of the prompt again; with byte fallback it
    raises where bytes that are no character follow some that are, as a hot row may well have them;
    and half a character at the end stays in it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], prompt: Sequence[int] = ()
    ) -> None:
        """Begin the text that follows `prompt` and ends before the first of `stop`."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Decoding starts a few tokens back, since a token's text can depend on the one before (a
        # SentencePiece word at the very start has no space): text of [_start, _read) is known
        # already, text of [_start, end) minus that is new.
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._start = 0
        self._read = len(self._ids)
        self._held = ""
        self.stopped = False

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; return the text that is certain now.

        With `may_stop` false, stop strings that end in this token are ordinary text.
        """
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :], may_stop)

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        if self.stopped:
            return ""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        rest = self._release(text[len(known) :], may_stop=True)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _release(self, new: str, may_stop: bool) -> str:
        text, self._held = self._held + new, ""
        if not may_stop:
            return text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
