"""Each bad input gets its status, reason and message, and leaves everything as it was."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from safetensors.torch import load, save
from tests.integration.harness import PROMPT, Family, LoopThread, Served, start
from tests.makers import EOS_ID, VOCABULARY, make_adapter

from superpose_client import (
    AdapterFiles,
    AlreadyExistsError,
    CallError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from superpose_client.errors import from_rpc_error
from superpose_proto.v1 import (
    adapter_pb2,
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
    server_pb2,
)
from superpose_server.runtime import Limits

CONTEXT = 1024
MAX_MIB = 1
MAX_BYTES = MAX_MIB << 20


@pytest.fixture(scope="module")
def small(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with small caps, `a`, `b` and `c` pushed, and a=1 as default mix."""
    served = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("bad") / "state",
        limits=Limits(max_domains_in_mix=2, max_score_items=256, max_score_rows=512),
        max_rank=16,
        max_adapter_mib=MAX_MIB,
    )
    gpt2.push_all(served.client)
    served.client.add("a")
    yield served
    served.stop()


@dataclass(frozen=True)
class Case:
    """A call, and how it must be refused."""

    call: Callable[[Served], Any]
    error: type[CallError]
    reason: str
    message: str
    field: str | None = None


def typed(call: Callable[[Served], Any], served: Served) -> None:
    """Make a call; what a raw stub raises becomes what the client would raise."""
    try:
        call(served)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def check_refused(served: Served, case: Case) -> None:
    before = served.fingerprint()
    with pytest.raises(case.error, match=case.message) as caught:
        typed(case.call, served)
    assert caught.value.reason == case.reason
    assert [violation.field for violation in caught.value.field_violations] == (
        [] if case.field is None else [case.field]
    )
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert served.fingerprint() == before


def _set_raw(*entries: tuple[str, float]) -> Callable[[Served], Any]:
    request = mix_pb2.SetMixRequest()
    request.mix.SetInParent()
    for domain, weight in entries:
        request.mix.entries.add(domain=domain, weight=weight)
    return lambda served: mix_pb2_grpc.MixServiceStub(served.channel).SetMix(request)


def _score_raw(request: inference_pb2.ScoreRequest) -> Callable[[Served], Any]:
    return lambda served: inference_pb2_grpc.InferenceServiceStub(served.channel).Score(request)


def _generate_under(mix: dict[str, float]) -> Callable[[Served], Any]:
    return lambda served: served.client.generate(PROMPT, mix=mix)


