"""From texts to token ids: the one place where ids are made, for server, trainer and study.

The convention for a text is that of transformers' tokenizer of the base. What it puts before a text
(BOS of Llama and Gemma, nothing of GPT-2) stands before prompts, scored texts and question-answer
rows alike, so that an adapter is trained on what serving shows it. What it puts behind a text (EOS
of T5's kind) says that the text has ended: it stands behind a scored text, not behind a prompt,
which goes on, and a row ends in the end-of-text token anyhow. A text that spells the tokenizer's
first tokens itself, as chat templates do, does not get them twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from superpose_adapters.qa import TEMPLATE, prompt_text, row_text
from superpose_adapters.scoring import EncodedText


class TokenRefused(ValueError):
    """A text or a list of ids holds a token that the base has no embedding, or no logit, for.

    The message continues what names the text: "prompt" + " holds ...".
    """


class TextEncoder:
    """Makes the ids of one base's texts, all of which the base has an embedding for.

    Any thread may use it.

    Attributes:
        before: The ids that stand before every text.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        *,
        logits: int | None = None,
        special_tokens: bool = True,
    ) -> None:
        """Encode for a base.

        Args:
            tokenizer: transformers' own of the base.
            vocabulary: Rows of the base's embedding, see `vocabulary_of`.
            logits: Tokens that the base has logits for, see `logits_of`; None: the same.
            special_tokens: Put around texts what the tokenizer adds; else they stay as they are.

        Raises:
            ValueError: It encodes nothing, or adds a token that the base has no embedding for.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._logits = vocabulary if logits is None else logits
        self._special_tokens = special_tokens
        self.before, self._after = _added(tokenizer) if special_tokens else ((), ())
        try:
            self.check(chain(self.before, self._after))
        except TokenRefused as error:
            raise ValueError(
                f"what its tokenizer adds to every text {error}: give it the tokenizer that it was "
                "made with"
            ) from error

    @property
    def tokens_before(self) -> list[str]:
        """The tokens that stand before every text, as they are spelled."""
        return list(self._tokenizer.convert_ids_to_tokens(list(self.before)))

    def check(self, ids: Iterable[int]) -> None:
        """Refuse ids that the base has no embedding for.

        Raises:
            TokenRefused: naming the first such token.
        """
        self._check(ids, self._vocabulary, "embeddings")

    def check_choices(self, ids: Iterable[int]) -> None:
        """Refuse ids that the base has no logits for, which no text of it can go on with.

        Raises:
            TokenRefused: naming the first such token.
        """
        self._check(ids, self._logits, "logits")

    def _check(self, ids: Iterable[int], count: int, what: str) -> None:
        for token in ids:
            if not 0 <= token < count:
                spelled = self._tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
                raise TokenRefused(
                    f"holds token {token}{f' ({spelled!r})' if spelled else ''}, and the base has "
                    f"{what} for {count} tokens alone, counted from 0"
                )

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text that is to go on.

        Raises:
            TokenRefused: It holds a token without an embedding.
        """
        ids: list[int] = self._ids(text)["input_ids"]
        self.check(ids)
        return ids

    def text(self, text: str, max_length: int) -> EncodedText:
        """Return a plain text, cut on the right at `max_length` tokens.

        Raises:
            TokenRefused: What is left holds a token without an embedding.
        """
        _check_max_length(max_length)
        kept = (*self._ids(text)["input_ids"], *self._after)[:max_length]
        self.check(kept)
        return EncodedText(kept)

    def row(
        self, question: str, answer: str, max_length: int, template: str = TEMPLATE
    ) -> EncodedText:
        """Return a question-answer row: template text, then end-of-text, cut at `max_length`.

        The answer starts at the first token that reaches beyond the prompt, found in the encoding
        of the whole text: encoding the prompt alone may cut its end into other tokens.

        Raises:
            TokenRefused: What is left holds a token without an embedding.
            ValueError: The tokenizer has no end-of-text token with an embedding, or cannot tell
                which characters a token is of.
        """
        _check_max_length(max_length)
        encoded = self._ids(row_text(question, answer, template), offsets=True)
        ids: list[int] = encoded["input_ids"]
        prompt = len(prompt_text(question, template))
        ends = (end for _, end in encoded["offset_mapping"])
        answer_start = next((index for index, end in enumerate(ends) if end > prompt), len(ids))
        kept = (*ids, self._end_of_text())[:max_length]
        self.check(kept)
        return EncodedText(kept, answer_start)

    def _end_of_text(self) -> int:
        token: int | None = self._tokenizer.eos_token_id
        if token is None:
            raise ValueError("the base's tokenizer has no end-of-text token (eos_token)")
        try:
            self.check([token])
        except TokenRefused as error:
            raise ValueError(
                f"the end of every row {error}: give the base the tokenizer that it was made with"
            ) from error
        return token

    def _ids(self, text: str, *, offsets: bool = False) -> dict[str, Any]:
        """Return the ids of what stands before a text and of the text itself."""
        if offsets and not self._tokenizer.is_fast:
            raise ValueError(
                f"the base's tokenizer ({type(self._tokenizer).__name__}) cannot tell which "
                "characters a token is of, as question-answer rows need it: use a base with a "
                "tokenizer.json"
            )
        # verbose=False: a text longer than the context is no news here, it is cut or refused
        # later. Not by the tokenizer, whose truncation is a setting that other threads would see.
        encoded = self._tokenizer(
            text,
            add_special_tokens=self._special_tokens,
            verbose=False,
            **({"return_offsets_mapping": True} if offsets else {}),
        )
        whole = encoded["input_ids"]
        first, length = 0, len(self.before)
        if length and tuple(whole[length : 2 * length]) == self.before:
            first = length
        return {
            name: list(encoded[name][first : len(whole) - len(self._after)]) for name in encoded
        }


def vocabulary_of(model: Any) -> int:
    """Return for how many tokens a transformers model has embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def logits_of(model: Any) -> int:
    """Return for how many tokens a transformers model has logits."""
    width = getattr(model.get_output_embeddings(), "out_features", None)
    return vocabulary_of(model) if width is None else int(width)


def _added(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer puts before a text and behind it."""
    special = set(tokenizer.all_special_ids)
    # Some tokenizer may not know the letter; what it drops, or takes for a special token, tells
    # nothing.
    for probe in chain("a", tokenizer.get_vocab()):
        plain = _ids_of(tokenizer, probe, special_tokens=False)
        if plain and not special.intersection(plain):
            whole = _ids_of(tokenizer, probe, special_tokens=True)
            for start in range(len(whole) - len(plain) + 1):
                end = start + len(plain)
                if whole[start:end] == plain:
                    return whole[:start], whole[end:]
    raise ValueError("the base's tokenizer encodes no text")


def _ids_of(tokenizer: Any, text: str, *, special_tokens: bool) -> tuple[int, ...]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    return tuple(ids)


def _check_max_length(max_length: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
