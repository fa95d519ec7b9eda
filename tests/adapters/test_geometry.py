"""Geometry from factors against dense float64 arithmetic in numpy."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from superpose_adapters import geometry
from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.fold import concatenate_factors, fold_into
from superpose_adapters.layout import Layout, ModuleLayout
from superpose_adapters.mix import BoundEntry, BoundMix

LAYOUT: Layout = {
    "transformer.h.0.attn.c_attn": ModuleLayout(32, 96, transposed=True),
    "transformer.h.1.attn.c_attn": ModuleLayout(32, 96, transposed=True),
    "transformer.h.0.mlp.c_proj": ModuleLayout(128, 32, transposed=True),
    "score": ModuleLayout(24, 8, transposed=False),
}
NAMES = list(LAYOUT)


def make(seed: int, modules: list[str], rank: int = 3, size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in sorted(modules):
        entry = LAYOUT[name]
        a = torch.randn(rank, entry.in_features, generator=generator)
        b = torch.randn(entry.out_features, rank, generator=generator) * size
        factors[name] = Factors(a, b, scaling=1.5 + seed)
    return Adapter(digest=f"{seed:064d}", modules=factors)


def dense(adapter: Adapter, module: str) -> NDArray[np.float64]:
    """The delta in PEFT's (out, in), or zeros where the adapter does nothing."""
    entry = LAYOUT[module]
    if module not in adapter.modules:
        return np.zeros((entry.out_features, entry.in_features))
    f = adapter.modules[module]
    product: NDArray[np.float64] = f.b.numpy().astype(np.float64) @ f.a.numpy().astype(np.float64)
    return f.scaling * product


def flat(adapter: Adapter) -> NDArray[np.float64]:
    return np.concatenate([dense(adapter, m).ravel() for m in LAYOUT])


MATH = make(1, NAMES)
LAW = make(2, NAMES[1:], rank=5)
FINANCE = make(3, NAMES[:2], rank=1)
ALL = {"math": MATH, "law": LAW, "finance": FINANCE}


def bound(**weights: float) -> BoundMix:
    return BoundMix.of("base", (BoundEntry(d, ALL[d], w) for d, w in weights.items()))


def base_of(dtype: torch.dtype, seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: entry.delta(
            torch.randn(entry.out_features, entry.in_features, generator=generator)
        ).to(dtype, memory_format=torch.contiguous_format)
        for name, entry in LAYOUT.items()
    }


def fold(base: dict[str, Tensor], weights: dict[Adapter, float]) -> dict[str, Tensor]:
    folded = {}
    for module, parameter in base.items():
        folded[module] = parameter.clone()
        pair = concatenate_factors(weights, module)
        if pair is not None:
            fold_into(folded[module], parameter, *pair, LAYOUT[module])
    return folded


def test_inner_products_are_those_of_dense_deltas() -> None:
    for first, second in [*combinations(ALL.values(), 2), (MATH, MATH)]:
        for module in set(first.modules) & set(second.modules):
            x, y = dense(first, module), dense(second, module)
            found = geometry.inner_product(first.modules[module], second.modules[module])
            scale = float(np.linalg.norm(x) * np.linalg.norm(y))
            assert found == pytest.approx(float((x * y).sum()), abs=1e-12 * scale)


def test_gram_holds_every_pair() -> None:
    module = NAMES[1]
    deltas = [np.asarray(dense(a, module)).ravel() for a in ALL.values()]
    found = geometry.gram([a.modules[module] for a in ALL.values()]).numpy()
    np.testing.assert_allclose(found, np.array([[x @ y for y in deltas] for x in deltas]))


def test_norms_are_those_of_dense_sums() -> None:
    for adapter in ALL.values():
        assert geometry.delta_norm(adapter) == pytest.approx(np.linalg.norm(flat(adapter)))
    weights = {MATH: 0.5, LAW: -2.0, FINANCE: 3.0}
    whole = sum(w * flat(a) for a, w in weights.items())
    assert geometry.mix_norm(weights) == pytest.approx(np.linalg.norm(whole))
    assert geometry.mix_norm({MATH: 0.0}) == geometry.mix_norm({}) == 0.0