MIXES = {
    "unknown domain added": Case(
        lambda s: s.client.add("nobody"),
        NotFoundError,
        "DOMAIN_NOT_FOUND",
        r"no adapter is loaded as 'nobody': push it first \(loaded: a, b, c\)",
    ),
    "unknown domain set": Case(
        lambda s: s.client.set({"a": 1, "nobody": 1}),
        NotFoundError,
        "DOMAIN_NOT_FOUND",
        "no adapter is loaded as 'nobody'",
    ),
    "unknown domain analysed": Case(
        lambda s: s.client.analyze({"nobody": 1}), NotFoundError, "DOMAIN_NOT_FOUND", "nobody"
    ),
    "unknown domain in a request": Case(
        _generate_under({"nobody": 1}), NotFoundError, "DOMAIN_NOT_FOUND", "nobody"
    ),
    "absent domain removed": Case(
        lambda s: s.client.remove("b"),
        NotFoundError,
        "DOMAIN_NOT_IN_MIX",
        "'b' is not in the default mix, which holds a",
    ),
    "domain added twice": Case(
        lambda s: s.client.add("a"), AlreadyExistsError, "DOMAIN_IN_MIX", "a is in the default mix"
    ),
    "domain named twice": Case(
        _set_raw(("a", 1), ("b", 1), ("a", 1)),
        InvalidArgumentError,
        "INVALID_MIX",
        "a is named twice: name each domain once",
        "mix",
    ),
    "domain named twice, once with 0": Case(
        _set_raw(("a", 1), ("a", 0)), InvalidArgumentError, "INVALID_MIX", "named twice", "mix"
    ),
    "too many domains": Case(
        lambda s: s.client.set({"a": 1, "b": 1, "c": 1}),
        InvalidArgumentError,
        "TOO_MANY_DOMAINS",
        "has 3 domains: use at most 2",
        "mix",
    ),
    "mix absent": Case(
        lambda s: mix_pb2_grpc.MixServiceStub(s.channel).SetMix(mix_pb2.SetMixRequest()),
        InvalidArgumentError,
        "MIX_ABSENT",
        "mix is absent",
        "mix",
    ),
    "zero added": Case(
        lambda s: s.client.add("b", 0), InvalidArgumentError, "INVALID_WEIGHT", "is 0", "weight"
    ),
}
for _name, _weight in (
    ("NaN", math.nan),
    ("infinite", math.inf),
    ("minus infinite", -math.inf),
    ("1e300", 1e300),
    ("just too large", -10000.1),
):
    MIXES[f"{_name} weight added"] = Case(
        lambda s, weight=_weight: s.client.add("b", weight),  # type: ignore[misc]
        InvalidArgumentError,
        "INVALID_WEIGHT",
        r"weight of b is (nan|-?inf|1e\+300|-10000\.1): use a",
        "weight",
    )
    MIXES[f"{_name} weight set"] = Case(
        lambda s, weight=_weight: s.client.set({"a": 1, "b": weight}),  # type: ignore[misc]
        InvalidArgumentError,
        "INVALID_MIX",
        r"weight of b is (nan|-?inf|1e\+300|-10000\.1): use a",
        "mix",
    )
    MIXES[f"{_name} weight in a request"] = Case(
        _generate_under({"b": _weight}), InvalidArgumentError, "INVALID_MIX", "weight of b", "mix"
    )
for _name in ("", "A", "a b", "a=1", "../a", "/etc/passwd", "ä", "-a", "a" * 65, "a\n", "a\0"):
    MIXES[f"set {_name!r}"] = Case(
        _set_raw((_name, 1.0)),
        InvalidArgumentError,
        "INVALID_MIX",
        "is not a valid name: use 1 to 64 characters of a-z 0-9",
        "mix",
    )
    MIXES[f"add {_name!r}"] = Case(
        lambda s, name=_name: s.client.add(name),  # type: ignore[misc]
        InvalidArgumentError,
        "INVALID_DOMAIN",
        "is not a valid name",
        "domain",
    )


@pytest.mark.parametrize("case", MIXES.values(), ids=MIXES)
def test_a_bad_mix_is_refused(small: Served, case: Case) -> None:
    check_refused(small, case)


@dataclass(frozen=True)
class BadGeneration:
    """A prompt and options, and how they must be refused."""

    reason: str
    message: str
    field: str
    prompt: Any = PROMPT
    options: Any = dataclasses.field(default_factory=dict)


def _sampling(name: str, value: Any, message: str) -> BadGeneration:
    return BadGeneration(
        "INVALID_SAMPLING", message, f"options.{name}", options={name: value, "max_new_tokens": 4}
    )


