"""Logits of folded and of corrected models equal those of PEFT's own merged model.

In float32, `RTOL` and `ATOL` below: the logits of the tiny models are of the order of 1, and the
two models sum the same terms in different orders.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import load_peft, make_adapter, tiny_gpt2, tiny_llama
from tests.server.helpers import (
    bound,
    dense_model,
    logits_of,
    open_model,
    open_weights,
)
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix
from superpose_adapters.peft.folder import read_adapter
from superpose_server.engine.runner import Runner
from superpose_server.model.model import Model
from superpose_server.weights.resident import ResidentWeights

RTOL, ATOL = 1e-4, 2e-5
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))

GPT2_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"attn.c_attn": 7, "h.1.mlp.c_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"c_attn": 3, "h.0.attn.c_proj": 40}},
    "rank_and_alpha_pattern": {
        "rank_pattern": {"c_attn": 2},
        "alpha_pattern": {"c_attn": 24},
        "use_rslora": True,
    },
    "rslora": {"use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "h"},
    "one_layer": {"layers_to_transform": 0},
    "suffix_list": {"target_modules": ["attn.c_proj", "c_fc"]},
    "regex": {"target_modules": r".*\.h\.[01]\.(attn\.c_attn|mlp\.c_(fc|proj))"},
    "exclude": {"exclude_modules": ["h.0.attn.c_attn"]},
    "all_linear": {"target_modules": "all-linear"},
    "large_rank": {"r": 40, "lora_alpha": 5},
}
LLAMA_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 1}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.q_proj": 40}},
    "rslora": {"use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "suffix_list": {"target_modules": ["self_attn.k_proj", "o_proj", "gate_proj"]},
    "regex": {"target_modules": r".*\.layers\.\d+\.(self_attn\.[qk]|mlp\.up)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "untied_head": {"target_modules": ["lm_head", "q_proj"]},
}
CONFIGS = [
    *(("gpt2", name, config) for name, config in GPT2_CONFIGS.items()),
    *(("llama", name, config) for name, config in LLAMA_CONFIGS.items()),
]


class Served:
    """A base served as the server does, without an engine."""

    def __init__(self, family: str, folder: Path, *, kernels: bool) -> None:
        self.base: nn.Module = tiny_gpt2() if family == "gpt2" else tiny_llama()
        self.model: Model = open_model(folder, kernels=kernels)
        self.weights: ResidentWeights = open_weights(self.model)
        self.runner = Runner(self.model, self.weights)

    def read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.model.layout)

    def fold(self, mix: BoundMix) -> None:
        self.weights.fold(self.weights.prepare(mix))

    def logits(self, mix: BoundMix) -> Tensor:
        """Logits of `mix` on whatever is resident."""
        mixes = [mix] * len(IDS)
        corrected = 0 if mix == self.weights.resident.mix else len(mixes)
        assert self.runner.corrected(mixes) == corrected
        return logits_of(self.runner, IDS, mixes)


def peft_merged(base: nn.Module, folder: Path) -> Tensor:
    """Logits of PEFT's own merged model."""
    merged: Any = load_peft(base, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = merged.merge_and_unload()
    with torch.inference_mode():
        logits: Tensor = merged(IDS).logits
    return logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("family", "config"), [(f, c) for f, _, c in CONFIGS], ids=[f"{f}-{n}" for f, n, _ in CONFIGS]
)
@pytest.mark.parametrize("dtype", [torch.float32])
def test_logits_equal_pefts_merged_model(
    family: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    bases: dict[str, Path],
    tmp_path: Path,
    kernels: bool,
) -> None:
    served = Served(family, bases[family], kernels=kernels)
    check_against_peft(served, config, dtype, tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_files_in_half_precision_equal_pefts_reading(
    family: str, dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path, kernels: bool
) -> None:
    served = Served(family, bases[family], kernels=kernels)
    check_against_peft(served, {}, dtype, tmp_path)


def check_against_peft(
    served: Served, config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    # A large delta, so that a wrong scaling of one module shows.
    folder = make_adapter(served.base, tmp_path / "one", 1, size=0.5, dtype=dtype, **config)
    other = served.read(make_adapter(served.base, tmp_path / "two", 2, size=0.3))
    expected = peft_merged(served.base, folder)
    mix = bound((served.read(folder), 1.0))
    with torch.inference_mode():
        plain = served.base(IDS).logits
    assert float((expected - plain).abs().max()) > 0.05  # the adapter does something

    assert_close(served.logits(mix), expected)  # corrected on the base
    served.fold(bound((other, -0.7)))
    assert_close(served.logits(mix), expected)  # corrected on another mix
    served.fold(mix)
    assert_close(served.logits(mix), expected)  # folded
    assert_close(served.logits(BoundMix("base")), plain)  # corrected back to the base


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weighted_sums_equal_the_dense_sum_whatever_is_resident(
    family: str, bases: dict[str, Path], tmp_path: Path, kernels: bool
) -> None:
    served = Served(family, bases[family], kernels=kernels)
    configs: list[dict[str, Any]] = [
        {},
        {"use_rslora": True, "r": 8},
        {"target_modules": ["c_fc"] if family == "gpt2" else ["o_proj"], "r": 2},
    ]
    one, two, three = (
        served.read(make_adapter(served.base, tmp_path / f"a{i}", i, size=0.3, **config))
        for i, config in enumerate(configs)
    )
    mixes = [
        bound((one, 1.0)),
        bound((one, 0.5), (two, 1.0), (three, -1.0)),
        bound((two, -0.8)),
        bound((one, 0.3), (one, 0.4), (three, 2.0)),  # one adapter under two names
        BoundMix("base"),
    ]
    expected = []
    for mix in mixes:
        reference = dense_model(served.base, mix, served.model.layout)
        with torch.inference_mode():
            expected.append(reference(IDS).logits)
    assert len({round(float(logits.sum()), 3) for logits in expected}) == len(mixes)
    for resident in mixes:
        served.fold(resident)
        for mix, logits in zip(mixes, expected, strict=True):
            assert_close(served.logits(mix), logits)


def test_rows_of_one_batch_are_corrected_each_by_its_own_mix(
    bases: dict[str, Path], tmp_path: Path, kernels: bool
) -> None:
    served = Served("gpt2", bases["gpt2"], kernels=kernels)
    one, two = (
        served.read(make_adapter(served.base, tmp_path / f"a{i}", i, size=0.3)) for i in range(2)
    )
    rows = [bound((one, 1.0)), BoundMix("base"), bound((one, -0.5), (two, 1.0)), bound((two, 1.0))]
    ids = IDS[:1].expand(len(rows), -1)
    for resident in rows:
        served.fold(resident)
        assert served.runner.corrected(rows) == len(rows) - 1
        logits = logits_of(served.runner, ids, rows)
        for mix, row in zip(rows, logits, strict=True):
            reference = dense_model(served.base, mix, served.model.layout)
            with torch.inference_mode():
                assert_close(row[None], reference(ids[:1]).logits)
