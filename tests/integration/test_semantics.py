"""What each call means (design §6), on a real server."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2
from tests.integration.harness import (
    DEVICE,
    PATIENCE,
    PROMPT,
    End,
    Family,
    LoopThread,
    Served,
    check_greedy,
    held,
    start,
)

from superpose_client import (
    AlreadyExistsError,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    GenerateOptions,
    GenerationChunk,
    GenerationMismatchError,
    HealthStatus,
    MixState,
    NotFoundError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
)
from superpose_client.client import Stream
from superpose_server.control.watch import watch
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.errors import WatchBehind

SERVICES = [
    "superpose.v1.InferenceService",
    "superpose.v1.MixService",
    "superpose.v1.AdapterService",
    "superpose.v1.ServerService",
    "superpose.v1.AuditService",
]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def begin(
    served: Served, tokens: int = 60, mix: dict[str, float] | None = None
) -> Stream[GenerationChunk]:
    return served.client.stream(
        PROMPT, mix=mix, temperature=0, max_new_tokens=tokens, ignore_eos=True
    )


def wait_for_cancellation(served: Served, row: Sequence) -> None:
    while not row.cancelled:
        served.client.info()  # the cancellation is on its way; pytest-timeout bounds this


def token_ids(chunks: list[GenerationChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)


def prompt_ids(served: Served) -> tuple[int, ...]:
    return tuple(served.runtime.texts.prompt(PROMPT))


# Changes of the default mix.


def test_setting_the_mix_that_is_set_changes_nothing(served: Served) -> None:
    before = served.client.mix()
    assert served.client.set({"a": 1.0}) == MixState(
        before.generation, before.digest, before.entries
    )
    assert served.client.set({"a": 1.0, "b": 0.0}).generation == before.generation
    assert served.recorder.folds == []
    assert served.client.set({"a": 1.0, "b": 1.0}).generation == before.generation + 1


def test_every_change_adds_one_to_the_generation_and_shows_in_what_follows(served: Served) -> None:
    generation = served.client.mix().generation
    for number, (state, weights) in enumerate(
        [
            (served.client.add("b", 0.5), {"a": 1.0, "b": 0.5}),
            (served.client.remove("a"), {"b": 0.5}),
            (served.client.set("c=-2"), {"c": -2.0}),
            (served.client.set("base"), {}),
        ],
        start=1,
    ):
        assert state.weights == weights
        assert state.generation == generation + number
    assert served.client.info().mix == state
    assert served.client.generate(PROMPT, max_new_tokens=1).mix == state
    assert served.client.score(["abc"]).mix == state
    assert served.client.verify().mix == state
    assert served.client.mix().resident == state


def test_a_digest_names_the_mix_and_not_its_history(served: Served) -> None:
    first = served.client.mix().digest
    served.client.add("b", 0.5)
    second = served.client.remove("b")
    assert second.digest == first
    assert served.client.generate(PROMPT, mix={"a": 1}, max_new_tokens=1).mix.digest == first


def test_an_expected_generation_that_is_not_met_aborts_and_tells_what_is(
    served: Served, gpt2: Family
) -> None:
    now = served.client.mix()
    late = now.generation - 1
    calls: list[Callable[[], object]] = [
        lambda: served.client.add("b", expected_generation=late),
        lambda: served.client.remove("a", expected_generation=late),
        lambda: served.client.set("base", expected_generation=late),
        # The generation goes before all else, since the change may have landed already.
        lambda: served.client.add("a", expected_generation=late),
        lambda: served.client.remove("b", expected_generation=late),
    ]
    for call in calls:
        with pytest.raises(GenerationMismatchError) as caught:
            call()
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert caught.value.reason == "GENERATION_MISMATCH"
        assert (caught.value.generation, caught.value.digest) == (now.generation, now.digest)
    assert served.client.mix() == now
    changed = served.client.add("b", expected_generation=now.generation)
    assert changed.generation == now.generation + 1


def test_an_absent_mix_is_the_default_and_an_empty_one_the_base(
    served: Served, gpt2: Family
) -> None:
    default = served.client.generate(PROMPT, temperature=0, max_new_tokens=20, ignore_eos=True)
    base = served.client.generate(PROMPT, mix={}, temperature=0, max_new_tokens=20, ignore_eos=True)
    assert default.mix.weights == {"a": 1.0}
    assert base.mix.weights == {}
    assert base.mix.generation == default.mix.generation
    check_greedy(gpt2.folded({"a": 1.0}), prompt_ids(served), default.token_ids)
    check_greedy(gpt2.folded({}), prompt_ids(served), base.token_ids)
    assert served.score_bits() != served.score_bits({})


def test_watch_begins_with_the_state_and_sends_every_change_in_order(served: Served) -> None:
    with served.client.watch() as first, served.client.watch() as second:
        before = served.client.mix()
        seen = [next(first)]
        assert next(second) == seen[0]
        assert (seen[0].generation, seen[0].digest) == (before.generation, before.digest)
        changes = [
            served.client.add("b", 0.5),
            served.client.remove("a"),
            served.client.set("base"),
            served.client.set("c"),
        ]
        served.client.set("c")  # no change
        assert [next(first) for _ in changes] == changes
        assert [next(second) for _ in changes] == changes
        assert next(iter(served.client.watch())) == changes[-1]


def test_a_watcher_that_falls_too_far_behind_is_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a socket, whose buffers would take all that a test can send."""
    monkeypatch.setattr("superpose_server.control.watch._MAX_BEHIND", 2)
    states = watch(served.runtime.default_mix, served.runtime.ending)

    async def following() -> int:
        return (await anext(states)).generation

    before = served.client.mix()
    assert served.loop.run(following()) == before.generation
    served.client.add("b")
    served.client.add("c")
    assert served.loop.run(following()) == before.generation + 1
    for weight in (1.0, 2.0, 3.0):
        served.client.set({"b": weight})
    with pytest.raises(WatchBehind, match="2 changes behind"):
        served.loop.run(following())
    assert served.runtime.default_mix._watchers == {served.runtime.metrics.mix_changed}