GENERATIONS = {
    "prompt empty": BadGeneration("PROMPT_EMPTY", "the prompt is empty", "prompt", ""),
    "token ids empty": BadGeneration("PROMPT_EMPTY", "the prompt is empty", "prompt", []),
    "prompt too long": BadGeneration(
        "PROMPT_TOO_LONG",
        f"the prompt has {CONTEXT} tokens but the context holds {CONTEXT}, answer included",
        "prompt",
        "x" * CONTEXT,
    ),
    "prompt beyond all contexts": BadGeneration(
        "TEXT_TOO_LONG", "prompt has 1048577 characters", "prompt", "x" * ((1 << 20) + 1)
    ),
    "request id too long": BadGeneration(
        "REQUEST_ID_TOO_LONG",
        "request_id has 257 characters: send at most 256",
        "request_id",
        options={"request_id": "r" * 257},
    ),
    "max_new_tokens 0": BadGeneration(
        "INVALID_SAMPLING",
        "max_new_tokens is 0: use at least 1",
        "options.max_new_tokens",
        options={"max_new_tokens": 0},
    ),
    "max_new_tokens huge": BadGeneration(
        "MAX_NEW_TOKENS_TOO_LARGE",
        f"max_new_tokens is 4294967295: .* leaves {CONTEXT - len(PROMPT)}",
        "options.max_new_tokens",
        options={"max_new_tokens": 2**32 - 1},
    ),
    "one more than fits": BadGeneration(
        "MAX_NEW_TOKENS_TOO_LARGE",
        "leaves 4",
        "options.max_new_tokens",
        [65] * (CONTEXT - 4),
        {"max_new_tokens": 5},
    ),
    "token out of range": BadGeneration(
        "TOKEN_OUT_OF_RANGE",
        f"holds token {VOCABULARY}, and the base has embeddings for {VOCABULARY} tokens alone",
        "token_ids",
        [1, VOCABULARY],
    ),
    "stop token out of range": BadGeneration(
        "TOKEN_OUT_OF_RANGE",
        "holds token 4294967295",
        "options.stop_token_ids",
        options={"stop_token_ids": [2**32 - 1]},
    ),
    "bias of a token without a logit": BadGeneration(
        "TOKEN_OUT_OF_RANGE",
        r"options\.logit_bias holds token 4294967295, and the base has logits for \d+ tokens",
        "options.logit_bias",
        options={"logit_bias": {3: 1.0, 2**32 - 1: 1.0}},
    ),
    "chat without a template": BadGeneration(
        "NO_CHAT_TEMPLATE",
        "no chat template: send a prompt instead",
        "chat",
        [{"role": "user", "content": "hello"}],
    ),
    "min above max": _sampling("min_new_tokens", 5, "min_new_tokens is 5: use from 0 to max"),
    "17 stop strings": _sampling("stop", list("x" * 17), "stop is 17 strings: use at most 16"),
    "stop string empty": _sampling("stop", [""], "stop is 0 characters: use 1 to 256"),
    "21 likeliest tokens": _sampling("top_logprobs", 21, "top_logprobs is 21: use from 0 to 20"),
    "bias too large": _sampling("logit_bias", {3: 101.0}, "logit_bias is 101.0 for token 3"),
    "stop string too long": _sampling("stop", ["x" * 257], "257 characters"),
}
for _value in (-0.1, math.nan, math.inf, 1e300):
    GENERATIONS[f"temperature {_value}"] = _sampling(
        "temperature", _value, r"temperature is .*: use from 0 \(greedy\) to 100"
    )
for _value in (0.0, -1.0, 1.1, math.nan, math.inf):
    GENERATIONS[f"top_p {_value}"] = _sampling(
        "top_p", _value, "top_p is .*: use above 0 and at most 1"
    )


