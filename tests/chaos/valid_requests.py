"""A valid request to every method and endpoint, to be mutated: a few of those with much to ask."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct

from superpose_proto.v1 import adapter_pb2, inference_pb2, mix_pb2, server_pb2

_CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
_OPTIONS = inference_pb2.GenerateOptions(
    max_new_tokens=4,
    min_new_tokens=1,
    stop_token_ids=[3, 5],
    temperature=0.7,
    top_k=20,
    top_p=0.9,
    min_p=0.01,
    stop=["\n\n", "end"],
    seed=7,
    logprobs=True,
    top_logprobs=2,
    repetition_penalty=1.1,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    logit_bias={65: 2.5, 66: -100.0},
)
_MIX = mix_pb2.Mix(
    entries=[
        mix_pb2.DomainWeight(domain="a", weight=1.0),
        mix_pb2.DomainWeight(domain="b", weight=-0.25),
    ]
)
_ITEMS = [
    inference_pb2.ScoreItem(text="the sum of"),
    inference_pb2.ScoreItem(
        question_answer=inference_pb2.QuestionAnswer(question="what ?", answer="that")
    ),
    inference_pb2.ScoreItem(token_ids=inference_pb2.TokenIds(ids=[1, 2, 3])),
]
_ROWS = [
    inference_pb2.ScoreItem(
        question_answer=inference_pb2.QuestionAnswer(question=f"what {n} ?", answer=f"it is {n}")
    )
    for n in range(12)
]


@dataclass(frozen=True)
class Rpc:
    """A call over gRPC.

    Attributes:
        method: Full name, such as `superpose.v1.MixService/SetMix`.
        message: The request.
        streamed: Whether the answer is a stream.
    """

    method: str
    message: Message
    streamed: bool = False


@dataclass(frozen=True)
class Call:
    """A call over HTTP.

    Attributes:
        method: GET and so on.
        path: As the document has it.
        at: The same with its parameters filled in.
        body: Of JSON; empty: there is none.
        headers: Beside those that every call has.
    """

    method: str
    path: str
    at: str = ""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def _generate(**more: Any) -> tuple[Rpc, Rpc]:
    service = "superpose.v1.InferenceService"
    return (
        Rpc(f"{service}/Generate", inference_pb2.GenerateRequest(**more)),
        Rpc(f"{service}/GenerateStream", inference_pb2.GenerateStreamRequest(**more), True),
    )


def _struct(**values: Any) -> Struct:
    struct = Struct()
    struct.update(values)
    return struct


_INFERENCE, _MIXES = "superpose.v1.InferenceService", "superpose.v1.MixService"
_ADAPTERS = "superpose.v1.AdapterService"
GRPC: tuple[Rpc, ...] = (
    *_generate(prompt="The sum of", mix=_MIX, options=_OPTIONS, request_id="one"),
    *_generate(
        token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
        options=inference_pb2.GenerateOptions(max_new_tokens=2, ignore_eos=True, temperature=0),
    ),
    *_generate(
        chat=inference_pb2.ChatMessages(
            messages=[inference_pb2.ChatMessage(**message) for message in _CHAT]
        ),
        mix=mix_pb2.Mix(),
    ),
    Rpc(
        f"{_INFERENCE}/Score",
        inference_pb2.ScoreRequest(
            items=_ITEMS,
            mix=_MIX,
            max_length=32,
            scope=inference_pb2.SCORE_SCOPE_ALL,
            logprobs=True,
        ),
    ),
    Rpc(
        f"{_INFERENCE}/Score",
        inference_pb2.ScoreRequest(
            items=_ROWS[:2], mixes=[_MIX, mix_pb2.Mix()], scope=inference_pb2.SCORE_SCOPE_ANSWER
        ),
    ),
    Rpc(
        f"{_INFERENCE}/FitMix",
        inference_pb2.FitMixRequest(
            items=_ROWS,
            domains=["a"],
            max_length=24,
            scope=inference_pb2.SCORE_SCOPE_ANSWER,
            budget=4,
            low=-1.0,
            high=2.0,
            penalty=0.01,
            seed=3,
        ),
        True,
    ),
    Rpc(f"{_MIXES}/AddDomain", mix_pb2.AddDomainRequest(domain="c", weight=0.5)),
    Rpc(f"{_MIXES}/RemoveDomain", mix_pb2.RemoveDomainRequest(domain="c", expected_generation=3)),
    Rpc(f"{_MIXES}/SetMix", mix_pb2.SetMixRequest(mix=_MIX)),
    Rpc(f"{_MIXES}/GetMix", mix_pb2.GetMixRequest()),
    Rpc(f"{_MIXES}/WatchMix", mix_pb2.WatchMixRequest(), True),
    Rpc(f"{_MIXES}/AnalyzeMix", mix_pb2.AnalyzeMixRequest(mix=_MIX)),
    Rpc(f"{_MIXES}/VerifyWeights", mix_pb2.VerifyWeightsRequest()),
    Rpc(f"{_MIXES}/NameMix", mix_pb2.NameMixRequest(name="qa", mix=_MIX)),
    Rpc(f"{_MIXES}/UnnameMix", mix_pb2.UnnameMixRequest(name="qa")),
    Rpc(f"{_MIXES}/ListNamedMixes", mix_pb2.ListNamedMixesRequest()),
    Rpc(f"{_ADAPTERS}/ListAdapters", adapter_pb2.ListAdaptersRequest()),
    Rpc(f"{_ADAPTERS}/GetAdapter", adapter_pb2.GetAdapterRequest(domain="a")),
    Rpc(
        f"{_ADAPTERS}/PushAdapter",
        adapter_pb2.PushAdapterRequest(domain="d", config=b"{}", tensors=b"", replace=True),
    ),
    Rpc(f"{_ADAPTERS}/DeleteAdapter", adapter_pb2.DeleteAdapterRequest(domain="d")),
    Rpc(
        f"{_ADAPTERS}/MergeAdapters",
        adapter_pb2.MergeAdaptersRequest(
            domain="m", mix=_MIX, method="svd", options=_struct(rank=2), replace=True
        ),
    ),
    Rpc("superpose.v1.ServerService/GetServerInfo", server_pb2.GetServerInfoRequest()),
)


def every_rpc() -> tuple[Rpc, ...]:
    """Return all of these, and an empty request to each method that has none among them."""
    known = {rpc.method for rpc in GRPC}
    others = [
        Rpc(f"{service.full_name}/{method.name}", GetMessageClass(method.input_type)())
        for module in (inference_pb2, mix_pb2, adapter_pb2, server_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if f"{service.full_name}/{method.name}" not in known
    ]
    return (*GRPC, *others)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_SAMPLING = {
    "max_tokens": 4,
    "min_tokens": 1,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "seed": 7,
    "stop": ["\n\n", "end"],
    "stop_token_ids": [3],
    "logit_bias": {"65": 2.5},
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "return_token_ids": True,
    "n": 1,
    "user": "somebody",
}
_MIX_JSON = {"a": 1, "b": -0.25}
HTTP: tuple[Call, ...] = (
    Call("GET", "/v1/models"),
    Call("GET", "/v1/models/{model}", "/v1/models/a=1;b=0.5"),
    Call(
        "POST",
        "/v1/completions",
        body=_json(
            {"model": "a=1;b=0.5", "prompt": ["The sum", [1, 2]], "logprobs": 2} | _SAMPLING
        ),
    ),
    Call(
        "POST",
        "/v1/completions",
        body=_json(
            {
                "prompt": "The sum of",
                "echo": True,
                "logprobs": 1,
                "max_tokens": 2,
                "stream": True,
                "stream_options": {"include_usage": True},
                "mix": _MIX_JSON,
            }
        ),
    ),
    Call(
        "POST",
        "/v1/chat/completions",
        body=_json({"messages": _CHAT, "logprobs": True, "top_logprobs": 2, **_SAMPLING}),
    ),
    Call(
        "POST",
        "/v1/score",
        body=_json(
            {
                "items": [
                    {"text": "the sum of"},
                    {"question_answer": {"question": "what ?", "answer": "that"}},
                    {"token_ids": [1, 2, 3]},
                ],
                "max_length": 32,
                "scope": "all",
                "logprobs": True,
                "mix": _MIX_JSON,
            }
        ),
    ),
    Call("GET", "/v1/mix"),
    Call("PUT", "/v1/mix", body=_json({"mix": _MIX_JSON}), headers={"If-Match": '"3"'}),
    Call("PUT", "/v1/mix", body=_json({"mix": {"b": 1}})),
    Call("POST", "/v1/mix/add", body=_json({"domain": "c", "weight": 0.5})),
    Call("POST", "/v1/mix/remove", body=_json({"domain": "c"})),
    Call("GET", "/v1/mix/events"),
    Call("POST", "/v1/mix/analyze", body=_json({"mix": _MIX_JSON})),
    Call("POST", "/v1/mix/verify", body=b"{}"),
    Call("GET", "/v1/mix/names"),
    Call("PUT", "/v1/mix/names/{name}", "/v1/mix/names/qa", _json({"mix": _MIX_JSON})),
    Call("DELETE", "/v1/mix/names/{name}", "/v1/mix/names/qa"),
    Call("GET", "/v1/adapters"),
    Call("GET", "/v1/adapters/{domain}", "/v1/adapters/a"),
    Call("PUT", "/v1/adapters/{domain}", "/v1/adapters/d?replace=true"),
    Call("DELETE", "/v1/adapters/{domain}", "/v1/adapters/d"),
    Call(
        "POST",
        "/v1/adapters/{domain}/merge",
        "/v1/adapters/m/merge",
        _json({"mix": _MIX_JSON, "method": "svd", "options": {"rank": 2}, "replace": True}),
    ),
    Call("GET", "/v1/server"),
    Call("GET", "/healthz"),
    Call("GET", "/readyz"),
    Call("GET", "/openapi.json"),
)