# Adapters.


def test_pushing_the_same_bytes_is_fine_and_other_bytes_need_replace(
    served: Served, gpt2: Family
) -> None:
    before = served.client.adapters()
    again = served.client.push("b", gpt2.adapters["b"])
    assert served.client.adapters() == before
    with pytest.raises(AlreadyExistsError, match="b names another adapter") as caught:
        served.client.push("b", gpt2.adapters["a2"])
    assert caught.value.reason == "ADAPTER_EXISTS"
    assert served.client.adapters() == before
    generation = served.client.mix().generation
    replaced = served.client.push("b", gpt2.adapters["a2"], replace=True)
    assert replaced.adapter.digest != again.adapter.digest
    assert replaced.generation == generation  # the default mix does not hold b


def test_a_replaced_adapter_serves_new_requests_and_running_rows_keep_the_old_one(
    served: Served, gpt2: Family, pool: ThreadPoolExecutor
) -> None:
    generation = served.client.mix().generation
    with held(served.recorder):
        running = begin(served)
        by_name = begin(served, mix={"a": 1.0, "b": 0.5})
        for _ in range(2):
            served.recorder.submitted.get(timeout=PATIENCE)
        pushed = pool.submit(served.client.push, "a", gpt2.adapters["a2"], replace=True)
        assert served.recorder.folds_asked.acquire(timeout=PATIENCE)
    result = pushed.result(PATIENCE)
    assert result.generation == generation + 1
    after = begin(served)
    ids = prompt_ids(served)
    check_greedy(gpt2.folded({"a": 1.0}), ids, token_ids(list(running)))
    check_greedy(gpt2.folded({"a": 1.0, "b": 0.5}), ids, token_ids(list(by_name)))
    chunks = list(after)
    check_greedy(gpt2.folded({"a2": 1.0}), ids, token_ids(chunks))
    assert chunks[-1].mix is not None
    assert chunks[-1].mix.generation == generation + 1
    assert chunks[-1].mix.entries[0].adapter_digest == result.adapter.digest


