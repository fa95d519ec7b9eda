"""The promise of the product: streams keep their mixes while operators change the default."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    Fold,
    LoopThread,
    Served,
    Step,
    check_greedy,
    start,
)

from superpose_client import Client, GenerationChunk

# What each stream asks for, and what that means while the default mix is a=1.
REQUESTS: dict[str, dict[str, float] | None] = {
    "default": None,
    "negative": {"a": 1.0, "b": -0.75},
    "empty": {},
    "pair": {"b": 0.5, "c": 1.25},
}
MEANING = {name: {"a": 1.0} if mix is None else mix for name, mix in REQUESTS.items()}

# Twenty changes of the default mix from a=1 on, each a real one.
CHANGES: list[Callable[[Client], Any]] = [
    lambda client: client.add("b", 0.5),
    lambda client: client.add("c", -1.0),
    lambda client: client.remove("a"),
    lambda client: client.set("base"),
    lambda client: client.add("c", 2.0),
    lambda client: client.set({"a": -0.5, "b": 1.0}),
    lambda client: client.remove("b"),
    lambda client: client.set({"b": 0.5, "c": 1.25}),
    lambda client: client.add("a"),
    lambda client: client.set({"a": 1.0}),
] * 2


@dataclass(frozen=True)
class Run:
    """How long the streams are, and how many steps there are at most between two changes."""

    new_tokens: int
    pace: int


def stream_all(served: Served, run: Run) -> dict[str, list[GenerationChunk]]:
    """Run the four streams together while the operator makes all changes."""
    recorder = served.recorder
    changes_left = len(CHANGES)
    together = 0
    begun = False

    def gate(step: Step) -> None:
        """Make the test as quick as the machine, and as true on a slow one.

        The first step waits until all four requests are in; then every `pace` steps of all four
        one more change must have been asked for.
        """
        nonlocal changes_left, together, begun
        if not begun:
            begun = True
            for _ in range(len(REQUESTS)):
                recorder.submitted.get(timeout=PATIENCE)
        if len(step.rows) == len(REQUESTS):
            together += 1
            if together % run.pace == 0 and changes_left:
                assert recorder.folds_asked.acquire(timeout=PATIENCE)
                changes_left -= 1

    def collect(mix: dict[str, float] | None) -> list[GenerationChunk]:
        stream = served.client.stream(
            PROMPT, mix=mix, temperature=0, max_new_tokens=run.new_tokens, ignore_eos=True
        )
        return list(stream)

    recorder.gate = gate
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        streams = {name: pool.submit(collect, mix) for name, mix in REQUESTS.items()}
        try:
            for number, change in enumerate(CHANGES):
                due = number * run.pace + run.pace // 2
                recorder.wait_for(lambda due=due: together >= due)  # type: ignore[misc]
                change(served.client)
        finally:
            recorder.gate = lambda step: None
            recorder.folds_asked.release(len(CHANGES))  # a failed change must not hold the engine
        return {name: stream.result(PATIENCE) for name, stream in streams.items()}


@pytest.mark.parametrize(
    ("family_name", "device", "run"),
    [
        ("gpt2", "cpu", Run(new_tokens=900, pace=40)),
        ("llama", "cpu", Run(new_tokens=240, pace=10)),
        pytest.param(
            "gpt2",
            "cuda",
            Run(new_tokens=240, pace=10),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ],
    ids=["gpt2", "llama", "cuda"],
)
def test_four_streams_keep_their_mixes_through_twenty_changes(
    family_name: str,
    device: str,
    run: Run,
    loop: LoopThread,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    family: Family = request.getfixturevalue(family_name)
    served = start(loop, family.base, tmp_path / "state", device=device)
    try:
        family.push_all(served.client)
        before = served.client.add("a")
        served.recorder.forget()
        streams = stream_all(served, run)
        after = served.client.mix()
        verified = served.client.verify()
        prompt = tuple(served.runtime.texts.prompt(PROMPT))
        where = {tensor.device.type for tensor in _tensors(served)}
    finally:
        served.stop()

    assert after.generation == before.generation + len(CHANGES)
    tokens = {
        name: tuple(token for chunk in chunks for token in chunk.token_ids)
        for name, chunks in streams.items()
    }
    for name, mix in MEANING.items():
        assert len(tokens[name]) == run.new_tokens
        check_greedy(family.folded(mix), prompt, tokens[name])
        last = streams[name][-1]
        assert last.mix is not None
        assert (last.mix.generation, last.mix.weights) == (before.generation, mix)
    texts = {"".join(chunk.text for chunk in chunks) for chunks in streams.values()}
    assert len(texts) == len(REQUESTS)

    # The order of events shows that every change was folded between two steps of all four rows.
    events = served.recorder.events
    folds = [i for i, event in enumerate(events) if isinstance(event, Fold)]
    whole = [i for i, e in enumerate(events) if isinstance(e, Step) and len(e.rows) == 4]
    assert len(CHANGES) <= len(folds) <= len(CHANGES) + 1
    assert whole[0] < folds[0]
    assert folds[-1] < whole[-1]
    first, last_step = events[whole[0]], events[whole[-1]]
    assert isinstance(first, Step)
    assert isinstance(last_step, Step)
    assert set(first.rows) == set(last_step.rows)
    assert sum(step.corrected for step in served.recorder.steps) > 0
    assert verified.ok
    assert where == {device}


def _tensors(served: Served) -> list[torch.Tensor]:
    """Return what must live on the device: the model, the kept base and the resident factors."""
    weights = served.weights
    factors = [factor for pair in weights.resident.factors.values() for factor in pair]
    return [*served.parameters().values(), *weights._base.values(), *factors]


def test_a_stream_equals_transformers_generate_on_folded_weights(
    served: Served, gpt2: Family
) -> None:
    mix = {"a": 1.5, "b": -0.5, "c": 0.25}
    prompt = served.runtime.texts.prompt(PROMPT)
    expected = gpt2.folded(
        mix
    ).generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :]
    corrected = served.greedy(mix, 60)
    assert served.recorder.steps[-1].corrected == 1
    served.client.set(mix)
    folded = served.greedy(None, 60)
    assert served.recorder.steps[-1].corrected == 0
    assert corrected == folded == tuple(expected.tolist())
