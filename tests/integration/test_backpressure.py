"""A client that reads slowly, or no more, is a matter between it and the socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tests.integration.harness import PATIENCE, PROMPT, Served, Step, wait_until

from superpose_proto.v1 import inference_pb2 as pb
from superpose_proto.v1.inference_pb2_grpc import InferenceServiceStub
from superpose_server.engine.sequence import FinishReason, Sequence

TOKENS = 900
# So small that a stream which is not read stops its sender after a few responses.
WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
FEW = 100  # responses: more than such a window holds, and far fewer than there are tokens


@pytest.fixture
def narrow(served: Served) -> Iterator[grpc.Channel]:
    """A channel on which the server cannot send what is not read."""
    with grpc.insecure_channel(served.address, options=WINDOW) as channel:
        yield channel


def options(tokens: int) -> pb.GenerateOptions:
    return pb.GenerateOptions(
        max_new_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=True
    )


def begin(channel: grpc.Channel, tokens: int = TOKENS, timeout: float = PATIENCE) -> Any:
    """Begin a stream that is read by nobody until it is iterated over."""
    request = pb.GenerateStreamRequest(prompt=PROMPT, options=options(tokens))
    return InferenceServiceStub(channel).GenerateStream(request, timeout=timeout)


def wait_until_idle(served: Served) -> None:
    wait_until(lambda: served.client.info().running == 0, "all rows have left")


def pending(row: Sequence) -> int:
    """Return how many tokens a row has made that its request has not taken."""
    inbox: Any = getattr(row.sink, "__self__")  # noqa: B009  # a method's own object
    return sum(len(chunk.token_ids) for chunk in tuple(inbox._chunks))


def test_who_does_not_read_holds_up_nobody_and_loses_nothing(
    served: Served, narrow: grpc.Channel
) -> None:
    slow = begin(narrow)
    with ThreadPoolExecutor(3) as pool:
        others = [
            pool.submit(lambda call: list(call), begin(channel))
            for channel in (narrow, served.channel, served.channel)
        ]
        quick = [other.result(PATIENCE) for other in others]
    unary = InferenceServiceStub(narrow).Generate(
        pb.GenerateRequest(prompt=PROMPT, options=options(TOKENS)), timeout=PATIENCE
    )
    # Its row has ended long before it is read, and has left nothing with the engine.
    served.recorder.wait_for(lambda: len(served.recorder.ends) == 5)
    assert {end.reason for end in served.recorder.ends} == {FinishReason.LENGTH}
    wait_until_idle(served)

    responses = list(slow)
    assert len(responses) < FEW
    for stream in (responses, *quick):
        assert [i for response in stream for i in response.token_ids] == list(unary.token_ids)
        assert [p for response in stream for p in response.logprobs] == pytest.approx(
            list(unary.logprobs), abs=1e-4
        )
        assert "".join(response.text for response in stream) == unary.text
        assert stream[0].mix == stream[-1].mix == unary.mix
        assert stream[-1].usage == unary.usage
        assert [response.finish_reason for response in stream] == [
            *[pb.FINISH_REASON_UNSPECIFIED] * (len(stream) - 1),
            pb.FINISH_REASON_LENGTH,
        ]


@pytest.mark.parametrize("how", ["cancel", "deadline", "hang up"])
def test_a_row_leaves_at_the_next_step_after_its_reader_that_did_not_read(
    served: Served, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    blocked, let_go = threading.Event(), threading.Event()
    steps_after: list[Step] = []

    def gate(step: Step) -> None:
        """Hold the engine once a response waits for its reader, until that reader is gone."""
        if let_go.is_set():
            steps_after.append(step)
        elif pending(step.rows[0]) >= FEW:
            blocked.set()
            assert let_go.wait(PATIENCE)

    served.recorder.gate = gate
    channel = grpc.insecure_channel(served.address, options=WINDOW)
    try:
        call = begin(channel, timeout=3.0 if how == "deadline" else PATIENCE)
        assert blocked.wait(PATIENCE)
        (row,) = served.recorder.steps[-1].rows
        if how == "cancel":
            call.cancel()
        elif how == "hang up":
            channel.close()
        wait_until(lambda: row.cancelled, "the server knows that the client is gone")
    finally:
        let_go.set()
        channel.close()
    served.recorder.wait_for(lambda: bool(served.recorder.ends))
    assert served.recorder.ends[0].reason is FinishReason.ABORTED
    assert steps_after == []
    assert len(row.tokens) < TOKENS
    wait_until_idle(served)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_an_error_comes_behind_the_text_that_was_made_before_it(
    served: Served, narrow: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gate(step: Step) -> None:
        (row,) = step.rows
        if len(row.tokens) == TOKENS // 2:
            monkeypatch.setattr(row, "append", broken)

    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    served.recorder.gate = gate
    call = begin(narrow)
    served.recorder.wait_for(lambda: bool(served.recorder.ends))
    responses: list[pb.GenerateStreamResponse] = []
    with pytest.raises(grpc.RpcError, match="internal error"):
        responses.extend(call)
    assert call.code() is grpc.StatusCode.INTERNAL
    served.recorder.gate = lambda step: None
    tokens = tuple(token for response in responses for token in response.token_ids)
    assert tokens == served.greedy(tokens=TOKENS // 2)
    assert {response.finish_reason for response in responses} == {pb.FINISH_REASON_UNSPECIFIED}
