"""Build the messages that both clients send."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypedDict, TypeVar, cast

from google.protobuf.struct_pb2 import Struct

from superpose_client.errors import (
    AdapterFolderError,
    FieldViolation,
    InvalidArgumentError,
    MixChangedError,
)
from superpose_client.mix import MixLike, parse_mix
from superpose_client.results import ItemScore, MixScore, MixState, ScoreResult
from superpose_proto.v1 import inference_pb2, mix_pb2

MAX_SCORE_ITEMS = 256
MAX_SCORE_ROWS = 2048
# Bytes of tensors that any server takes, or refuses in words of its own. More may be cut off by its
# limit on messages, so it is asked before.
TAKEN_UNASKED = 16 * 2**20
_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_TRAINING = "training.json"
_MAX_TRAINING_BYTES = 2**20
_MLX_TENSORS = "adapters.safetensors"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat as {"role": ..., "content": ...}."""

ScoreText = str | tuple[str, str] | Sequence[int]
"""A text, a (question, answer) pair, or token ids."""

Scope = Literal["all", "answer"]

_Generate = TypeVar("_Generate", inference_pb2.GenerateRequest, inference_pb2.GenerateStreamRequest)


class GenerateOptions(TypedDict, total=False):
    """The options of `generate` and `stream`, as inference.proto has and explains them.

    What is left out, or None, is the server's choice: max_new_tokens 64 or what the context leaves
    if that is less, temperature 1 (0 is greedy), a random seed, all else off.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    ignore_eos: bool | None
    stop_token_ids: Sequence[int] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: bool | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    top_logprobs: int | None


class AdapterFiles(NamedTuple):
    """The two files of a PEFT folder, as bytes, and superpose-train's record if it wrote one."""

    config: bytes
    tensors: bytes
    training: bytes = b""

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> Self:
        """Read adapter_config.json and adapter_model.safetensors, as large as they are.

        Raises:
            AdapterFolderError: A file is missing, or a pickle, which is never sent.
        """
        path = adapter_folder(folder)
        record = path / _TRAINING
        # Another trainer's file may have that name, and any size.
        ours = record.is_file() and record.stat().st_size <= _MAX_TRAINING_BYTES
        return cls(
            (path / _CONFIG).read_bytes(),
            (path / _TENSORS).read_bytes(),
            record.read_bytes() if ours else b"",
        )


def adapter_folder(folder: str | PathLike[str]) -> Path:
    """Return a folder that holds the two files of an adapter in PEFT's format.

    Raises:
        AdapterFolderError: A file is missing, or a pickle, which is never sent.
    """
    path = Path(folder)
    if not path.is_dir():
        raise AdapterFolderError(f"{path} is not a folder; give the one that holds {_CONFIG}")
    for name in (_CONFIG, _TENSORS):
        if (path / name).is_file():
            continue
        pickles = sorted(file.name for file in path.glob("*.bin"))
        if name == _TENSORS and (path / _MLX_TENSORS).is_file():
            raise AdapterFolderError(
                f"{path} holds an adapter of MLX ({_MLX_TENSORS}); convert it with "
                "superpose-convert, which comes with superpose[server]"
            )
        if name == _TENSORS and pickles:
            raise AdapterFolderError(
                f"{path / pickles[0]} is a pickle, which is refused; "
                "save the adapter with safe_serialization=True"
            )
        inner = sorted(path.glob(f"*/{_CONFIG}"))
        if name == _CONFIG and inner:
            raise AdapterFolderError(
                f"{path} holds no {name}, but {inner[0].parent} does; name that folder"
            )
        raise AdapterFolderError(
            f"{path} holds no {name}; name the folder that PEFT's save_pretrained wrote"
        )
    return path


def tensors_size(adapter: Path | AdapterFiles) -> int:
    """Return the bytes of an adapter's tensors, of a folder without reading them."""
    if isinstance(adapter, AdapterFiles):
        return len(adapter.tensors)
    return (adapter / _TENSORS).stat().st_size


