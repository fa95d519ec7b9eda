"""Invariant 5 in bfloat16: a corrected row is nearly as good as the same row on folded weights.

The statistic is the mean absolute error of the log-probabilities of the whole vocabulary against a
float64 model of the same bfloat16 base and the exact deltas, over 4 texts of 48 random tokens: some
49,000 numbers a mix, of which each position's share an error. The model has the standard
initialisation of GPT-2 (0.02) and 4 layers of width 128, and deltas of a trained adapter's size:
2 % of the norm of each base parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_llama
from tests.server.helpers import (
    NEEDS_COMPILER,
    Bench,
    bound,
    dense_model,
    load_reference,
    logits_of,
    open_model,
    open_weights,
    random_adapter,
)
from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix
from superpose_adapters.peft.folder import read_adapter
from superpose_server.engine.runner import Runner

BOUND = 1.5
IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(3))


class Study:
    """One base in bfloat16, some mixes, and the error of each on any resident mix."""

    def __init__(self, family: str, root: Path, way: str) -> None:
        if family == "gpt2":
            base = tiny_gpt2(n_layer=4, n_embd=128, initializer_range=0.02)
        else:
            base = tiny_llama(
                num_hidden_layers=4,
                hidden_size=128,
                intermediate_size=256,
                initializer_range=0.02,
            )
        folder = save_base(base, root / "base")
        self.model = open_model(folder, torch.bfloat16, kernels=way == "kernels")
        # As on a GPU: corrected by factors in bfloat16 that captured steps can read.
        self.model.capturable = way == "captured"
        rounded = load_reference(folder, torch.bfloat16)
        self.base = dense_model(rounded, BoundMix("base"), self.model.layout)
        self.weights = open_weights(self.model)
        self.runner = Runner(self.model, self.weights, capture=lambda: lambda step: step)

        def adapter(name: str, seed: int, size: float) -> Adapter:
            folder = make_adapter(base, root / name, seed, size=size)
            return read_adapter(folder, self.model.layout)

        one, two = adapter("one", 1, 0.02), adapter("two", 2, 0.02)
        tiny = adapter("tiny", 3, 0.0005)
        self.mixes = {
            "base": BoundMix("base"),
            "one": bound((one, 1.0)),
            "two": bound((two, 1.0)),
            "sum": bound((one, 1.0), (two, 0.5)),
            "negative": bound((one, -1.0), (two, 0.3)),
            "tiny": bound((tiny, 1.0)),
        }
        self.exact = {name: self._oracle(mix) for name, mix in self.mixes.items()}

    def _oracle(self, mix: BoundMix) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = dense_model(self.base, mix, self.model.layout)(IDS).logits
        return logits.log_softmax(-1)

    def error(self, name: str, resident: str) -> float:
        self.weights.fold(self.weights.prepare(self.mixes[resident]))
        logits = logits_of(self.runner, IDS, [self.mixes[name]] * len(IDS))
        return float((logits.double().log_softmax(-1) - self.exact[name]).abs().mean())


@pytest.fixture(
    scope="module", params=["torch", "captured", pytest.param("kernels", marks=NEEDS_COMPILER)]
)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def study(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, way: str
) -> Study:
    return Study(request.param, tmp_path_factory.mktemp("bfloat16"), way)


def foldable(study: Study) -> Iterator[str]:
    for name, mix in study.mixes.items():
        if study.weights.prepare(mix).foldable:
            yield name


def test_a_corrected_row_is_nearly_as_exact_as_the_same_row_on_folded_weights(study: Study) -> None:
    names = list(foldable(study))
    assert names == ["base", "one", "two", "sum", "negative"]
    for name in names:
        alone = study.error(name, name)
        for resident in names:
            corrected = study.error(name, resident)
            assert corrected <= BOUND * alone, (name, resident, corrected / alone)


def test_a_row_is_far_closer_to_its_own_mix_than_to_another(study: Study) -> None:
    # The bound above means something: what a wrong gate would do is many times larger.
    other = float((study.exact["one"] - study.exact["base"]).abs().mean())
    assert study.error("one", "base") < 0.5 * other


def test_a_tiny_default_mix_leaves_a_base_request_as_it_is(study: Study) -> None:
    # 0.05 % of the base's norm: rounding would swallow most of it, and a corrected `base` row
    # would subtract what was never stored.
    assert study.error("base", "tiny") == study.error("base", "base")
    assert study.weights.resident.mix == BoundMix("base")
    # Nothing of the delta is lost: it is served by correction, as well as the base is served.
    assert study.error("tiny", "tiny") <= BOUND * study.error("base", "base")


def test_a_base_request_beside_a_tiny_default_mix_says_what_it_says_alone(
    bases: dict[str, Path], kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], dtype=torch.bfloat16, kernels=kernels)
    _, alone = bench.submit([1, 2, 3], bench.mix())
    bench.run()
    tiny = bench.mix((random_adapter(bench.layout, 1, size=1e-4), 1.0))
    assert not bench.weights.prepare(tiny).foldable
    bench.fold(tiny)
    _, base = bench.submit([1, 2, 3], bench.mix())
    _, default = bench.submit([4, 5], tiny)
    bench.run()
    assert base.tokens == alone.tokens
    assert default.error is None
    assert bench.observer.steps[-1] == (2, 1)  # the default mix is what is corrected
