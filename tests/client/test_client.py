import asyncio
import inspect
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from tests.client.callers import Caller
from tests.client.fake_server import (
    DEFAULT,
    GENERATION,
    Failure,
    FakeServer,
    Hang,
    analysis,
    digest_of,
    score_response,
    state,
    verification,
    weights_of,
)

from superpose_client import errors, results
from superpose_client.async_client import AsyncClient
from superpose_client.client import Client
from superpose_client.requests import AdapterFiles
from superpose_client.results import AdapterSource, FinishReason, HealthStatus
from superpose_proto.v1 import adapter_pb2, audit_pb2, inference_pb2, mix_pb2, server_pb2


def test_generate(caller: Caller, server: FakeServer) -> None:
    made = caller.generate("What is 2 + 3?", mix="math", max_new_tokens=3, logprobs=True)
    assert made.text == "The sum is 5."
    assert made.token_ids == (464, 2160, 318)
    assert made.finish_reason is FinishReason.STOP
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (9, 3)
    assert made.logprobs == (-0.25, -1.5, -math.inf)
    assert made.request_id == "r-1"
    assert made.mix.generation == GENERATION
    assert made.mix.digest == digest_of({"math": 1.0})
    assert made.mix.weights == {"math": 1.0}
    assert made.mix.entries[0].adapter_digest == b"math".hex() * 4


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_options_go_out_as_given(caller: Caller, server: FakeServer, method: str) -> None:
    call(caller, method, "x", request_id="mine", temperature=0, top_k=0, seed=2**64 - 1,
         stop="\n", stop_token_ids=[5], ignore_eos=True, min_new_tokens=0, top_p=None)  # fmt: skip
    options = server.request.options
    assert {field.name: value for field, value in options.ListFields()} == {
        "temperature": 0.0,
        "top_k": 0,
        "seed": 2**64 - 1,
        "stop": ["\n"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_new_tokens": 0,
    }
    assert server.request.request_id == "mine"


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_options_that_are_left_out_are_absent(
    caller: Caller, server: FakeServer, method: str
) -> None:
    call(caller, method, "x")
    assert server.request.options.ListFields() == []
    assert not server.request.HasField("mix")


@pytest.mark.parametrize(
    ("prompt", "field", "value"),
    [
        ("", "prompt", ""),
        ("hello", "prompt", "hello"),
        ([1, 2], "token_ids", inference_pb2.TokenIds(ids=[1, 2])),
        ((), "token_ids", inference_pb2.TokenIds()),
        (
            [{"role": "user", "content": "hello"}],
            "chat",
            inference_pb2.ChatMessages(
                messages=[inference_pb2.ChatMessage(role="user", content="hello")]
            ),
        ),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_prompts(
    caller: Caller, server: FakeServer, method: str, prompt: Any, field: str, value: Any
) -> None:
    call(caller, method, prompt)
    assert server.request.WhichOneof("input") == field
    assert getattr(server.request, field) == value


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"max_tokens": 1}, TypeError, "max_tokens"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
        ({"temperature": "hot"}, TypeError, "temperature="),
        ({"mix": "math="}, errors.MixSyntaxError, "math"),
    ],
)
def test_bad_options_are_named_and_nothing_is_sent(
    caller: Caller, server: FakeServer, options: Any, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        caller.generate("x", **options)
    assert server.requests == []


@pytest.mark.parametrize(
    ("mix", "sent"),
    [
        (None, None),
        ("base", {}),
        ({}, {}),
        ("math=-1,x", {"math": -1.0, "x": 1.0}),
        ({"math": 2}, {"math": 2.0}),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream", "score", "analyze"])
def test_the_mix_is_absent_or_present(
    caller: Caller, server: FakeServer, method: str, mix: Any, sent: dict[str, float] | None
) -> None:
    if method == "analyze":
        caller.analyze(mix)
    else:
        call(caller, method, ["x"] if method == "score" else "x", mix=mix)
    assert server.request.HasField("mix") == (sent is not None)
    assert weights_of(server.request.mix) == (sent or {})


def test_stream(caller: Caller, server: FakeServer) -> None:
    first, second, last = caller.collect("stream", "x", mix={"math": 1})
    assert first.text + second.text + last.text == "The sum is 5."
    assert first.token_ids + second.token_ids == (464, 2160, 318)
    assert (first.finish_reason, first.usage, first.mix) == (FinishReason.UNSPECIFIED, None, None)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage.completion_tokens == 3
    assert last.mix.weights == {"math": 1.0}


def test_leaving_the_loop_cancels_the_call(caller: Caller, server: FakeServer) -> None:
    server.answers["GenerateStream"] = [inference_pb2.GenerateStreamResponse(text="a"), Hang()]
    assert caller.leave_loop(server.cancelled, "stream", "x")


def test_a_stream_cancelled_from_elsewhere_ends_with_an_error(server: FakeServer) -> None:
    server.answers["WatchMix"] = [mix_pb2.WatchMixResponse(mix=state()), Hang()]
    with Client(server.address) as client, client.watch() as changes:
        assert next(changes).generation == GENERATION
        timer = threading.Thread(target=changes.cancel)
        timer.start()
        with pytest.raises(errors.RequestCancelledError):
            next(changes)
        timer.join()
    assert server.cancelled.wait(10)


@pytest.mark.parametrize(
    "call", [lambda client: next(client.stream("x")), lambda client: client.generate("x")]
)
def test_what_was_interrupted_is_followed_over_another_channel(
    server: FakeServer, call: Callable[[Client], object]
) -> None:
    """Locks of gRPC's may stay held where a signal handler raises, as Ctrl-C's does."""
    answers = dict(server.answers)
    server.answers["GenerateStream"] = server.answers["Generate"] = Hang()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    here = threading.get_ident()

    def interrupt() -> None:
        server.asked.wait(20)
        signal.pthread_kill(here, signal.SIGINT)

    try:
        with Client(server.address) as client:
            timer = threading.Thread(target=interrupt)
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                call(client)
            timer.join()
            server.answers.update(answers)
            for _ in range(2):
                assert client.generate("x").text == "The sum is 5."
    finally:
        signal.signal(signal.SIGINT, handler)
    interrupted, after, last = server.peers
    assert interrupted != after == last


def test_an_awaited_stream_tells_its_own_end_from_that_of_the_task(server: FakeServer) -> None:
    server.answers["WatchMix"] = [mix_pb2.WatchMixResponse(mix=state()), Hang()]

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            async with client.watch() as changes:
                assert (await anext(changes)).generation == GENERATION
                waiting = asyncio.ensure_future(changes.__anext__())
                await asyncio.sleep(0)
                changes.cancel()
                with pytest.raises(errors.RequestCancelledError):
                    await waiting
            async with client.watch() as changes:
                await anext(changes)
                waiting = asyncio.ensure_future(changes.__anext__())
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting

    asyncio.run(run())
    assert server.cancelled.wait(10)


def test_watch(caller: Caller, server: FakeServer) -> None:
    first, second = caller.collect("watch")
    assert (first.generation, first.weights) == (7, {})
    assert (second.generation, second.weights) == (8, DEFAULT)


def test_streams_have_no_deadline_and_calls_do(caller: Caller, server: FakeServer) -> None:
    caller.collect("watch")
    caller.collect("stream", "x")
    caller.mix()
    caller.generate("x")
    caller.generate("x", timeout=math.inf)
    caller.collect("watch", timeout=30)
    watch, stream, mix, generate, endless, bounded = server.seconds_left
    assert (watch, stream, endless) == (None, None, None)
    assert mix is not None
    assert 30 < mix < 70
    assert generate is not None
    assert 500 < generate < 610
    assert bounded is not None
    assert bounded < 40


def test_a_timeout_of_the_client_holds_for_all_calls(server: FakeServer) -> None:
    with Client(server.address, timeout=20) as client:
        client.generate("x")
        list(client.watch())
        client.mix(timeout=40)
    generate, watch, mix = server.seconds_left
    assert generate is not None
    assert generate < 30
    assert watch is not None
    assert watch < 30
    assert mix is not None
    assert 30 < mix < 50


def test_score_takes_texts_pairs_and_token_ids(caller: Caller, server: FakeServer) -> None:
    result = caller.score(["text", ("q", "a"), [1, 2]], max_length=7, scope="answer", logprobs=True)
    request = server.request
    assert [item.WhichOneof("item") for item in request.items] == [
        "text",
        "question_answer",
        "token_ids",
    ]
    pair = request.items[1].question_answer
    assert (pair.question, pair.answer) == ("q", "a")
    assert list(request.items[2].token_ids.ids) == [1, 2]
    assert request.max_length == 7
    assert request.scope == inference_pb2.SCORE_SCOPE_ANSWER
    assert request.logprobs
    assert [item.tokens for item in result.items] == [4, 1, 0]
    assert result.tokens == 5
    assert result.perplexity == 2.0
    assert result.mix.weights == DEFAULT


def test_score_without_options(caller: Caller, server: FakeServer) -> None:
    caller.score(["text"])
    assert not server.request.HasField("max_length")
    assert server.request.scope == inference_pb2.SCORE_SCOPE_ALL
    assert not server.request.logprobs


def test_an_unknown_scope_is_refused(caller: Caller, server: FakeServer) -> None:
    with pytest.raises(ValueError, match="scope='question'"):
        caller.score(["text"], scope="question")
    assert server.requests == []


def test_a_long_score_is_split_and_keeps_its_mix(caller: Caller, server: FakeServer) -> None:
    texts = ["a" * (1 + index % 50) for index in range(600)]
    done: list[int] = []
    result = caller.score(iter(texts), progress=done.append)
    assert [len(request.items) for request in server.requests] == [256, 256, 88]
    assert [item.text for request in server.requests for item in request.items] == texts
    first, *later = server.requests
    assert not first.HasField("mix")
    assert [weights_of(request.mix) for request in later] == [DEFAULT, DEFAULT]
    assert done == [256, 512, 600]
    assert len(result.items) == 600
    assert result.tokens == sum(map(len, texts))
    loss = sum(len(text) ** 2 / 1000 for text in texts) / sum(map(len, texts))
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-12)
    assert result.mix.digest == digest_of(DEFAULT)


def test_a_long_score_of_the_base_stays_on_the_base(caller: Caller, server: FakeServer) -> None:
    caller.score(["a"] * 257, mix="base")
    assert all(request.HasField("mix") for request in server.requests)
    assert [weights_of(request.mix) for request in server.requests] == [{}, {}]


def test_a_score_under_several_mixes(caller: Caller, server: FakeServer) -> None:
    mixes = ["base", {"math": 0.5}, "math,medicine=2"]
    weights: list[dict[str, float]] = [{}, {"math": 0.5}, {"math": 1, "medicine": 2}]
    result = caller.score(["text", "a"], mixes=mixes)
    assert not server.request.HasField("mix")
    assert [weights_of(mix) for mix in server.request.mixes] == weights
    assert [block.mix.weights for block in result.mixes] == weights
    assert [block.perplexity for block in result.mixes] == [2, 4, 8]
    assert [[item.logprob for item in block.items] for block in result.mixes] == [
        pytest.approx([-0.016 * times, -0.001 * times]) for times in (1, 2, 3)
    ]
    assert (result.items, result.mix) == (result.mixes[0].items, result.mixes[0].mix)
    assert caller.score(["text"]).mixes == ()


def test_a_long_score_under_several_mixes_is_split_by_rows(
    caller: Caller, server: FakeServer
) -> None:
    texts = ["a" * (1 + index % 7) for index in range(250)]
    result = caller.score(texts, mixes=[{"math": 0.25 * i} for i in range(20)])
    assert [len(request.items) for request in server.requests] == [102, 102, 46]
    assert all(len(request.mixes) == 20 for request in server.requests)
    loss = sum(len(text) ** 2 / 1000 for text in texts) / sum(map(len, texts))
    for times, block in enumerate(result.mixes, start=1):
        assert len(block.items) == 250
        assert block.perplexity == pytest.approx(math.exp(times * loss), rel=1e-12)
        assert block.mix.weights == {"math": 0.25 * (times - 1)}
    assert result.perplexity == result.mixes[0].perplexity


def test_an_adapter_that_changes_in_one_of_several_mixes_is_noticed(
    caller: Caller, server: FakeServer
) -> None:
    def changing(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        response = score_response(request)
        if len(server.requests) == 2:
            response.mixes[1].mix.digest = "f" * 64
        return response

    server.answers["Score"] = changing
    with pytest.raises(errors.MixChangedError, match="ffffffffffff"):
        caller.score(["a"] * 300, mixes=["base", "math"])


@pytest.mark.parametrize("mixes", [[], "math", ["math", "default"], [None]])
def test_mixes_that_mean_nothing_are_refused(
    caller: Caller, server: FakeServer, mixes: Any
) -> None:
    with pytest.raises(ValueError, match="mixes"):
        caller.score(["text"], mixes=mixes)
    assert server.requests == []


def test_fit(caller: Caller, server: FakeServer) -> None:
    progress, last = caller.collect(
        "fit",
        ["text", ("q", "a")],
        ["math", "law"],
        max_length=9,
        scope="all",
        budget=50,
        low=-0.5,
        penalty=0,
        seed=7,
    )
    request = server.request
    assert [item.WhichOneof("item") for item in request.items] == ["text", "question_answer"]
    assert list(request.domains) == ["math", "law"]
    assert (request.max_length, request.budget, request.low, request.penalty) == (9, 50, -0.5, 0)
    assert request.HasField("penalty")
    assert not request.HasField("high")
    assert (request.scope, request.seed) == (inference_pb2.SCORE_SCOPE_ALL, 7)
    assert (progress.progress.evaluations, progress.progress.loss) == (7, 2.5)
    assert progress.result is None
    assert last.progress is None
    assert last.result.mix.weights == {"law": 0.25}
    assert [weight.weight for weight in last.result.weights] == [0, 0.25]
    assert last.result.candidates[1].excess.value == 0.75


def test_an_adapter_that_changes_within_a_score_is_noticed(
    caller: Caller, server: FakeServer
) -> None:
    def changing(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        response = score_response(request)
        if len(server.requests) == 2:
            response.mix.digest = "f" * 64
        return response

    server.answers["Score"] = changing
    with pytest.raises(errors.MixChangedError, match="ffffffffffff"):
        caller.score(["a"] * 600)
    assert len(server.requests) == 2


@pytest.mark.parametrize("batch", [0, 2])
def test_a_text_that_is_refused_is_counted_among_all(
    caller: Caller, server: FakeServer, batch: int
) -> None:
    refusal = Failure(
        grpc.StatusCode.INVALID_ARGUMENT,
        "items[43] is empty",
        reason="ITEM_EMPTY",
        violations={"items[43]": "items[43] is empty: send a text"},
    )

    def answer(request: inference_pb2.ScoreRequest) -> Any:
        return refusal if len(server.requests) > batch else score_response(request)

    server.answers["Score"] = answer
    with pytest.raises(errors.InvalidArgumentError) as caught:
        caller.score(["a"] * 600)
    name = f"texts[{256 * batch + 43}]"
    assert caught.value.message == f"{name} is empty"
    assert (caught.value.code, caught.value.reason) == (refusal.code, "ITEM_EMPTY")
    assert caught.value.field_violations == (
        errors.FieldViolation(name, f"{name} is empty: send a text"),
    )
    assert len(server.requests) == batch + 1


def test_a_new_generation_within_a_score_is_no_error(caller: Caller, server: FakeServer) -> None:
    def moving(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        response = score_response(request)
        response.mix.generation = len(server.requests)
        return response

    server.answers["Score"] = moving
    assert caller.score(["a"] * 300).mix.generation == 1


@pytest.mark.parametrize(("logprob", "perplexity"), [(-1e6, math.inf), (0.0, 1.0)])
def test_extreme_scores_do_not_overflow(
    caller: Caller, server: FakeServer, logprob: float, perplexity: float
) -> None:
    def extreme(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
        item = inference_pb2.ItemScore(tokens=1, logprob=logprob)
        items = [item] * len(request.items)
        return inference_pb2.ScoreResponse(items=items, tokens=len(items), mix=state())

    server.answers["Score"] = extreme
    assert caller.score(["a"] * 300).perplexity == perplexity


def test_no_texts_are_the_servers_to_refuse(caller: Caller, server: FakeServer) -> None:
    caller.score([])
    assert list(server.request.items) == []


@pytest.mark.parametrize(
    ("run", "request_", "weights"),
    [
        (
            lambda caller: caller.add("finance"),
            mix_pb2.AddDomainRequest(domain="finance"),
            {**DEFAULT, "finance": 0.0},
        ),
        (
            lambda caller: caller.add("finance", 0, expected_generation=0),
            mix_pb2.AddDomainRequest(domain="finance", weight=0, expected_generation=0),
            {**DEFAULT, "finance": 0.0},
        ),
        (
            lambda caller: caller.remove("medicine"),
            mix_pb2.RemoveDomainRequest(domain="medicine"),
            {"math": 1.0},
        ),
        (
            lambda caller: caller.remove("medicine", expected_generation=2**63),
            mix_pb2.RemoveDomainRequest(domain="medicine", expected_generation=2**63),
            {"math": 1.0},
        ),
        (
            lambda caller: caller.set("base"),
            mix_pb2.SetMixRequest(mix=mix_pb2.Mix()),
            {},
        ),
        (
            lambda caller: caller.set({"math": -0.5}, expected_generation=4),
            mix_pb2.SetMixRequest(
                mix=mix_pb2.Mix(entries=[mix_pb2.DomainWeight(domain="math", weight=-0.5)]),
                expected_generation=4,
            ),
            {"math": -0.5},
        ),
    ],
)
def test_changes(
    caller: Caller,
    server: FakeServer,
    run: Callable[[Caller], results.MixState],
    request_: Any,
    weights: dict[str, float],
) -> None:
    changed = run(caller)
    assert server.request == request_
    assert changed.weights == weights
    assert changed.generation == GENERATION


@pytest.mark.parametrize(
    "method", ["add", "remove", "set", "name_mix", "unname_mix", "push", "delete", "merge"]
)
def test_a_change_is_sent_once(caller: Caller, server: FakeServer, method: str) -> None:
    names = {
        "add": "AddDomain",
        "remove": "RemoveDomain",
        "set": "SetMix",
        "name_mix": "NameMix",
        "unname_mix": "UnnameMix",
        "push": "PushAdapter",
        "delete": "DeleteAdapter",
        "merge": "MergeAdapters",
    }
    server.answers[names[method]] = Failure(grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN")
    arguments = ["math", AdapterFiles(b"", b"")] if method == "push" else ["math"]
    options = {"method": "sum"} if method == "merge" else {}
    with pytest.raises(errors.UnavailableError):
        getattr(caller, method)(*arguments, **options)
    assert len(server.requests) == 1


def test_mix(caller: Caller, server: FakeServer) -> None:
    current = caller.mix()
    assert current.weights == DEFAULT
    assert current.resident.weights == {}


def test_named_mixes(caller: Caller, server: FakeServer) -> None:
    named = caller.name_mix("qa", {"math": 1, "medicine": 0.5})
    assert (named.name, named.weights) == ("qa", DEFAULT)
    assert weights_of(server.request.mix) == DEFAULT
    assert caller.unname_mix("qa") is None
    assert server.requests[-1] == mix_pb2.UnnameMixRequest(name="qa")
    listed = caller.named_mixes()
    assert [(each.name, each.weights) for each in listed] == [
        ("half", {"math": 0.5}),
        ("plain", {}),
    ]


def test_the_record_of_changes(caller: Caller, server: FakeServer) -> None:
    first, last = caller.changes(7)
    assert (first.who, first.what, last.who) == ("ops", "set math=1,medicine=0.5", "anonymous")
    assert (last.generation_before, last.generation) == (GENERATION - 1, GENERATION)
    assert server.request == audit_pb2.ListChangesRequest(limit=7)
    caller.changes()
    assert not server.requests[-1].HasField("limit")


@pytest.mark.parametrize("mix", [None, "default", " default "])
def test_the_word_default_is_no_mix_of_its_own(
    caller: Caller, server: FakeServer, mix: str | None
) -> None:
    """A server that has no such word cannot take it for a domain."""
    caller.generate("x", mix=mix)
    assert not server.request.HasField("mix")


def test_analyze(caller: Caller, server: FakeServer) -> None:
    report = caller.analyze("math,medicine=0.5")
    assert report == results.Analysis.from_proto(analysis(state()))
    assert report.pairs[0].module_types[1].module_type == "mlp.c_proj"
    assert report.pairs[0].modules[0].cosine == -0.1
    assert report.domains[1].relative_norm == 0.0213
    assert report.interference_ratio == 0.118
    assert report.folded
    assert len(report.warnings) == 1


def test_verify(caller: Caller, server: FakeServer) -> None:
    assert caller.verify().ok
    server.answers["VerifyWeights"] = verification(ok=False)
    damaged = caller.verify()
    assert not damaged.ok
    assert damaged.damaged_resident == ("transformer.h.0.attn.c_attn.weight",)
    assert damaged.damaged_base == ("transformer.wte.weight",)
    assert damaged.damaged_adapters == ("ef" * 32,)


def test_adapters(caller: Caller, server: FakeServer) -> None:
    listed = caller.adapters()
    assert [adapter.domain for adapter in listed] == ["finance_stock_trading", "math", "medicine"]
    shown = caller.adapter("math")
    assert server.requests[-1] == adapter_pb2.GetAdapterRequest(domain="math")
    assert shown.source is AdapterSource.BUNDLED
    assert shown.bytes == 591_872
    assert len(shown.modules) == 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_bytes(b'{"r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    return tmp_path


@pytest.mark.parametrize("replace", [False, True])
def test_push_a_folder(caller: Caller, server: FakeServer, folder: Path, replace: bool) -> None:
    pushed = caller.push("math", folder, replace=replace)
    assert server.request == adapter_pb2.PushAdapterRequest(
        domain="math", config=b'{"r": 4}', tensors=b"tensors", replace=replace
    )
    assert pushed.generation == GENERATION
    assert pushed.adapter.domain == "math"


def test_push_bytes_beyond_the_usual_message_limit(caller: Caller, server: FakeServer) -> None:
    tensors = bytes(8 * 2**20)
    caller.push("math", AdapterFiles(b"{}", tensors))
    assert server.request.tensors == tensors


def test_a_large_answer_arrives(caller: Caller, server: FakeServer) -> None:
    server.answers["GetAdapter"] = adapter_pb2.GetAdapterResponse(
        adapter=adapter_pb2.Adapter(config_json="x" * (8 * 2**20))
    )
    assert len(caller.adapter("math").config_json) == 8 * 2**20


def test_a_pickle_is_refused_by_name(caller: Caller, server: FakeServer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(errors.AdapterFolderError, match=r"adapter_model\.bin is a pickle"):
        caller.push("math", folder)
    assert server.requests == []


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(
    caller: Caller, server: FakeServer, folder: Path, missing: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(errors.AdapterFolderError, match=missing):
        caller.push("math", folder)
    assert server.requests == []


def test_a_file_is_no_folder(caller: Caller, folder: Path) -> None:
    with pytest.raises(errors.AdapterFolderError, match="is not a folder"):
        caller.push("math", folder / "adapter_config.json")


def test_tensors_over_the_servers_limit_are_not_even_read(
    caller: Caller, server: FakeServer, folder: Path
) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**28 + 1)  # sparse: takes no space
    with pytest.raises(errors.AdapterFolderError, match=r"268435457 bytes.*--max-adapter-mib"):
        caller.push("math", folder)
    (asked,) = server.requests
    assert asked == server_pb2.GetServerInfoRequest()
    server.answers["GetServerInfo"] = server_pb2.GetServerInfoResponse(
        limits=server_pb2.Limits(max_adapter_bytes=20 * 2**20)
    )
    with pytest.raises(errors.AdapterFolderError, match=r"20971521 bytes.*20971520"):
        caller.push("math", AdapterFiles(b"{}", bytes(20 * 2**20 + 1)))


def test_what_the_server_takes_is_sent_however_large(server: FakeServer) -> None:
    size = 2**28 + 2**21  # more than the client itself took once
    server.answers["GetServerInfo"] = server_pb2.GetServerInfoResponse(
        limits=server_pb2.Limits(max_adapter_bytes=size)
    )
    with Client(server.address) as client:
        client.push("math", AdapterFiles(b"{}", bytes(size)))
    assert len(server.requests[-1].tensors) == size


def test_an_adapter_one_level_below_is_named(
    caller: Caller, server: FakeServer, folder: Path
) -> None:
    (folder / "checkpoint-9").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(folder / "checkpoint-9" / name)
    with pytest.raises(errors.AdapterFolderError, match=r"but .*checkpoint-9 does; name that"):
        caller.push("math", folder)


def test_an_adapter_of_mlx_is_named(caller: Caller, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    with pytest.raises(errors.AdapterFolderError, match=r"MLX .*superpose-convert"):
        caller.push("math", folder)


def test_merge(caller: Caller, server: FakeServer) -> None:
    options = {"density": 0.25, "seed": 3, "rescale": True, "join": "mean"}
    merged = caller.merge("both", {"math": 1, "medicine": 0.5}, method="dare", options=options)
    asked = server.request
    assert (asked.domain, asked.method, asked.replace) == ("both", "dare", False)
    assert weights_of(asked.mix) == DEFAULT
    assert dict(asked.options.items()) == options
    assert (merged.adapter.domain, merged.generation) == ("both", GENERATION)
    assert (merged.seconds, merged.deviation) == (0.125, 0.25)
    made = merged.adapter.provenance
    assert made is not None
    assert (made.method, made.options, made.weights) == ("dare", options, DEFAULT)
    assert type(made.options["seed"]) is int
    assert caller.adapter("math").provenance is None
    caller.merge("both", method="sum", replace=True)
    assert server.requests[-1] == adapter_pb2.MergeAdaptersRequest(
        domain="both", method="sum", options=Struct(), replace=True
    )


def test_delete(caller: Caller, server: FakeServer) -> None:
    assert caller.delete("math") is None
    assert server.request == adapter_pb2.DeleteAdapterRequest(domain="math")


def test_info(caller: Caller, server: FakeServer) -> None:
    info = caller.info()
    assert (info.base, info.context_length, info.running) == ("mini", 256, 3)
    assert info.limits.max_adapter_bytes == 2**28
    assert info.mix.weights == DEFAULT
    assert info.weights_intact


def test_health(caller: Caller, server: FakeServer) -> None:
    assert caller.health() is HealthStatus.SERVING
    caller.health("superpose.v1.InferenceService")
    assert server.requests[-1].service == "superpose.v1.InferenceService"


def test_values_of_later_versions_read_as_unspecified(caller: Caller, server: FakeServer) -> None:
    response = inference_pb2.GenerateResponse()
    response.MergeFromString(b"\x18\x63")  # finish_reason = 99
    server.answers["Generate"] = response
    assert caller.generate("x").finish_reason is FinishReason.UNSPECIFIED


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, tuple[list[str], str | None]]:
        return {
            name: (list(inspect.signature(method).parameters), method.__doc__)
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient)


def call(caller: Caller, method: str, *arguments: Any, **options: Any) -> Any:
    if method == "stream":
        return caller.collect(method, *arguments, **options)
    return getattr(caller, method)(*arguments, **options)