def test_a_sum_that_cancels_has_a_small_norm() -> None:
    twin = Adapter("f" * 64, MATH.modules)
    assert geometry.mix_norm({MATH: 1.0, twin: -1.0}) <= 1e-6 * geometry.delta_norm(MATH)


@pytest.mark.parametrize("scale", [1e-160, 1e-300, 2.0**-1060])
def test_tiny_weights_do_not_vanish(scale: float) -> None:
    weights = {MATH: 0.5, LAW: -2.0, FINANCE: 3.0}
    tiny = {adapter: weight * scale for adapter, weight in weights.items()}
    norm = geometry.mix_norm(weights)
    assert geometry.mix_norm(tiny) == pytest.approx(norm * scale, rel=1e-3)
    found = geometry.interference(list(tiny.items()))
    assert found.ratio == pytest.approx(geometry.interference(list(weights.items())).ratio)
    base = base_of(torch.float32)
    rounding = {module: geometry.rounding_energy(w) for module, w in base.items()}
    assert geometry.expected_fold_error(rounding, geometry.mix_norm(tiny)) == 1
    # W0 + delta is W0 in float32: what is lost is the delta.
    assert geometry.fold_error(base, base, tiny, LAYOUT) == pytest.approx(1)


def test_cosines_count_the_shared_modules_only() -> None:
    found = geometry.overlap("math", MATH, "law", LAW)
    assert list(found.cosines) == list(found.floors) == sorted(NAMES[1:])
    expected = {}
    for module in NAMES[1:]:
        x, y = dense(MATH, module), dense(LAW, module)
        expected[module] = float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert dict(found.cosines) == pytest.approx(expected, abs=1e-12)
    assert found.rms == pytest.approx(math.sqrt(np.mean(np.square(list(expected.values())))))
    assert found.rms_by_type == pytest.approx(
        {
            "attn.c_attn": abs(expected["transformer.h.1.attn.c_attn"]),
            "mlp.c_proj": abs(expected["transformer.h.0.mlp.c_proj"]),
            "score": abs(expected["score"]),
        }
    )
    sizes = [32 * 96, 128 * 32, 24 * 8]
    assert found.floor == pytest.approx(math.sqrt(np.mean([1 / n for n in sizes])))


def test_overlap_of_equal_opposite_and_separate_deltas() -> None:
    module = NAMES[0]
    factors = MATH.modules[module]
    opposite = Adapter("o" * 64, {module: Factors(factors.a, factors.b, -0.1)})
    assert geometry.overlap("a", MATH, "b", MATH).rms == pytest.approx(1.0)
    assert geometry.overlap("a", MATH, "b", opposite).cosines == {module: pytest.approx(-1.0)}
    elsewhere = make(4, NAMES[2:])
    none = geometry.overlap("finance", FINANCE, "b", elsewhere)
    assert (none.rms, none.floor, none.cosines, none.rms_by_type) == (0.0, 0.0, {}, {})


def test_a_zero_delta_has_no_cosine() -> None:
    factors = MATH.modules[NAMES[0]]
    zero = Adapter("z" * 64, {NAMES[0]: Factors(factors.a, factors.b * 0, 1.0)})
    assert geometry.overlap("a", MATH, "b", zero).cosines == {}


def test_random_deltas_lie_at_the_floor() -> None:
    cosines: list[float] = []
    floor = 0.0
    for seed in range(120):
        pair = geometry.overlap(
            "a", make(2 * seed, NAMES[:1], rank=2), "b", make(2 * seed + 1, NAMES[:1], rank=4)
        )
        cosines += pair.cosines.values()
        floor = pair.floor
    assert geometry.rms(cosines) == pytest.approx(floor, rel=0.25)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("transformer.h.11.attn.c_attn", "attn.c_attn"),
        ("model.layers.0.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.3.block_sparse_moe.experts.5.w1", "w1"),
        ("lm_head", "lm_head"),
    ],
)
def test_module_types(module: str, kind: str) -> None:
    assert geometry.module_type(module) == kind


