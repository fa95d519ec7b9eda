from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.study import evaluator
from benchmarks.study.config import Evaluation
from benchmarks.study.evaluator import Evaluator, Local, NotFinite, Served
from transformers import AutoModelForCausalLM

from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import read_adapter
from superpose_adapters.scoring import EncodedText, loss_of, token_log_probabilities
from superpose_server.errors import FailedPrecondition

_FLOAT32 = Evaluation(dtype="float32", slice_tokens=40)


@pytest.fixture(scope="module")
def rows() -> list[EncodedText]:
    generator = torch.Generator().manual_seed(0)
    lengths = (12, 30, 5, 17)
    return [
        EncodedText(tuple(torch.randint(0, 50257, (n,), generator=generator).tolist()), n // 2)
        for n in lengths
    ]


@pytest.fixture(scope="module")
def local(tiny: Path) -> Local:
    return Local(tiny, _FLOAT32)


def _names(adapters: Path) -> list[Path]:
    return sorted(path for path in adapters.iterdir() if path.is_dir())


@pytest.mark.parametrize("scope", ["all", "answer"])
def test_losses_are_those_of_dense_weights(
    local: Local, tiny: Path, adapters: Path, rows: list[EncodedText], scope: str
) -> None:
    mix = list(zip(_names(adapters), (1.0, 0.5, -0.3), strict=False))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    layout = read_layout(model)
    with torch.no_grad():
        for folder, weight in mix:
            adapter = read_adapter(folder, layout)
            for module, factors in adapter.modules.items():
                delta = layout[module].delta(factors.b.double() @ factors.a.double())
                model.get_submodule(module).weight += weight * factors.scaling * delta
        expected = []
        for row in rows:
            ids = torch.tensor(row.ids)[None]
            logprobs = token_log_probabilities(model(ids).logits, ids)[0]
            expected.append(loss_of(logprobs, row, scope).nats)  # type: ignore[arg-type]
    assert local.row_nats(mix, rows, scope) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


def test_a_sum_without_a_finite_loss_is_told(
    local: Local, rows: list[EncodedText], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise FailedPrecondition("the model's output is not finite", "OUTPUT_NOT_FINITE")

    monkeypatch.setattr(evaluator, "score_slices", refuse)
    with pytest.raises(NotFinite, match="not finite"):
        local.row_nats([], rows, "all")


def test_a_live_server_agrees(
    local: Local, tiny: Path, adapters: Path, rows: list[EncodedText]
) -> None:
    names = _names(adapters)
    mixes = [[], [(names[0], 1.0)], [(names[0], 1.0), (names[1], 0.4)], [(names[2], -0.2)]]
    with Served(tiny, _FLOAT32) as served:
        for mix in mixes:
            each: tuple[Evaluator, ...] = (local, served)
            found = [one.row_nats(mix, rows, "answer") for one in each]
            assert found[0] == pytest.approx(found[1], rel=1e-4)