def mix(value: MixLike | None) -> mix_pb2.Mix | None:
    """Return the message; None, the default mix, is an absent one.

    A mapping goes as it is: what is a fit name or weight is the server's to say.
    """
    weights = parse_mix(value) if isinstance(value, str) else value
    if weights is None:
        return None
    entries = [mix_pb2.DomainWeight(domain=name, weight=w) for name, w in weights.items()]
    return mix_pb2.Mix(entries=entries)


def merge_options(options: Mapping[str, float | bool | str]) -> Struct:
    """Return the message; what is a fit option is the server's to say."""
    struct = Struct()
    struct.update(options)
    return struct


def generate(
    kind: type[_Generate],
    prompt: Prompt,
    mix_value: MixLike | None,
    request_id: str,
    min_generation: int | None,
    options: GenerateOptions,
) -> _Generate:
    """Return the request of `Generate` or `GenerateStream`, whose fields are the same."""
    request = kind(
        mix=mix(mix_value),
        options=_options(options),
        request_id=request_id,
        min_generation=min_generation,
    )
    if isinstance(prompt, str):
        request.prompt = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        messages = cast(Sequence[Mapping[str, str]], prompt)
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=message["role"], content=message["content"])
            for message in messages
        )
    else:
        request.token_ids.ids.extend(cast(Sequence[int], prompt))
        request.token_ids.SetInParent()
    return request


def _options(options: GenerateOptions) -> inference_pb2.GenerateOptions:
    message = inference_pb2.GenerateOptions()
    values: dict[str, Any] = {**options}
    for name, value in values.items():
        if name not in GenerateOptions.__annotations__:
            raise TypeError(f"unknown option {name!r}")
        # A lone string is a sequence of strings too: of its characters.
        field: dict[str, Any] = {name: [value] if isinstance(value, str) else value}
        try:
            message.MergeFrom(inference_pb2.GenerateOptions(**field))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}={value!r}: {error}") from None
    return message


