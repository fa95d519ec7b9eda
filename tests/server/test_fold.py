from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.fold import concatenate_factors, fold_alike_into, fold_into
from superpose_adapters.layout import ModuleLayout

Term = tuple[Factors, float]
MODULE = "m"
UNIT = 2.0**-24  # half an ulp of 1.0 in float32
MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in `dtype` at the magnitude of `values`, float64."""
    smallest = torch.finfo(dtype).smallest_normal
    exponent = torch.floor(torch.log2(values.abs().clamp_min(smallest)))
    return 0.5 * torch.exp2(exponent - MANTISSA_BITS[dtype])


def reference(base: Tensor, terms: list[Term], transposed: bool) -> tuple[Tensor, Tensor]:
    """The sum in float64, and what float32 accumulation of it may be off by."""
    exact = base.double().clone()
    magnitude = base.double().abs()
    for factors, weight in terms:
        factor = weight * factors.scaling
        delta = factor * (factors.b.double() @ factors.a.double())
        bound = abs(factor) * (factors.b.double().abs() @ factors.a.double().abs())
        exact += delta.T if transposed else delta
        magnitude += bound.T if transposed else bound
    rank = sum(factors.rank for factors, _ in terms)
    return exact, (rank + 1) * UNIT * magnitude


def adapters(terms: list[Term]) -> dict[Adapter, float]:
    return {Adapter(f"{i:064x}", {MODULE: f}): w for i, (f, w) in enumerate(terms)}


def fold(base: Tensor, weights: dict[Adapter, float], layout: ModuleLayout) -> Tensor:
    pair = concatenate_factors(weights, MODULE)
    assert pair is not None
    out = torch.full_like(base, torch.nan)
    fold_into(out, base, *pair, layout)
    return out


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, ModuleLayout, Tensor, list[Term]]:
    """A seed, a shape, a base parameter in float32 and one to four weighted adapters."""
    inputs, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    layout = ModuleLayout(inputs, outputs, transposed=draw(st.booleans()))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** draw(st.integers(-4, 1))
    terms = []
    for _ in range(draw(st.integers(1, 4))):
        rank = draw(st.integers(1, 40))
        factors = Factors(
            torch.randn(rank, inputs, generator=generator),
            torch.randn(outputs, rank, generator=generator) * size,
            scaling=draw(st.sampled_from([0.25, 1.0, 16.0, 64 / 3**0.5])),
        )
        terms.append((factors, draw(st.sampled_from([1.0, 0.5, -1.0, 0.1, -3.7, 1e-3, 250.0]))))
    shape = (inputs, outputs) if layout.transposed else (outputs, inputs)
    return seed, layout, torch.randn(shape, generator=generator) * 0.05, terms


@given(problems())
def test_float32_fold_is_within_the_bound_of_the_exact_sum(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]],
) -> None:
    _, layout, base, terms = problem
    folded = fold(base, adapters(terms), layout)
    exact, slack = reference(base, terms, layout.transposed)
    error = (folded.double() - exact).abs()
    assert bool((error <= half_ulp(exact, torch.float32) + slack).all())


def check_rounding(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]], dtype: torch.dtype
) -> None:
    _, layout, base, terms = problem
    narrow = base.to(dtype)
    check_folded(fold(narrow, adapters(terms), layout), narrow, terms, layout)


def check_folded(folded: Tensor, narrow: Tensor, terms: list[Term], layout: ModuleLayout) -> None:
    dtype = narrow.dtype
    # Rounding is monotone: whatever float32 accumulation made of the sum, its rounding lies
    # between the roundings of the two ends of what accumulation may be off by. Almost always the
    # two are the same number.
    exact, slack = reference(narrow, terms, layout.transposed)
    low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
    assert bool(((low <= folded) & (folded <= high)).all())
    finite = torch.isfinite(folded.double())
    error = (folded.double() - exact).abs()[finite]
    limit = half_ulp(exact.abs() + slack, dtype) + slack
    assert bool((error <= limit[finite]).all())


@given(problems())
def test_bfloat16_fold_is_the_rounded_float32_sum(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]],
) -> None:
    check_rounding(problem, torch.bfloat16)


@given(problems())
def test_float16_fold_is_the_rounded_float32_sum(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]],
) -> None:
    check_rounding(problem, torch.float16)


@given(problems(), st.integers(2, 5), st.sampled_from([torch.bfloat16, torch.float16]))
def test_alike_parameters_are_folded_together_as_each_alone(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]], count: int, dtype: torch.dtype
) -> None:
    seed, layout, base, terms = problem
    generator = torch.Generator().manual_seed(seed)
    # Layers of a model: one shape and one rank, each with parameters and factors of its own.
    layers = []
    for _ in range(count):
        narrow = (torch.randn(base.shape, generator=generator) * 0.05).to(dtype)
        own = [
            (
                Factors(
                    torch.randn(f.a.shape, generator=generator),
                    torch.randn(f.b.shape, generator=generator) * float(f.b.abs().max()),
                    f.scaling,
                ),
                weight,
            )
            for f, weight in terms
        ]
        layers.append((narrow, own))
    pairs = [concatenate_factors(adapters(own), MODULE) for _, own in layers]
    bases = [narrow for narrow, _ in layers]
    before = [narrow.clone() for narrow in bases]
    outs = [torch.full_like(narrow, torch.nan) for narrow in bases]
    addresses = [out.data_ptr() for out in outs]
    fold_alike_into(outs, bases, [pair for pair in pairs if pair is not None], layout)
    assert [out.data_ptr() for out in outs] == addresses
    assert all(torch.equal(a, b) for a, b in zip(bases, before, strict=True))
    for out, (narrow, own) in zip(outs, layers, strict=True):
        check_folded(out, narrow, own, layout)


def test_bfloat16_fold_of_many_tiles_is_the_rounded_float32_sum() -> None:
    # 3,000,000 elements are three tiles, the last one not full.
    generator = torch.Generator().manual_seed(0)
    layout = ModuleLayout(1500, 2000, transposed=False)
    factors = Factors(
        torch.randn(8, 1500, generator=generator), torch.randn(2000, 8, generator=generator), 0.01
    )
    base = torch.randn(2000, 1500, generator=generator) * 0.05
    check_rounding((0, layout, base, [(factors, 1.0)]), torch.bfloat16)


@given(problems(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_the_parameter_held_before_does_not_matter(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]], dtype: torch.dtype
) -> None:
    seed, layout, base, terms = problem
    narrow = base.to(dtype)
    pair = concatenate_factors(adapters(terms), MODULE)
    assert pair is not None
    fresh = fold(narrow, adapters(terms), layout)
    used = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    address = used.data_ptr()
    fold_into(used, narrow, *pair, layout)
    assert torch.equal(fresh, used)
    assert used.data_ptr() == address


@given(problems())
def test_a_sum_of_deltas_is_not_a_sum_of_factors(
    problem: tuple[int, ModuleLayout, Tensor, list[Term]],
) -> None:
    _, _, _, terms = problem
    pair = concatenate_factors(adapters(terms), MODULE)
    assert pair is not None
    a_cat, b_cat = pair
    rank = sum(factors.rank for factors, _ in terms)
    assert (a_cat.shape[0], b_cat.shape[1]) == (rank, rank)
    # A block of columns belongs to one adapter, in the order of the mapping, scaled in float64.
    start = 0
    for factors, weight in terms:
        block = slice(start, start := start + factors.rank)
        assert torch.equal(a_cat[block], factors.a)
        exact = factors.b.double() * (weight * factors.scaling)
        assert torch.equal(b_cat[:, block], exact.float())


def test_adapters_of_weight_zero_and_of_other_modules_are_left_out() -> None:
    factors = Factors(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    here, elsewhere = Adapter("a", {MODULE: factors}), Adapter("b", {"other": factors})
    assert concatenate_factors({here: 0.0, elsewhere: 1.0}, MODULE) is None
    pair = concatenate_factors({here: 2.0, elsewhere: 1.0}, MODULE)
    assert pair is not None
    assert torch.equal(pair[1], torch.full((3, 1), 2.0))


def test_the_base_is_read_and_never_written() -> None:
    generator = torch.Generator().manual_seed(1)
    layout = ModuleLayout(16, 24, transposed=True)
    factors = Factors(
        torch.randn(3, 16, generator=generator), torch.randn(24, 3, generator=generator), 1.0
    )
    base = torch.randn(16, 24, generator=generator)
    kept = base.clone()
    fold(base, adapters([(factors, 1.0)]), layout)
    assert torch.equal(base, kept)