@pytest.mark.parametrize("bad", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("streamed", [False, True], ids=["generate", "stream"])
def test_a_bad_generation_is_refused(small: Served, bad: BadGeneration, streamed: bool) -> None:
    def call(served: Served) -> Any:
        if streamed:
            return list(served.client.stream(bad.prompt, **bad.options))
        return served.client.generate(bad.prompt, **bad.options)

    case = Case(call, InvalidArgumentError, bad.reason, bad.message, bad.field)
    check_refused(small, case)


def test_a_generation_without_any_input_is_refused(small: Served) -> None:
    def call(served: Served) -> Any:
        stub = inference_pb2_grpc.InferenceServiceStub(served.channel)
        return stub.Generate(inference_pb2.GenerateRequest())

    case = Case(call, InvalidArgumentError, "PROMPT_EMPTY", "the prompt is empty", "prompt")
    check_refused(small, case)


SCORES = {
    "no items": Case(
        _score_raw(inference_pb2.ScoreRequest()),
        InvalidArgumentError,
        "BAD_ITEM_COUNT",
        "items has 0 texts: send 1 to 256",
        "items",
    ),
    "257 items": Case(
        _score_raw(inference_pb2.ScoreRequest(items=[inference_pb2.ScoreItem(text="ab")] * 257)),
        InvalidArgumentError,
        "BAD_ITEM_COUNT",
        "items has 257 texts",
        "items",
    ),
    "too many rows": Case(
        _score_raw(
            inference_pb2.ScoreRequest(
                items=[inference_pb2.ScoreItem(text="ab")] * 171, mixes=[mix_pb2.Mix()] * 3
            )
        ),
        InvalidArgumentError,
        "TOO_MANY_ROWS",
        "171 items under 3 mixes are 513 rows: send at most 512",
        "mixes",
    ),
    "mix and mixes": Case(
        lambda s: s.client.score(["abc"], mix="a", mixes=["b"]),
        InvalidArgumentError,
        "MIX_GIVEN_TWICE",
        "mix and mixes are both given",
        "mixes",
    ),
    "a bad one of several mixes": Case(
        lambda s: s.client.score(["abc"], mixes=["a", {"b": 1e9}]),
        InvalidArgumentError,
        "INVALID_MIX",
        "weight of b is 1000000000.0",
        "mixes[1]",
    ),
    "no domains": Case(
        lambda s: list(s.client.fit(["ab", "cd"], [])),
        InvalidArgumentError,
        "BAD_DOMAIN_COUNT",
        "domains has 0 names",
        "domains",
    ),
    "a domain twice": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a", "b", "a"])),
        InvalidArgumentError,
        "DOMAIN_TWICE",
        "names a twice",
        "domains",
    ),
    "low above high": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a"], low=2, high=1)),
        InvalidArgumentError,
        "BAD_BOUNDS",
        "low must be below high",
        "low",
    ),
    "no bound": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a"], high=math.nan)),
        InvalidArgumentError,
        "BAD_BOUNDS",
        "weight of bound high is nan",
        "high",
    ),
    "penalty below 0": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a"], penalty=-1)),
        InvalidArgumentError,
        "BAD_PENALTY",
        "penalty is -1",
        "penalty",
    ),
    "budget 0": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a"], budget=0)),
        InvalidArgumentError,
        "BAD_BUDGET",
        "budget is 0: use 1 to 512",
        "budget",
    ),
    "fit on twins": Case(
        lambda s: list(s.client.fit(["ab 1", "ab 2"], ["a"])),
        InvalidArgumentError,
        "TOO_FEW_ROWS",
        "items hold 1 different rows",
        "items",
    ),
    "fit on nothing": Case(
        lambda s: list(s.client.fit([], ["a"])),
        InvalidArgumentError,
        "BAD_ITEM_COUNT",
        "items has 0 texts",
        "items",
    ),
    "fit of an unknown domain": Case(
        lambda s: list(s.client.fit(["ab", "cd"], ["a", "nope"])),
        NotFoundError,
        "DOMAIN_NOT_FOUND",
        "nope",
    ),
    "empty text": Case(
        lambda s: s.client.score(["abc", ""]),
        InvalidArgumentError,
        "ITEM_EMPTY",
        r"texts\[1\] is empty",
        "texts[1]",
    ),
    "no item kind": Case(
        _score_raw(inference_pb2.ScoreRequest(items=[inference_pb2.ScoreItem()])),
        InvalidArgumentError,
        "ITEM_EMPTY",
        r"items\[0\] is empty",
        "items[0]",
    ),
    "answer of a text": Case(
        lambda s: s.client.score([("q", "a"), "text"], scope="answer"),
        InvalidArgumentError,
        "BAD_SCOPE",
        r"texts\[1\] has no answer",
        "texts[1]",
    ),
    "unknown scope": Case(
        _score_raw(
            inference_pb2.ScoreRequest(
                items=[inference_pb2.ScoreItem(text="ab")],
                scope=7,  # type: ignore[arg-type]  # what a later version may send
            )
        ),
        InvalidArgumentError,
        "BAD_SCOPE",
        "scope is 7",
        "scope",
    ),
    "token out of range": Case(
        lambda s: s.client.score([[1, 2, VOCABULARY]]),
        InvalidArgumentError,
        "TOKEN_OUT_OF_RANGE",
        f"holds token {VOCABULARY}",
        "texts[0]",
    ),
    "max_length 1": Case(
        lambda s: s.client.score(["abc"], max_length=1),
        InvalidArgumentError,
        "BAD_MAX_LENGTH",
        f"max_length is 1: use 2 to {CONTEXT}",
        "max_length",
    ),
    "max_length over the context": Case(
        lambda s: s.client.score(["abc"], max_length=CONTEXT + 1),
        InvalidArgumentError,
        "BAD_MAX_LENGTH",
        f"max_length is {CONTEXT + 1}",
        "max_length",
    ),
}