def test_interference_is_that_of_dense_sums() -> None:
    weights = {MATH: 2.0, LAW: -0.5, FINANCE: 40.0}
    found = geometry.interference(list(weights.items()))
    for module in NAMES:
        terms = [w * dense(a, module) for a, w in weights.items()]
        apart = sum(float((t**2).sum()) for t in terms)
        expected = float((np.sum(terms, axis=0) ** 2).sum()) / apart - 1
        assert found.by_module[module] == pytest.approx(expected, abs=1e-12)
    terms = [w * flat(a) for a, w in weights.items()]
    apart = sum(float((t**2).sum()) for t in terms)
    assert found.ratio == pytest.approx(
        float((np.sum(terms, axis=0) ** 2).sum()) / apart - 1, abs=1e-12
    )


def test_interference_of_equal_and_cancelling_terms() -> None:
    assert geometry.interference([(MATH, 1.0), (MATH, 1.0)]).ratio == pytest.approx(1.0)
    assert geometry.interference([(MATH, 1.0), (MATH, -1.0)]).ratio == pytest.approx(-1.0)
    assert geometry.interference([(MATH, 3.0)]).ratio == pytest.approx(0.0, abs=1e-12)
    assert geometry.interference([]).ratio == 0.0


MANTISSA_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


def ulp(value: float, dtype: torch.dtype) -> Fraction:
    """Gap between a value and the next one away from zero, from its definition."""
    smallest = Fraction(torch.finfo(dtype).smallest_normal)
    magnitude = abs(Fraction(value))
    power: Fraction = smallest
    while power * 2 <= magnitude:
        power *= 2
    return power * Fraction(1, 2 ** MANTISSA_BITS[dtype])