class ScoreBatches:
    """One score as requests that the server takes, all under the same mix, or the same mixes.

    Iterate over the requests, `add` each response before the next request is taken, then ask for
    the `result`. The entries that the first response names are sent with all later requests: a
    change of the default mix in between does not touch them, and one of an adapter is noticed.
    """

    def __init__(
        self,
        texts: Iterable[ScoreText],
        mix_value: MixLike | None,
        max_length: int | None,
        scope: Scope,
        logprobs: bool,
        mixes: Sequence[MixLike] | None = None,
        min_generation: int | None = None,
    ) -> None:
        """Convert the texts; nothing is sent."""
        self._items = score_items(texts)
        self._template = inference_pb2.ScoreRequest(
            mix=mix(mix_value),
            max_length=max_length,
            scope=score_scope(scope),
            logprobs=logprobs,
            mixes=() if mixes is None else _mixes(mixes),
            min_generation=min_generation,
        )
        rows_a_text = max(1, len(self._template.mixes))
        self._batch = max(1, min(MAX_SCORE_ITEMS, MAX_SCORE_ROWS // rows_a_text))
        self._parts: list[ScoreResult] = []

    def __iter__(self) -> Iterator[inference_pb2.ScoreRequest]:
        """Yield the requests; one without items if there are none, for the server to refuse."""
        for start in range(0, max(len(self._items), 1), self._batch):
            request = inference_pb2.ScoreRequest()
            request.CopyFrom(self._template)
            request.items.extend(self._items[start : start + self._batch])
            yield request

    def add(self, response: inference_pb2.ScoreResponse) -> int:
        """Take the response to the last request; return how many texts are scored so far."""
        part = ScoreResult.from_proto(response)
        if not self._parts:
            if part.mixes:
                del self._template.mixes[:]
                self._template.mixes.extend(_mixes([each.mix.weights for each in part.mixes]))
            else:
                self._template.mix.CopyFrom(cast(mix_pb2.Mix, mix(part.mix.weights)))
        else:
            for before, now in zip(_blocks(self._parts[0]), _blocks(part), strict=True):
                if now.mix.digest != before.mix.digest:
                    raise MixChangedError(
                        f"an adapter changed during the score: the mix had digest "
                        f"{_short(before.mix)} at first and {_short(now.mix)} later; score again"
                    )
        self._parts.append(part)
        return sum(len(part.items) for part in self._parts)

    def counted(self, error: InvalidArgumentError) -> InvalidArgumentError:
        """Return the error of the last request, with `items[i]` in it as the `texts[j]` that it is.

        A request knows its own items only, and where they stand in it means nothing to the caller.
        """

        def named(text: str) -> str:
            return re.sub(r"\bitems\[(\d+)\]", lambda at: f"texts[{done + int(at[1])}]", text)

        done = sum(len(part.items) for part in self._parts)
        made = InvalidArgumentError(named(error.message))
        made.code, made.reason = error.code, error.reason
        made.field_violations = tuple(
            FieldViolation(named(each.field), named(each.description))
            for each in error.field_violations
        )
        return made

    def result(self) -> ScoreResult:
        """Return the joint result, with the mix, or the mixes, of the first response."""
        if len(self._parts) == 1:
            return self._parts[0]
        joint = [_joint(blocks) for blocks in zip(*map(_blocks, self._parts), strict=True)]
        several = tuple(MixScore(*each) for each in joint) if self._parts[0].mixes else ()
        return ScoreResult(*joint[0], several)


def _blocks(part: ScoreResult) -> "tuple[ScoreResult | MixScore, ...]":
    return part.mixes or (part,)


def _joint(
    blocks: "Sequence[ScoreResult | MixScore]",
) -> tuple[tuple[ItemScore, ...], int, float, MixState]:
    """Return the fields of a block that has the texts of all `blocks`, which have one mix."""
    items = tuple(item for block in blocks for item in block.items)
    tokens = sum(block.tokens for block in blocks)
    loss = -math.fsum(item.logprob for item in items) / tokens if tokens else math.nan
    return items, tokens, _exp(loss), blocks[0].mix


def _mixes(values: Sequence[MixLike]) -> list[mix_pb2.Mix]:
    """Return several mixes.

    Raises:
        ValueError: There are none, or one is the default mix, which a list cannot leave out.
    """
    if isinstance(values, str) or not values:
        raise ValueError(f"mixes={values!r}: give a list of at least one mix")
    messages = []
    for index, value in enumerate(values):
        message = mix(value)
        if message is None:
            raise ValueError(
                f"mixes[{index}] is the default mix: write it out, as mix().weights has it"
            )
        messages.append(message)
    return messages


def score_scope(scope: Scope) -> inference_pb2.ScoreScope.ValueType:
    """Return the scope as the wire has it.

    Raises:
        ValueError: There is no such scope.
    """
    if scope not in ("all", "answer"):
        raise ValueError(f"scope={scope!r}: must be 'all' or 'answer'")
    if scope == "answer":
        return inference_pb2.SCORE_SCOPE_ANSWER
    return inference_pb2.SCORE_SCOPE_ALL


def score_items(texts: Iterable[ScoreText]) -> list[inference_pb2.ScoreItem]:
    """Return the items of a request that has these texts."""
    return [_score_item(text) for text in texts]


def _score_item(text: ScoreText) -> inference_pb2.ScoreItem:
    if isinstance(text, str):
        return inference_pb2.ScoreItem(text=text)
    match list(text):
        case [str() as question, str() as answer]:
            pair = inference_pb2.QuestionAnswer(question=question, answer=answer)
            return inference_pb2.ScoreItem(question_answer=pair)
        case ids:
            tokens = inference_pb2.TokenIds(ids=cast(list[int], ids))
            return inference_pb2.ScoreItem(token_ids=tokens)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _short(state: MixState) -> str:
    return state.digest[:12]
