"""The inference layer as a door without any wire uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import PROMPT, Family, LoopThread, Served, check_greedy, held, start
from tests.makers import VOCABULARY, make_adapter

from superpose_adapters.mix import Mix
from superpose_client import FailedPreconditionError, ScoreText
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.errors import FitRunning, InvalidArgument, QueueFull
from superpose_server.inference.generation import Generation
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import (
    FitRequest,
    GenerateRequest,
    QuestionAnswer,
    ScoreRequest,
)
from superpose_server.inference.result import FitProgress, FitResult

LONG = SamplingParams(max_new_tokens=900, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture
def inference(served: Served) -> Inference:
    async def make() -> Inference:
        return Inference(served.runtime)

    return served.loop.run(make())


@pytest.fixture
def one_row(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Iterator[Served]:
    """A server of one row at a time, where nobody may wait."""
    server = start(loop, gpt2.base, tmp_path / "one", max_batch=1, max_queue=0)
    yield server
    server.stop()


def test_text_is_the_same_in_pieces_and_as_a_whole(
    served: Served, inference: Inference, gpt2: Family
) -> None:
    mix = Mix.of({"a": 0.5, "b": -1.0})
    prompt = tuple(served.runtime.texts.prompt(PROMPT))

    async def work() -> tuple[Generation, list[Chunk], Generation, Chunk]:
        pieces = await inference.generate(GenerateRequest(PROMPT, mix, SHORT))
        whole = await inference.generate(GenerateRequest(prompt, mix, SHORT, "mine"))
        return pieces, [chunk async for chunk in pieces], whole, await whole.whole()

    pieces, chunks, whole, chunk = served.loop.run(work())
    assert "".join(piece.text for piece in chunks) == chunk.text
    assert tuple(token for piece in chunks for token in piece.token_ids) == chunk.token_ids
    check_greedy(gpt2.folded({"a": 0.5, "b": -1.0}), prompt, chunk.token_ids)
    for generation in (pieces, whole):
        assert (generation.prompt_tokens, generation.completion_tokens) == (len(prompt), 20)
        assert generation.mix.generation == served.runtime.default_mix.state.generation
        assert {e.domain: e.weight for e in generation.mix.mix.entries} == {"a": 0.5, "b": -1.0}
    assert whole.request_id == "mine"
    assert pieces.request_id


def check_left(served: Served) -> None:
    served.recorder.wait_for(lambda: bool(served.recorder.ends))
    (end,) = served.recorder.ends
    assert end.reason is FinishReason.ABORTED
    assert len(end.row.tokens) < LONG.limit


@pytest.mark.parametrize("whole", [False, True], ids=["pieces", "whole"])
def test_a_reader_whose_task_is_cancelled_lets_go_of_its_row(
    served: Served, inference: Inference, whole: bool
) -> None:
    async def read(generation: Generation) -> None:
        if whole:
            await generation.whole()
        async for _ in generation:
            pass

    async def work() -> None:
        reader = asyncio.ensure_future(
            read(await inference.generate(GenerateRequest(PROMPT, options=LONG)))
        )
        await asyncio.to_thread(served.recorder.wait_for, lambda: bool(served.recorder.steps))
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    with held(served.recorder):
        served.loop.run(work())
    check_left(served)


def test_a_reader_that_has_read_enough_lets_go_of_its_row(
    served: Served, inference: Inference
) -> None:
    async def work() -> None:
        generation = await inference.generate(GenerateRequest(PROMPT, options=LONG))
        async with aclosing(aiter(generation)) as chunks:
            async for _ in chunks:
                break

    with held(served.recorder):
        served.loop.run(work())
    check_left(served)


def test_a_request_may_be_let_go_of_from_outside(served: Served, inference: Inference) -> None:
    async def work() -> FinishReason | None:
        generation = await inference.generate(GenerateRequest(PROMPT, options=LONG))
        generation.cancel()
        return (await generation.whole()).finish_reason

    assert served.loop.run(work()) is FinishReason.ABORTED
    check_left(served)


def test_a_full_queue_refuses_before_anything_runs(one_row: Served) -> None:
    async def work() -> None:
        inference = Inference(one_row.runtime)
        with held(one_row.recorder):
            running = await inference.generate(GenerateRequest(PROMPT, options=LONG))
            with pytest.raises(QueueFull):
                await inference.generate(GenerateRequest(PROMPT, options=LONG))
            running.cancel()
        await running.whole()

    one_row.loop.run(work())
    check_left(one_row)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_that_no_wire_has_checked_are_refused(
    served: Served, inference: Inference, token: int
) -> None:
    """A wire of unsigned numbers lets no negative id in; others do."""
    stops = SamplingParams(stop_token_ids=(token,))
    calls: dict[str, Coroutine[Any, Any, object]] = {
        "token_ids": inference.generate(GenerateRequest((1, token))),
        "options.stop_token_ids": inference.generate(GenerateRequest("a", options=stops)),
        "items[1]": inference.score(ScoreRequest(("ab", (1, token)))),
    }
    for field, call in calls.items():
        with pytest.raises(InvalidArgument, match=f"holds token {token}, and the base") as caught:
            served.loop.run(call)
        assert caught.value.field == field


def test_scores_under_several_mixes_are_those_of_each_alone(served: Served) -> None:
    texts: list[ScoreText] = [("q", "an answer"), "The sum of two deltas", [5, 6, 7]]
    mixes = [{}, {"a": 1.0}, {"b": -0.5, "c": 2.0}, {"a": 1.0}]
    together = served.client.score(texts, mixes=mixes, logprobs=True, max_length=9)
    assert [block.mix.weights for block in together.mixes] == mixes
    for mix, block in zip(mixes, together.mixes, strict=True):
        alone = served.client.score(texts, mix=mix, logprobs=True, max_length=9)
        assert (block.tokens, block.mix) == (alone.tokens, alone.mix)
        assert block.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
        for found, expected in zip(block.items, alone.items, strict=True):
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_which_of_several_mixes_is_not_finite_is_told(
    served: Served, gpt2: Family, tmp_path: Path
) -> None:
    served.client.push("huge", make_adapter(gpt2.model, tmp_path / "huge", 9, size=1e30))
    with pytest.raises(FailedPreconditionError, match=r"not finite under mixes\[2\]"):
        served.client.score(["ab", "cd"], mixes=["base", "a", "huge=1e4", "b"])
    assert served.client.score(["ab"], mixes=["base", "a"]).mixes[1].mix.weights == {"a": 1.0}


def test_one_fit_runs_at_a_time(served: Served, inference: Inference) -> None:
    request = FitRequest(("ab", "cd", "ef"), ("a",), budget=3)

    async def run() -> None:
        async with aclosing(inference.fit(request)) as first:
            assert isinstance(await anext(first), FitProgress)
            with pytest.raises(FitRunning, match="one runs at a time"):
                await anext(inference.fit(request))
        *_, last = [update async for update in inference.fit(request)]
        assert isinstance(last, FitResult)

    served.loop.run(run())


def test_scores_are_those_of_the_client(served: Served, inference: Inference) -> None:
    rows = (QuestionAnswer("q", "an answer"), QuestionAnswer("why", "so"))
    [scores] = served.loop.run(inference.score(ScoreRequest(rows, max_length=30, scope="answer")))
    wire = served.client.score(
        [("q", "an answer"), ("why", "so")], max_length=30, scope="answer", logprobs=True
    )
    assert [item.logprobs for item in scores.items] == [item.logprobs for item in wire.items]
    assert scores.loss.perplexity == pytest.approx(wire.perplexity, rel=1e-12)
    assert scores.loss.tokens == wire.tokens
    assert scores.mix.mix.digest == wire.mix.digest