@pytest.mark.parametrize("dtype", MANTISSA_BITS)
def test_rounding_energy_is_the_sum_of_squared_ulps(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    values = torch.tensor(
        [0.0, 1.0, -1.0, 1.5, 2.0, 0.999, 3.1e4, -1e-3, smallest, smallest / 2, smallest * 1.5],
        dtype=dtype,
    )
    expected = sum(ulp(v, dtype) ** 2 for v in values.tolist()) / 12
    assert geometry.rounding_energy(values) == pytest.approx(float(expected), rel=1e-12)
    for value in (0.0, smallest / 4, smallest, 1.0, 1.75):
        one = torch.tensor([value], dtype=dtype)
        gap = float(torch.nextafter(one, torch.tensor([torch.inf], dtype=dtype))) - float(one)
        expected_gap = math.sqrt(12 * geometry.rounding_energy(one))
        assert expected_gap == pytest.approx(gap, rel=1e-9)


def test_rounding_energy_of_a_large_and_strided_parameter() -> None:
    parameter = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)).T
    found = geometry.rounding_energy(parameter)
    pieces = sum(geometry.rounding_energy(row) for row in parameter)
    assert found == pytest.approx(pieces, rel=1e-9)
    assert geometry.rounding_energy(torch.zeros(0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_expected_fold_error_is_near_the_measured_one(dtype: torch.dtype) -> None:
    base = base_of(dtype)
    rounding = {module: geometry.rounding_energy(w) for module, w in base.items()}
    for size in (1e-1, 1e-2, 3e-3):
        weights = {make(1, NAMES, size=size): 1.0, make(2, NAMES, size=size): 0.5}
        expected = geometry.expected_fold_error(rounding, geometry.mix_norm(weights))
        measured = geometry.fold_error(base, fold(base, weights), weights, LAYOUT)
        assert 0 < measured < 0.5
        assert expected == pytest.approx(measured, rel=0.15)


def test_a_delta_far_below_rounding_is_lost_whole() -> None:
    base = base_of(torch.bfloat16)
    rounding = {module: geometry.rounding_energy(w) for module, w in base.items()}
    weights = {make(1, NAMES, size=1e-7): 1.0}
    norm = geometry.mix_norm(weights)
    assert geometry.expected_fold_error(rounding, norm) == 1.0
    assert geometry.fold_error(base, base, weights, LAYOUT) == pytest.approx(1.0)
    assert geometry.expected_fold_error(rounding, 0.0) == 0.0
    assert geometry.expected_fold_error({}, 1.0) == 0.0


def test_fold_error_is_the_share_that_is_missing() -> None:
    base = {module: w.double() for module, w in base_of(torch.float32).items()}
    weights = {MATH: 2.0, FINANCE: -1.0}
    half = {}
    for module, w in base.items():
        delta = 2 * dense(MATH, module) - dense(FINANCE, module)
        half[module] = w + 0.5 * LAYOUT[module].delta(torch.from_numpy(delta))
    assert geometry.fold_error(base, half, weights, LAYOUT) == pytest.approx(0.5)
    exact = fold({m: w.float() for m, w in base.items()}, weights)
    assert 0 < geometry.fold_error(base, exact, weights, LAYOUT) < 1e-6
    assert geometry.fold_error(base, base, {}, LAYOUT) == 0.0
    assert geometry.fold_error(base, half, {MATH: 0.0}, LAYOUT) == math.inf


def test_an_analysis_holds_the_parts() -> None:
    base = base_of(torch.float32)
    norms = {module: float(w.norm()) for module, w in base.items()}
    rounding = {module: geometry.rounding_energy(w) for module, w in base.items()}
    mix = bound(math=1.0, law=-0.5, finance=2.0)
    found = geometry.analyze(mix, norms, rounding)
    assert [size.domain for size in found.sizes] == ["finance", "law", "math"]
    assert [(o.first, o.second) for o in found.overlaps] == [
        ("finance", "law"),
        ("finance", "math"),
        ("law", "math"),
    ]
    for size in found.sizes:
        adapter = ALL[size.domain]
        assert size.weight == mix.weights[adapter]
        assert size.norm == pytest.approx(np.linalg.norm(flat(adapter)))
        whole = math.hypot(*(norms[m] for m in adapter.modules))
        assert size.relative == pytest.approx(size.norm / whole)
        for module, relative in size.relative_by_module.items():
            expected = np.linalg.norm(dense(adapter, module)) / norms[module]
            assert relative == pytest.approx(expected)
    assert found.norm == pytest.approx(geometry.mix_norm(mix.weights))
    assert found.fold_error == pytest.approx(geometry.expected_fold_error(rounding, found.norm))
    alone = geometry.interference([(e.adapter, e.weight) for e in mix.entries])
    assert found.interference.ratio == pytest.approx(alone.ratio)
    assert found.interference.by_module == pytest.approx(alone.by_module)
    touched = {module for entry in mix.entries for module in entry.adapter.modules}
    ratio = found.norm / math.hypot(*(norms[module] for module in touched))
    assert ratio > 1
    (warning,) = found.warnings
    assert warning.startswith(f"the sum is {ratio:.1f} times as large as the base parameters")
    larger = {module: 1.01 * ratio * norm for module, norm in norms.items()}
    assert geometry.analyze(mix, larger, rounding).warnings == ()


def test_the_empty_mix_has_an_analysis() -> None:
    found = geometry.analyze(BoundMix("base"), {}, {})
    assert (found.sizes, found.overlaps, found.norm, found.fold_error, found.warnings) == (
        (), (), 0.0, 0.0, (),
    )  # fmt: skip


def warnings_of(entries: list[BoundEntry], dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    base = base_of(dtype)
    norms = {module: float(w.float().norm()) for module, w in base.items()}
    rounding = {module: geometry.rounding_energy(w) for module, w in base.items()}
    return geometry.analyze(BoundMix.of("base", entries), norms, rounding).warnings


def test_the_same_adapter_under_two_names_is_warned_of() -> None:
    large = make(1, NAMES[:3])
    overlap, sum_, *_ = warnings_of([BoundEntry("a", large, 1.0), BoundEntry("b", large, 1.0)])
    assert overlap.startswith("a and b overlap: RMS cosine 1.000")
    assert sum_.startswith("the deltas reinforce each other: the sum has +100%")
    _, cancelled, *_ = warnings_of([BoundEntry("a", large, 1.0), BoundEntry("b", large, -0.9)])
    assert cancelled.startswith("the deltas cancel each other: the sum has -99%")


def test_what_rounding_swallows_is_warned_of() -> None:
    tiny = make(1, NAMES, size=1e-4)
    whole, alone = warnings_of([BoundEntry("a", tiny, 1.0)], torch.bfloat16)
    assert "this mix is served by correction, not folded" in whole
    assert alone.startswith("the delta of a is small against rounding")
    entries = [BoundEntry("a", tiny, 1.0), BoundEntry("b", make(2, NAMES, size=0.1), 1.0)]
    (only,) = warnings_of(entries, torch.bfloat16)
    assert only.startswith("the delta of a is small against rounding")
    assert warnings_of(entries) == ()
