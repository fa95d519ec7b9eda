"""From what a request holds to token ids, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from superpose_adapters.scoring import EncodedText
from superpose_adapters.text_encoder import TextEncoder, TokenRefused
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import ScoreRow
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.errors import InvalidArgument
from superpose_server.inference.request import (
    Chat,
    FitRequest,
    GenerateRequest,
    Prompt,
    QuestionAnswer,
    ScoreItem,
    ScoreRequest,
)

# Characters of one text: far above any context, far below what would hold the server up.
_MAX_TEXT = 1 << 20
# It is in every chunk of a stream.
_MAX_REQUEST_ID = 256


class Encoder:
    """Checks requests against one base, and encodes them. Any thread may use it."""

    def __init__(
        self,
        texts: TextEncoder,
        tokenizer: Tokenizer,
        context: int,
        max_items: int,
        max_rows: int,
    ) -> None:
        """Encode for a base.

        Args:
            texts: Makes the ids of its texts.
            tokenizer: The base's, for conversations.
            context: Tokens of prompt and answer together.
            max_items: Items of one `ScoreRequest`.
            max_rows: Items times mixes of one.
        """
        self._texts = texts
        self._tokenizer = tokenizer
        self._context = context
        self._max_items = max_items
        self._max_rows = max_rows

    def check(self, request: GenerateRequest, prompt: int) -> None:
        """Check all of a request but its mix and its prompt, which has `prompt` tokens.

        Raises:
            InvalidArgument: Any part is wrong, or the prompt leaves no room for the answer.
        """
        if len(request.request_id) > _MAX_REQUEST_ID:
            raise InvalidArgument(
                f"request_id has {len(request.request_id)} characters: send at most "
                f"{_MAX_REQUEST_ID}",
                "REQUEST_ID_TOO_LONG",
                field="request_id",
            )
        self._check_room(prompt, request.options)
        self._check_stops(request.options.stop)
        self._check_ids(request.options.stop_token_ids, "options.stop_token_ids")
        with _refused("options.logit_bias"):
            self._texts.check_choices(request.options.logit_bias)

    def prompt(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, at least one, and no more than the context holds.

        Raises:
            InvalidArgument: There are none, or too many, or some that the base does not have.
        """
        if isinstance(prompt, str):
            _check_size(len(prompt), "prompt")
            with _refused("prompt"):
                ids = self._texts.prompt(prompt) if prompt else []
        elif isinstance(prompt, Chat):
            _check_size(sum(len(content) for _, content in prompt.turns), "chat")
            ids = self._tokenizer.encode_chat(prompt.turns)
            self._check_ids(ids, "chat")
        else:
            self._check_ids(prompt, "token_ids")
            ids = list(prompt)
        if not ids:
            raise InvalidArgument(
                "the prompt is empty: send at least one token", "PROMPT_EMPTY", field="prompt"
            )
        if len(ids) > self._context:
            raise self._too_long(len(ids))
        return ids

    def _check_room(self, prompt: int, options: SamplingParams) -> None:
        room = self._context - prompt
        if room < 1:
            raise self._too_long(prompt)
        for name, new in (
            ("max_new_tokens", options.max_new_tokens),
            ("min_new_tokens", options.min_new_tokens),
        ):
            if new is not None and new > room:
                raise InvalidArgument(
                    f"{name} is {new}: with a prompt of {prompt} tokens "
                    f"the context of {self._context} leaves {room}",
                    "MAX_NEW_TOKENS_TOO_LARGE"
                    if name == "max_new_tokens"
                    else "MIN_NEW_TOKENS_TOO_LARGE",
                    field=f"options.{name}",
                )

    def _too_long(self, prompt: int) -> InvalidArgument:
        return InvalidArgument(
            f"the prompt has {prompt} tokens but the context holds {self._context}, "
            "answer included: shorten the prompt",
            "PROMPT_TOO_LONG",
            field="prompt",
        )

    def _check_stops(self, stops: Iterable[str]) -> None:
        """Refuse what would never be met: special tokens are no text, so none is a part of any."""
        for stop in stops:
            for token in self._tokenizer.special:
                if token in stop and token != stop:
                    raise InvalidArgument(
                        f"stop is {stop!r}, but {token!r} is a special token of this base and no "
                        f"text that others could stand beside: stop at {token!r} alone",
                        "STOP_SPECIAL_TOKEN",
                        field="options.stop",
                    )

    def _check_ids(self, ids: Iterable[int], field: str) -> None:
        with _refused(field):
            self._texts.check(ids)

    def score_rows(self, request: ScoreRequest) -> list[ScoreRow]:
        """Return what is to be scored of each item.

        Raises:
            InvalidArgument: Any part of the request but its mixes is wrong.
        """
        rows = len(request.items) * len(request.mixes)
        if rows > self._max_rows:
            raise InvalidArgument(
                f"{len(request.items)} items under {len(request.mixes)} mixes are {rows} rows: "
                f"send at most {self._max_rows} at a time",
                "TOO_MANY_ROWS",
                field="mixes",
            )
        return self.rows(request, request.top_logprobs)

    def rows(self, request: ScoreRequest | FitRequest, top: int = 0) -> list[ScoreRow]:
        """Return what is to be scored of each item, and the `top` likeliest tokens with it.

        Raises:
            InvalidArgument: Items, max_length or scope are wrong.
        """
        if not 1 <= len(request.items) <= self._max_items:
            raise InvalidArgument(
                f"items has {len(request.items)} texts: send 1 to {self._max_items}",
                "BAD_ITEM_COUNT",
                field="items",
            )
        length = self._context if request.max_length is None else request.max_length
        if not 2 <= length <= self._context:
            raise InvalidArgument(
                f"max_length is {length}: use 2 to {self._context}",
                "BAD_MAX_LENGTH",
                field="max_length",
            )
        rows = []
        for index, item in enumerate(request.items):
            field = f"items[{index}]"
            text = self._item(item, field, length)
            if request.scope == "answer" and text.answer_start is None:
                raise InvalidArgument(
                    f"{field} has no answer: the scope of answers takes question_answer items",
                    "BAD_SCOPE",
                    field=field,
                )
            rows.append(ScoreRow(text.ids, text.first_scored(request.scope), top))
        return rows

    def _item(self, item: ScoreItem, field: str, length: int) -> EncodedText:
        if isinstance(item, QuestionAnswer):
            _check_size(len(item.question) + len(item.answer), field)
            with _refused(field):
                return self._texts.row(item.question, item.answer, length)
        if not item:
            raise InvalidArgument(
                f"{field} is empty: send a text, a question and answer, or token ids",
                "ITEM_EMPTY",
                field=field,
            )
        if isinstance(item, str):
            _check_size(len(item), field)
            with _refused(field):
                return self._texts.text(item, length)
        self._check_ids(item, field)
        return EncodedText(tuple(item[:length]))


@contextmanager
def _refused(field: str) -> Generator[None]:
    """Refuse the field for what its ids cannot be made or used for.

    Raises:
        InvalidArgument: It holds a token that the base has no embedding or logit for, or is a row,
            which the base's tokenizer cannot encode.
    """
    try:
        yield
    except TokenRefused as error:
        raise InvalidArgument(
            f"{field} {error}: leave it out", "TOKEN_OUT_OF_RANGE", field=field
        ) from error
    except ValueError as error:
        raise InvalidArgument(f"{field}: {error}", "ROW_UNSUPPORTED", field=field) from error


def _check_size(characters: int, field: str) -> None:
    if characters > _MAX_TEXT:
        raise InvalidArgument(
            f"{field} has {characters} characters: send at most {_MAX_TEXT}",
            "TEXT_TOO_LONG",
            field=field,
        )
