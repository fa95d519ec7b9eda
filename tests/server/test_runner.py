"""The runner: what rows ask for in any order and company, against float64 sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.server.helpers import (
    bound,
    dense_model,
    load_reference,
    open_model,
    open_weights,
    random_adapter,
)

from superpose_adapters.mix import BoundMix
from superpose_server.engine.runner import Runner
from superpose_server.model.batch import Span

PROMPTS = [[72, 101, 108, 108, 111], [65], [10, 20, 30], [200, 3, 7, 9, 11, 13, 17]]


class Rows:
    """Four rows under four mixes, their prompts run but for their last token or two."""

    def __init__(self, folder: Path, *, kernels: bool) -> None:
        self.model = open_model(folder, kernels=kernels)
        self.weights = open_weights(self.model)
        self.runner = Runner(self.model, self.weights)
        one, two = (random_adapter(self.model.layout, seed) for seed in (1, 2))
        base = self.model.base_digest
        self.mixes = [
            BoundMix(base),
            bound((one, 1.0), base_digest=base),
            bound((one, -0.5), (two, 1.0), base_digest=base),
            bound((two, 0.7), base_digest=base),
        ]
        pristine = load_reference(folder)
        self.exact = [
            dense_model(pristine, mix, self.model.layout)(torch.tensor([prompt])).logits[0]
            for mix, prompt in zip(self.mixes, PROMPTS, strict=True)
        ]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def rows(request: pytest.FixtureRequest, bases: dict[str, Path], kernels: bool) -> Rows:
    return Rows(bases[request.param], kernels=kernels)


@given(
    order=st.permutations(range(4)),
    left=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    resident=st.integers(0, 3),
    last=st.booleans(),
)
def test_prompts_and_decoding_rows_in_any_order_are_what_they_are_alone(
    rows: Rows, order: list[int], left: list[int], resident: int, last: bool
) -> None:
    rows.weights.fold(rows.weights.prepare(rows.mixes[resident]))
    spans, wanted, expected = [], [], []
    done = 0
    for row in order:
        prompt, mix = PROMPTS[row], rows.mixes[row]
        begin = max(0, len(prompt) - left[row])
        if begin:
            rows.runner.run([Span(row, prompt[:begin], 0)], [begin - 1], [mix])
        spans.append(Span(row, prompt[begin:], begin))
        count = len(prompt) - begin
        for at in range(count):
            if not last or at == count - 1:
                wanted.append(done + at)
                expected.append(rows.exact[row][begin + at])
        done += count
    found = rows.runner.run(spans, wanted, [rows.mixes[row] for row in order])
    assert torch.allclose(found.double(), torch.stack(expected), rtol=0, atol=2e-4)


def test_rows_whose_mix_is_not_resident_are_counted(rows: Rows) -> None:
    for resident in rows.mixes:
        rows.weights.fold(rows.weights.prepare(resident))
        assert rows.runner.corrected(rows.mixes * 2) == 6
        assert rows.runner.corrected([resident] * 3) == 0