def test_an_adapter_in_the_default_mix_is_not_deleted(served: Served) -> None:
    with pytest.raises(FailedPreconditionError, match="a is in the default mix") as caught:
        served.client.delete("a")
    assert caught.value.reason == "ADAPTER_IN_USE"
    served.client.remove("a")
    served.client.delete("a")
    with pytest.raises(NotFoundError):
        served.client.delete("a")
    with pytest.raises(NotFoundError):
        served.client.add("a")


def test_an_adapter_is_deleted_while_rows_run_with_it(served: Served, gpt2: Family) -> None:
    mix = {"b": 1.0, "c": -0.5}
    with held(served.recorder):
        running = begin(served, mix=mix)
        served.recorder.wait_for(lambda: bool(served.recorder.steps))
        served.client.delete("b")
        assert [adapter.domain for adapter in served.client.adapters()] == ["a", "c"]
        with pytest.raises(NotFoundError):
            served.client.generate(PROMPT, mix=mix)
    check_greedy(gpt2.folded(mix), prompt_ids(served), token_ids(list(running)))


def test_adapters_of_a_folder_are_read_only(loop: LoopThread, gpt2: Family, tmp_path: Path) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=gpt2.adapters["a"].parent)
    try:
        listed = served.client.adapters()
        assert [adapter.domain for adapter in listed] == ["a", "a2", "b", "c"]
        assert {adapter.source for adapter in listed} == {"ADAPTER_SOURCE_DIRECTORY"}
        for call in (
            lambda: served.client.delete("a"),
            lambda: served.client.push("a", gpt2.adapters["b"], replace=True),
        ):
            with pytest.raises(FailedPreconditionError, match="read only") as caught:
                call()
            assert caught.value.reason == "ADAPTER_READ_ONLY"
        assert served.client.push("a", gpt2.adapters["a"]).adapter == served.client.adapter("a")
    finally:
        served.stop()


# Requests.