@pytest.mark.parametrize("case", SCORES.values(), ids=SCORES)
def test_a_bad_score_is_refused(small: Served, case: Case) -> None:
    check_refused(small, case)


def test_a_text_over_the_context_is_scored_as_far_as_it_fits(small: Served) -> None:
    scored = small.client.score(["x" * (3 * CONTEXT), "abc"], logprobs=True)
    assert [item.tokens for item in scored.items] == [CONTEXT - 1, 2]
    assert len(scored.items[0].logprobs) == CONTEXT - 1


@dataclass
class Parts:
    """The two files of an adapter, taken apart so that a test can spoil one thing."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def files(self) -> AdapterFiles:
        return AdapterFiles(json.dumps(self.config).encode(), save(self.tensors))

    def first(self, factor: str) -> str:
        return next(key for key in self.tensors if key.endswith(f"lora_{factor}.weight"))


def parts(folder: Path) -> Parts:
    files = AdapterFiles.read(folder)
    return Parts(json.loads(files.config), load(files.tensors))


Spoil = Callable[[Parts], AdapterFiles | None]


def _config(**fields: Any) -> Spoil:
    def spoil(adapter: Parts) -> None:
        adapter.config.update(fields)

    return spoil


def _drop(adapter: Parts) -> None:
    del adapter.tensors[adapter.first("B")]


def _add(adapter: Parts) -> None:
    adapter.tensors["base_model.model.transformer.h.9.attn.c_attn.lora_A.weight"] = torch.ones(2)


def _reshape(adapter: Parts) -> None:
    key = adapter.first("A")
    adapter.tensors[key] = adapter.tensors[key].T.contiguous()


def _poison(value: float) -> Spoil:
    def spoil(adapter: Parts) -> None:
        adapter.tensors[adapter.first("A")][0, 0] = value

    return spoil


def _zero(adapter: Parts) -> None:
    for key, tensor in adapter.tensors.items():
        if "lora_B" in key:
            tensor.zero_()


def _pickle(adapter: Parts) -> AdapterFiles:
    stream = io.BytesIO()
    torch.save(adapter.tensors, stream)
    return AdapterFiles(adapter.files().config, stream.getvalue())


def _old_pickle(adapter: Parts) -> AdapterFiles:
    return AdapterFiles(adapter.files().config, pickle.dumps({"a": 1}))


def _truncate(adapter: Parts) -> AdapterFiles:
    files = adapter.files()
    return AdapterFiles(files.config, files.tensors[:-1])


def _swell(adapter: Parts) -> AdapterFiles:
    files = adapter.files()
    return AdapterFiles(files.config, files.tensors.ljust(MAX_BYTES + 1, b"\0"))


def _retarget(adapter: Parts) -> None:
    """Let the adapter be one of the tied lm_head, whole in every other way."""
    adapter.config["target_modules"] = ["lm_head"]
    adapter.tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32),
        "base_model.model.lm_head.lora_B.weight": torch.ones(VOCABULARY, 4),
    }


ADAPTERS: dict[str, tuple[Spoil, str, str]] = {
    "missing tensor": (_drop, "TENSOR_MISSING", r"1 tensors are missing .*lora_B"),
    "surplus tensor": (_add, "TENSOR_SURPLUS", r"no use for \(.*h\.9"),
    "wrong shape": (_reshape, "SHAPE_MISMATCH", r"lora_A.* has shape \(\d+, 4\) where"),
    "NaN": (_poison(math.nan), "NOT_FINITE", "lora_A.* holds NaN or infinity"),
    "infinity": (_poison(-math.inf), "NOT_FINITE", "lora_A.* holds NaN or infinity"),
    "all-zero B": (_zero, "ZERO_EFFECT", "every delta is zero"),
    "pickle": (_pickle, "PICKLE_REFUSED", "pickle files are refused"),
    "old pickle": (_old_pickle, "PICKLE_REFUSED", "pickle files are refused"),
    "truncated": (_truncate, "FILE_CORRUPT", "save or copy it again"),
    "not an adapter": (
        lambda parts: AdapterFiles(parts.files().config, b"hello"),
        "FILE_CORRUPT",
        "adapter_model.safetensors",
    ),
    "no tensors": (
        lambda parts: AdapterFiles(parts.files().config, b""),
        "FILE_CORRUPT",
        "adapter_model.safetensors",
    ),
    "config is no JSON": (
        lambda parts: AdapterFiles(b"{", parts.files().tensors),
        "CONFIG_INVALID",
        "is not JSON",
    ),
    "over the byte cap": (
        _swell,
        "TOO_LARGE",
        f"larger than the limit of {MAX_BYTES} bytes.*--max-adapter-mib",
    ),
    "DoRA": (_config(use_dora=True), "UNSUPPORTED_FEATURE", "use_dora is true"),
    "bias": (_config(bias="all"), "UNSUPPORTED_FEATURE", 'bias is "all"'),
    "LoRA bias": (_config(lora_bias=True), "UNSUPPORTED_FEATURE", "lora_bias is true"),
    "PiSSA": (_config(init_lora_weights="pissa"), "UNSUPPORTED_FEATURE", "pissa"),
    "PiSSA, faster": (_config(init_lora_weights="pissa_niter_4"), "UNSUPPORTED_FEATURE", "pissa"),
    "OLoRA": (_config(init_lora_weights="olora"), "UNSUPPORTED_FEATURE", "olora"),
    "modules_to_save": (
        _config(modules_to_save=["lm_head"]),
        "UNSUPPORTED_FEATURE",
        "modules_to_save is",
    ),
    "unknown field": (_config(new_method=3), "UNSUPPORTED_FEATURE", "field 'new_method'"),
    "tied lm_head": (_retarget, "TIED_PARAMETER", "lm_head"),
    "module that is not there": (
        _config(target_modules=["q_proj"]),
        "TARGET_NOT_FOUND",
        "q_proj",
    ),
}


@pytest.mark.parametrize(("spoil", "reason", "message"), ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_a_bad_adapter_is_refused(
    small: Served, gpt2: Family, spoil: Spoil, reason: str, message: str, replace: bool
) -> None:
    """With `replace` it is pushed under the name of an adapter in the default mix."""
    adapter = parts(gpt2.adapters["c"])
    files = spoil(adapter) or adapter.files()
    listed = small.client.adapters()
    name = "a" if replace else "new"
    check_refused(
        small,
        Case(
            lambda served: served.client.push(name, files, replace=replace),
            FailedPreconditionError,
            reason,
            f"^{name}: .*{message}",
        ),
    )
    assert small.client.adapters() == listed


def test_an_adapter_over_the_rank_cap_is_refused(
    small: Served, gpt2: Family, tmp_path: Path
) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "high", r=17, target_modules=["attn.c_proj"])
    check_refused(
        small,
        Case(
            lambda served: served.client.push("high", folder),
            FailedPreconditionError,
            "RANK_TOO_HIGH",
            "has rank 17: the limit is 16.*--max-rank",
        ),
    )


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../up", "/etc", "/etc/passwd", "a/b", "a\\b", "~", ".hidden", "", "A", "a\0b"],
)
def test_a_name_cannot_leave_the_store(small: Served, gpt2: Family, name: str) -> None:
    check_refused(
        small,
        Case(
            lambda served: served.client.push(name, gpt2.adapters["c"]),
            InvalidArgumentError,
            "INVALID_DOMAIN",
            "is not a valid name",
            "domain",
        ),
    )


UNARY = (
    *("InferenceService/Generate", "InferenceService/Score"),
    *("MixService/AddDomain", "MixService/RemoveDomain", "MixService/SetMix"),
    *("MixService/GetMix", "MixService/AnalyzeMix", "MixService/VerifyWeights"),
    *("MixService/NameMix", "MixService/UnnameMix", "MixService/ListNamedMixes"),
    *("AdapterService/ListAdapters", "AdapterService/GetAdapter"),
    *("AdapterService/PushAdapter", "AdapterService/DeleteAdapter"),
    "AdapterService/MergeAdapters",
    "ServerService/GetServerInfo",
)


def calls_in_bytes(channel: Any) -> Iterator[tuple[str, Callable[[bytes], Any]]]:
    """Every method of every service, each with a call that sends bytes as they are."""
    for name in (*(f"superpose.v1.{method}" for method in UNARY), "grpc.health.v1.Health/Check"):
        yield name, channel.unary_unary(f"/{name}")
    for name in (
        *("superpose.v1.InferenceService/GenerateStream", "superpose.v1.InferenceService/FitMix"),
        "superpose.v1.MixService/WatchMix",
        "grpc.health.v1.Health/Watch",
    ):
        yield name, partial(_stream, channel.unary_stream(f"/{name}"))
    for version in ("v1", "v1alpha"):
        name = f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        yield name, partial(_stream_of_one, channel.stream_stream(f"/{name}"))


def _stream(call: Any, data: bytes) -> list[bytes]:
    return list(call(data))


def _stream_of_one(call: Any, data: bytes) -> list[bytes]:
    return list(call(iter([data])))


def test_every_method_is_tried_in_bytes(small: Served) -> None:
    served = {
        f"{service.full_name}/{method.name}"
        for file in (inference_pb2, mix_pb2, adapter_pb2, server_pb2, health_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    tried = {name for name, _ in calls_in_bytes(small.channel)}
    assert {name for name in tried if "reflection" not in name} == served


# Cut short in a field; and where field 1 is a string, one that is not UTF-8.
@pytest.mark.parametrize("data", [b"\x0a\x05ab", b"\xff", b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_request_are_an_invalid_argument(small: Served, data: bytes) -> None:
    before = small.fingerprint()
    texts = {  # Methods whose field 1 is a string.
        *("Generate", "GenerateStream", "AddDomain", "RemoveDomain", "GetAdapter", "PushAdapter"),
        *("DeleteAdapter", "MergeAdapters", "NameMix", "UnnameMix"),
        *("Check", "Watch", "ServerReflectionInfo"),
    }
    for name, call in calls_in_bytes(small.channel):
        if data[-1:] == b"\xfe" and name.rpartition("/")[2] not in texts:
            continue
        with pytest.raises(grpc.RpcError) as caught:
            call(data)
        error = from_rpc_error(caught.value)
        assert type(error) is InvalidArgumentError, (name, error.code)
        assert error.reason == "REQUEST_UNREADABLE"
        assert "not UTF-8" in error.message
    assert small.fingerprint() == before


def test_the_end_of_text_token_is_a_prompt(small: Served) -> None:
    """The table above refuses much; this is at the edge and is served."""
    generation = small.client.generate(
        [EOS_ID] * (CONTEXT - 4), max_new_tokens=4, ignore_eos=True, temperature=1e-50, top_p=1e-9
    )
    assert generation.usage.completion_tokens == 4
