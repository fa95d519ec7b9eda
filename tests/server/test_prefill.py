"""Prompts run in pieces of a bounded size, several rows in one pass."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
from tests.server.helpers import GREEDY, Bench, random_adapter
from torch import Tensor

from superpose_server.model.batch import Batch, Span
from superpose_server.model.model import Model

LONG = [(7 * i + i * i) % 250 for i in range(45)]


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def make(request: pytest.FixtureRequest, base: Path) -> functools.partial[Bench]:
    """A maker of benches, with and without the CPU kernels."""
    kernels = bool(request.param)
    if kernels and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    return functools.partial(Bench, base, kernels=kernels)


class Passes:
    """Notes the spans of every pass through a model."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans: list[list[Span]] = []
        self.together = model.packed
        real = model.run

        def noting(batch: Batch, keep: Tensor) -> Tensor:
            self.spans.append(list(batch.spans))
            return real(batch, keep)

        monkeypatch.setattr(model, "run", noting)

    def take(self) -> list[list[Span]]:
        taken, self.spans = self.spans, []
        return taken

    def take_step(self) -> tuple[list[Span], list[Span]]:
        """Return prompts and decoding rows of one step.

        They are one pass on packed parameters, and two elsewhere.
        """
        passes = self.take()
        prompts, decoding = (
            [span for spans in passes for span in spans if (len(span.ids) == 1) is one]
            for one in (False, True)
        )
        assert len(passes) == (1 if self.together or not (prompts and decoding) else 2)
        return prompts, decoding


def sizes(spans: list[Span]) -> list[tuple[int, int]]:
    """(position, tokens) of each span."""
    return [(span.position, len(span.ids)) for span in spans]


@pytest.mark.parametrize("budget", [1, 7, 44, 45, 46])
def test_a_prompt_in_pieces_is_the_prompt(
    make: functools.partial[Bench], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=budget)
    mix = bench.mix((random_adapter(bench.layout, 1), 1.0))
    passes = Passes(bench.model, monkeypatch)
    _, client = bench.submit(LONG, mix)
    bench.run()
    assert client.tokens == bench.alone(LONG, mix)
    pieces = [sizes(spans)[0] for spans in passes.take()][: -(GREEDY.limit - 1)]
    starts = list(range(0, len(LONG), budget))
    assert pieces == [(start, min(budget, len(LONG) - start)) for start in starts]


def test_running_rows_get_a_token_in_every_step_meanwhile(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=6)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2)
    mixes = [bench.mix((one, 1.0)), bench.mix(), bench.mix((two, -1.0))]
    params = dataclasses.replace(GREEDY, max_new_tokens=20)
    running = [bench.submit([65 + i], mixes[i], params)[1] for i in range(2)]
    bench.engine.step()
    passes = Passes(bench.model, monkeypatch)
    _, late = bench.submit(LONG, mixes[2])
    steps = 0
    while not late.tokens:
        before = [len(client.tokens) for client in running]
        bench.engine.step()
        prompt, decoded = passes.take_step()
        assert sum(len(span.ids) for span in prompt) <= 6
        assert len(decoded) == 2
        assert [len(client.tokens) for client in running] == [n + 1 for n in before]
        steps += 1
    assert steps == 8  # 45 tokens, 6 at a time
    bench.run()
    assert late.tokens == bench.alone(LONG, mixes[2])
    for i, client in enumerate(running):
        assert client.tokens == bench.alone([65 + i], mixes[i], 20)


def test_prompts_share_a_pass_first_come_first_served(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=10)
    one = random_adapter(bench.layout, 1)
    mixes = [bench.mix((one, 1.0)), bench.mix(), bench.mix((one, 0.5)), bench.mix()]
    prompts = [LONG[:4], LONG[4:19], LONG[19:22], LONG[22:29]]
    passes = Passes(bench.model, monkeypatch)
    clients = [bench.submit(prompt, mix)[1] for prompt, mix in zip(prompts, mixes, strict=True)]
    bench.engine.step()
    prompt, decoded = passes.take_step()
    assert sizes(prompt) == [(0, 4), (0, 6)]
    assert decoded == []
    assert [len(client.tokens) for client in clients] == [1, 0, 0, 0]
    bench.engine.step()
    prompt, decoded = passes.take_step()
    assert sizes(prompt) == [(6, 9)]
    assert sizes(decoded) == [(4, 1), (0, 1)]  # and the first token of the third prompt
    bench.engine.step()
    prompt, decoded = passes.take_step()
    assert sizes(prompt) == [(1, 2), (0, 7)]
    assert sizes(decoded) == [(5, 1), (15, 1)]
    bench.run()
    for client, ids, mix in zip(clients, prompts, mixes, strict=True):
        assert client.tokens == bench.alone(ids, mix)


def test_a_row_keeps_its_turn_when_rows_move_to_other_slots(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=5)
    mix = bench.mix()
    short = dataclasses.replace(GREEDY, max_new_tokens=3)
    _, first = bench.submit(LONG[:5], mix, short)
    clients = [bench.submit(LONG[i : i + 20], mix)[1] for i in (1, 2, 3)]
    passes = Passes(bench.model, monkeypatch)
    begun: list[tuple[int, ...]] = []
    while any(not client.tokens for client in clients):
        bench.engine.step()
        begun += [tuple(s.ids) for s in passes.take_step()[0] if s.position == 0]
    assert first.ended  # and the last row was moved into its slot, before it had begun
    assert begun == [tuple(LONG[i : i + 5]) for i in (0, 1, 2, 3)]
    bench.run()
    for i, client in zip((1, 2, 3), clients, strict=True):
        assert client.tokens == bench.alone(LONG[i : i + 20], mix)


def test_a_fold_between_the_pieces_of_a_prompt_changes_nothing(
    make: functools.partial[Bench],
) -> None:
    bench = make(prefill_tokens=9)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2)
    mixes = [bench.mix((one, 1.0)), bench.mix((two, 0.7)), bench.mix()]
    clients = [bench.submit(LONG[: 20 + i], mix)[1] for i, mix in enumerate(mixes)]
    for resident in (*mixes, *mixes):
        bench.fold(resident)
    bench.run()
    for i, (client, mix) in enumerate(zip(clients, mixes, strict=True)):
        assert client.tokens == bench.alone(LONG[: 20 + i], mix)


def test_a_row_that_leaves_in_the_middle_of_its_prompt_gives_its_turn_to_the_next(
    make: functools.partial[Bench],
) -> None:
    bench = make(prefill_tokens=4)
    mix = bench.mix()
    gone, left = bench.submit(LONG, mix)
    _, stays = bench.submit(LONG[:6], mix)
    bench.engine.step()
    gone.cancelled = True
    bench.run()
    assert left.tokens == []
    assert stays.tokens == bench.alone(LONG[:6], mix)