def test_a_full_queue_refuses_at_once_and_says_when_to_try_again(
    loop: LoopThread, gpt2: Family, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", max_batch=1, max_queue=1)
    try:
        with held(served.recorder):
            running = pool.submit(list, begin(served, tokens=3))
            served.recorder.wait_for(lambda: bool(served.recorder.steps))
            waiting = pool.submit(list, begin(served, tokens=3))
            for _ in range(2):
                served.recorder.submitted.get(timeout=PATIENCE)
            info = served.client.info()
            assert (info.running, info.waiting) == (1, 1)
            with pytest.raises(QueueFullError, match="1 requests are waiting already") as caught:
                served.client.generate(PROMPT)
            assert caught.value.retry_after_seconds == 1.0
        assert token_ids(running.result(PATIENCE)) == token_ids(waiting.result(PATIENCE))
        assert served.client.generate(PROMPT, max_new_tokens=1).usage.completion_tokens == 1
    finally:
        served.stop()


def test_a_cancelled_stream_frees_its_row(served: Served) -> None:
    with held(served.recorder):
        stream = begin(served, tokens=900)
        row = served.recorder.submitted.get(timeout=PATIENCE)
        other = begin(served, tokens=30)
        next(stream)
        stream.cancel()
        wait_for_cancellation(served, row)
    served.recorder.wait_for(lambda: End(row, FinishReason.ABORTED) in served.recorder.ends)
    assert len(row.tokens) < 900
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert token_ids(list(other)) == served.greedy(tokens=30)
    assert served.client.info().running == 0


def test_a_deadline_frees_its_row(served: Served) -> None:
    recorder = served.recorder
    with held(recorder):
        for seconds in (0.2, 2.0, 20.0):  # A busy machine needs longer to get there at all.
            with pytest.raises(DeadlineExceededError):
                served.client.generate(PROMPT, max_new_tokens=900, ignore_eos=True, timeout=seconds)
            if not recorder.submitted.empty():
                break
    recorder.wait_for(lambda: 0 < len(recorder.ends) == recorder.submitted.qsize())
    assert recorder.ends[0].reason is FinishReason.ABORTED
    assert len(recorder.ends[0].row.tokens) < 900
    assert served.client.info().running == 0


def test_a_request_that_is_cancelled_while_it_waits_never_runs(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", max_batch=1)
    recorder = served.recorder
    try:
        with held(recorder):
            running = begin(served, tokens=3)
            first = recorder.submitted.get(timeout=PATIENCE)
            waiting = begin(served, tokens=3)
            second = recorder.submitted.get(timeout=PATIENCE)
            waiting.cancel()
            wait_for_cancellation(served, second)
        assert len(token_ids(list(running))) == 3
        recorder.wait_for(lambda: len(recorder.ends) == 2)
        ends = {end.row: end.reason for end in recorder.ends}
        assert ends == {first: FinishReason.LENGTH, second: FinishReason.ABORTED}
        assert second.tokens == []
        with pytest.raises(RequestCancelledError):
            list(waiting)
    finally:
        served.stop()


def test_the_pieces_of_a_stream_make_the_unary_text(served: Served) -> None:
    options = {"temperature": 1.0, "seed": 7, "max_new_tokens": 200, "ignore_eos": True}
    unary = served.client.generate(PROMPT, **options, logprobs=True)  # type: ignore[arg-type]
    chunks = list(served.client.stream(PROMPT, **options, logprobs=True))  # type: ignore[arg-type]
    assert "".join(chunk.text for chunk in chunks) == unary.text
    assert token_ids(chunks) == unary.token_ids
    assert tuple(value for chunk in chunks for value in chunk.logprobs) == unary.logprobs
    assert len(unary.logprobs) == 200
    # Random bytes are seldom whole characters: the text must have waited for them.
    assert any(not chunk.text for chunk in chunks[:-1])
    assert {chunk.finish_reason for chunk in chunks[:-1]} == {"FINISH_REASON_UNSPECIFIED"}
    assert chunks[-1].finish_reason == unary.finish_reason == "FINISH_REASON_LENGTH"
    assert chunks[0].mix == chunks[-1].mix == unary.mix
    assert chunks[-1].usage == unary.usage


def test_the_same_seed_gives_the_same_text_whatever_else_runs(
    served: Served, pool: ThreadPoolExecutor
) -> None:
    def sample(seed: int | None) -> str:
        return served.client.generate(PROMPT, seed=seed, max_new_tokens=60, ignore_eos=True).text

    alone = sample(11)
    futures: list[Future[str]] = [pool.submit(sample, seed) for seed in (1, 11, 2, 11)]
    texts = [future.result(PATIENCE) for future in futures]
    assert texts[1] == texts[3] == alone
    assert len(set(texts)) == 3
    assert sample(None) != sample(None)


def test_a_response_echoes_the_request_id_and_counts_tokens(served: Served) -> None:
    generation = served.client.generate(PROMPT, max_new_tokens=5, ignore_eos=True, request_id="r-1")
    assert generation.request_id == "r-1"
    assert generation.usage.prompt_tokens == len(prompt_ids(served))
    assert generation.usage.completion_tokens == len(generation.token_ids) == 5
    chunks = list(served.client.stream(PROMPT, max_new_tokens=5, request_id="r-2"))
    assert {chunk.request_id for chunk in chunks} == {"r-2"}
    made = [served.client.generate(PROMPT, max_new_tokens=1).request_id for _ in range(2)]
    assert made[0]
    assert made[0] != made[1]


def test_a_stop_string_ends_the_text_before_it(served: Served) -> None:
    whole = served.client.generate(
        list(b"abc"), temperature=0, max_new_tokens=200, ignore_eos=True
    ).text
    stop = whole[3:5]
    assert len(stop) == 2
    cut = served.client.generate(
        list(b"abc"), temperature=0, max_new_tokens=200, ignore_eos=True, stop=stop
    )
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "FINISH_REASON_STOP"


# Around the services.


def test_health_answers_for_the_server_and_each_service(served: Served) -> None:
    for name in ["", *SERVICES]:
        assert served.client.health(name) is HealthStatus.SERVING
    with pytest.raises(NotFoundError):
        served.client.health("superpose.v1.NoSuchService")


def test_health_turns_before_the_running_rows_have_ended(
    served: Served, pool: ThreadPoolExecutor
) -> None:
    with held(served.recorder):
        running = begin(served, tokens=5)
        served.recorder.wait_for(lambda: bool(served.recorder.steps))
        stopping = pool.submit(lambda: served.loop.run(served.server.stop(PATIENCE)))
        states = {served.client.health(name) for name in ["", *SERVICES] for _ in range(1)}
        while states != {HealthStatus.NOT_SERVING}:  # the stop has not begun yet
            assert not stopping.done()
            states = {served.client.health(name) for name in ["", *SERVICES]}
    assert len(token_ids(list(running))) == 5
    stopping.result(PATIENCE)
    served._stopped = True


def reflect(
    served: Served, version: str, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    """Ask for a part of the contract; the messages of both versions are the same bytes."""
    ask = served.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    answer: reflection_pb2.ServerReflectionResponse = next(iter(ask(iter([request]))))
    return answer


LIST = reflection_pb2.ServerReflectionRequest(list_services="")


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services_and_describes_each(served: Served, version: str) -> None:
    answer = reflect(served, version, LIST)
    names = {service.name for service in answer.list_services_response.service}
    assert names == {
        *SERVICES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for name in names:
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
        described = reflect(served, version, asked).file_descriptor_response
        pool = DescriptorPool()
        for serialized in reversed(described.file_descriptor_proto):  # what is imported comes last
            pool.AddSerializedFile(serialized)
        for method in pool.FindServiceByName(name).methods:
            assert method.input_type.file.package == name.rpartition(".")[0]


def test_reflection_may_be_off(loop: LoopThread, gpt2: Family, tmp_path: Path) -> None:
    silent = start(loop, gpt2.base, tmp_path / "silent", reflection=False)
    try:
        for version in ("v1", "v1alpha"):
            with pytest.raises(grpc.RpcError) as caught:
                reflect(silent, version, LIST)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        silent.stop()


def metrics(served: Served) -> dict[str, float]:
    """Return {sample with its labels: value}, as Prometheus reads them."""
    url = f"http://{served.server.metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def test_metrics_move_with_what_happens(served: Served) -> None:
    before = metrics(served)
    assert before['superpose_domain_weight{domain="a"}'] == 1
    assert before["superpose_weights_verified"] == 1
    state = served.client.set({"b": 0.5, "c": -1.0})
    generation = served.client.generate(PROMPT, mix={}, max_new_tokens=5, ignore_eos=True)
    with pytest.raises(NotFoundError):
        served.client.generate(PROMPT, mix={"nobody": 1})
    with held(served.recorder):
        running = begin(served, tokens=4)
        served.recorder.wait_for(lambda: len(served.recorder.steps) == 5)
        during = metrics(served)
    list(running)
    served.recorder.wait_for(lambda: len(served.recorder.ends) == 2)
    after = metrics(served)

    assert during["superpose_num_requests_running"] == 1
    assert during["superpose_num_requests_waiting"] == 0
    assert during["superpose_kv_slots_used"] == 1
    assert after["superpose_num_requests_running"] == after["superpose_kv_slots_used"] == 0

    def moved(name: str) -> float:
        return after[f"superpose_{name}"] - before.get(f"superpose_{name}", 0.0)

    assert moved("prompt_tokens_total") == 2 * generation.usage.prompt_tokens
    assert moved("generation_tokens_total") == 5 + 4
    assert moved('request_success_total{finish_reason="length"}') == 2
    assert moved('request_failure_total{reason="DOMAIN_NOT_FOUND"}') == 1
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert moved(f"{name}_seconds_count") == 2
    assert moved("time_per_output_token_seconds_count") == 2
    assert moved('folds_total{result="ok"}') == 1
    assert moved("fold_duration_seconds_count") == 1
    assert moved("corrected_rows_total") == 4  # the first of five tokens comes from the prompt
    assert after["superpose_mix_generation"] == state.generation
    assert after[f'superpose_mix_info{{digest="{state.digest}"}}'] == 1
    weights = {name: value for name, value in after.items() if "domain_weight" in name}
    assert weights == {
        'superpose_domain_weight{domain="b"}': 0.5,
        'superpose_domain_weight{domain="c"}': -1.0,
    }


def test_no_text_is_made_under_an_older_mix_than_the_client_knows_of(served: Served) -> None:
    change = served.client.add("b")
    known, later = change.generation, change.generation + 1
    options: GenerateOptions = {"max_new_tokens": 2, "temperature": 0.0}
    with Client(served.address, retries=0) as client:
        for seen in (client.generate(PROMPT, min_generation=known, **options).mix, change):
            assert (seen.generation, seen.digest) == (known, change.digest)
        assert client.score(["x y"], min_generation=known).mix.generation == known
        calls: list[Callable[[], object]] = [
            lambda: client.generate(PROMPT, min_generation=later, **options),
            lambda: list(client.stream(PROMPT, min_generation=later, **options)),
            lambda: client.generate(PROMPT, mix="a", min_generation=later, **options),
            lambda: client.score(["x y"], min_generation=later),
            lambda: client.score(["x y"], mixes=["a", "b"], min_generation=later),
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match=f"generation {later} ") as refused:
                call()
            assert refused.value.reason == "GENERATION_NOT_REACHED"


def test_the_server_info_tells_what_runs(served: Served, gpt2: Family) -> None:
    info = served.client.info()
    assert info.base == str(gpt2.base)
    assert (info.dtype, info.device, info.context_length) == ("float32", DEVICE, 1024)
    assert (info.limits.max_batch, info.limits.max_queue) == (16, 256)
    assert (info.running, info.waiting, info.adapters) == (0, 0, 3)
    assert info.weights_intact
    assert info.uptime_seconds > 0


def test_analyze_measures_what_verify_would_find(served: Served) -> None:
    before = served.client.mix()
    analysis = served.client.analyze({"b": 0.5, "c": -2.0})
    assert served.client.mix() == before
    assert served.recorder.folds == []
    assert [(d.domain, d.weight) for d in analysis.domains] == [("b", 0.5), ("c", -2.0)]
    assert analysis.pairs[0].cosine_rms > 0
    assert analysis.folded
    assert 0 < analysis.fold_error < 1e-5
    assert served.client.analyze().mix.weights == {"a": 1.0}


@pytest.mark.parametrize("weight", [1e-20, 1e-40, 1e-46, 1e-300, 5e-324])
def test_analyze_of_a_weight_that_no_parameter_would_notice(served: Served, weight: float) -> None:
    # W0 + delta is W0, to the bit, so all of the delta is lost.
    analysis = served.client.analyze({"b": weight})
    assert analysis.fold_error == pytest.approx(1, rel=1e-6)
    assert not analysis.folded
    assert analysis.warnings[0].startswith("rounding would lose 100% of the sum")
    # Beside another domain it changes nothing.
    whole = served.client.analyze({"b": weight, "c": 1.0})
    assert whole.folded
    assert whole.fold_error == pytest.approx(served.client.analyze({"c": 1.0}).fold_error)
