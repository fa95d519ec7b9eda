"""The CPU kernels against float64: products, corrections, attention, folds."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.model.batch import Batch, Span
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.packed import PANEL, PackedLinear, pack
from superpose_server.weights.corrections import Corrections
from superpose_server.weights.parameter_format import PackedFormat

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)

UNIT = 2.0**-24  # half an ulp of 1.0 in float32
HALF_ULP = {torch.float32: UNIT, torch.bfloat16: 2.0**-9}  # of 1.0
DTYPES = [torch.float32, torch.bfloat16]
NO_TERM = torch.zeros(4, dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    load_kernels()


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def unpack(packed: Tensor, out_features: int) -> Tensor:
    """(panels, in, 16) to (in, out), a feature at a time."""
    columns = [packed[j // PANEL, :, j % PANEL] for j in range(out_features)]
    return torch.stack(columns, dim=1)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, term: Tensor) -> Tensor:
    result: Tensor = torch.ops.superpose.linear(x, packed, bias, out, term)
    return result


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """At least half the distance of `exact` to its neighbours in `dtype`."""
    return 2 * HALF_ULP[dtype] * exact.abs()


# Packing


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 50])
def test_packing_loses_nothing_and_fills_up_with_zeros(out: int, transposed: bool) -> None:
    matrix = randn(7, out)  # (in, out)
    packed = pack(matrix if transposed else matrix.T.contiguous(), transposed=transposed)
    assert packed.shape == (math.ceil(out / 16), 7, 16)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, out), matrix)
    assert float(packed.abs().sum()) == pytest.approx(float(matrix.abs().sum()))


# Products

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19, 30, 47, 59, 60, 61, 66, 70, 129]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("inputs", "out"), [(37, 50), (1, 16), (301, 7), (513, 33)])
def test_products_for_any_number_of_rows(
    inputs: int, out: int, biased: bool, dtype: torch.dtype
) -> None:
    weight = randn(inputs, out, seed=1).to(dtype)
    packed = pack(weight, transposed=True)
    bias = randn(out, seed=2).to(dtype) if biased else None
    for rows in ROWS:
        x = randn(rows, inputs, seed=rows).to(dtype)
        offset = torch.zeros(()).double() if bias is None else bias.double()
        exact = x.double() @ weight.double() + offset
        terms = x.double().abs() @ weight.double().abs() + offset.abs()
        y = linear(x, packed, bias, out, NO_TERM)
        assert y.dtype == dtype
        assert y.shape == (rows, out)
        slack = (inputs + 1) * UNIT * terms
        assert bool(((y.double() - exact).abs() <= slack + rounding(exact, dtype)).all()), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_keeps_the_leading_dimensions_and_takes_any_strides(dtype: torch.dtype) -> None:
    packed = pack(randn(20, 9).to(dtype), transposed=True)
    x = randn(2, 3, 20, seed=1).to(dtype)
    flat = linear(x.reshape(6, 20), packed, None, 9, NO_TERM)
    assert torch.equal(linear(x, packed, None, 9, NO_TERM), flat.view(2, 3, 9))
    turned = x.transpose(0, 1)
    assert torch.equal(linear(turned, packed, None, 9, NO_TERM), flat.view(2, 3, 9).transpose(0, 1))


def test_a_product_of_no_rows_is_empty() -> None:
    packed = pack(randn(20, 9), transposed=True)
    assert linear(torch.empty(1, 0, 20), packed, randn(9), 9, NO_TERM).shape == (1, 0, 9)


def test_a_product_of_the_wrong_width_is_refused() -> None:
    packed = pack(randn(20, 9), transposed=True)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        linear(torch.empty(1, 21), packed, None, 9, NO_TERM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(dtype: torch.dtype, threads: None) -> None:
    # 301 inputs are two passes over a panel, 150 outputs ten panels, the last one not full.
    packed = pack(randn(301, 150).to(dtype), transposed=True)
    bias = randn(150, seed=1).to(dtype)
    x = randn(129, 301, seed=2).to(dtype)
    whole = linear(x, packed, bias, 150, NO_TERM)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(linear(x, packed, bias, 150, NO_TERM), whole)
        for rows in ROWS:
            for first in {0, 1, (129 - rows) // 2, 129 - rows}:
                some = slice(first, min(129, first + rows))
                assert torch.equal(linear(x[some], packed, bias, 150, NO_TERM), whole[some])
        order = torch.randperm(129, generator=torch.Generator().manual_seed(count))
        assert torch.equal(linear(x[order], packed, bias, 150, NO_TERM), whole[order])


def test_what_is_not_finite_stays_in_its_row() -> None:
    packed = pack(randn(40, 20), transposed=True)
    x = randn(9, 40, seed=1)
    fine = linear(x, packed, None, 20, NO_TERM)
    x[4, 7] = torch.nan
    y = linear(x, packed, None, 20, NO_TERM)
    assert bool(y[4].isnan().all())
    others = [row for row in range(9) if row != 4]
    assert torch.equal(y[others], fine[others])


# Corrections

INPUTS, OUT = 45, 50


def adapter(seed: int, rank: int, name: str = "m", inputs: int = INPUTS, out: int = OUT) -> Adapter:
    factors = Factors(
        randn(rank, inputs, seed=seed), randn(out, rank, seed=seed + 50, size=0.3), scaling=0.7
    )
    return Adapter(f"{seed:064x}", {name: factors})


def mix(*terms: tuple[Adapter, float]) -> BoundMix:
    return BoundMix.of("base", (BoundEntry(f"d{i}", a, w) for i, (a, w) in enumerate(terms)))


class Layer:
    """One packed module and its corrections."""

    def __init__(self, dtype: torch.dtype = torch.float32, inputs: int = INPUTS) -> None:
        self.weight = randn(inputs, OUT, seed=90, size=0.2).to(dtype)
        self.bias = randn(OUT, seed=91).to(dtype)
        self.module = PackedLinear(pack(self.weight, transposed=True), self.bias, OUT)
        self.corrections = Corrections(
            {"m": self.module}, torch.device("cpu"), terms=self.module.term[None]
        )

    def run(
        self, x: Tensor, counts: list[int], mixes: list[BoundMix], resident: BoundMix
    ) -> Tensor:
        """The output for rows of so many tokens each, under their mixes."""
        spans = [Span(slot, (0,) * count, 0) for slot, count in enumerate(counts)]
        plan = self.corrections.plan(mixes, resident)
        batch = Batch.of(spans, torch.device("cpu"))
        with self.corrections.applied(plan, batch, torch.arange(sum(counts))):
            y: Tensor = self.module(x)
        return y

    def exact(
        self, x: Tensor, counts: list[int], mixes: list[BoundMix], resident: BoundMix
    ) -> Tensor:
        rows = []
        tokens = iter(x.double())
        for count, asked in zip(counts, mixes, strict=True):
            weight = self.weight.double().clone()
            for sign, of in ((1.0, asked), (-1.0, resident)):
                for entry in of.entries:
                    f = entry.adapter.modules["m"]
                    delta = f.scaling * (f.b.double() @ f.a.double())
                    weight += sign * entry.weight * delta.T
            rows += [next(tokens) @ weight + self.bias.double() for _ in range(count)]
        return torch.stack(rows)


def four_rows() -> tuple[list[int], list[BoundMix], BoundMix]:
    one, two, three = adapter(1, rank=1), adapter(2, rank=5), adapter(3, rank=16)
    resident = mix((one, 0.5), (two, 1.0))
    mixes = [
        mix((one, 0.5), (two, 1.0)),  # as resident: every gate is 0
        mix((one, 1.5), (three, 0.25)),
        mix(),
        mix((two, -2.0), (three, -0.5), (one, 0.5)),
    ]
    return [3, 1, 7, 2], mixes, resident


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [INPUTS, 130])
def test_corrections_of_rows_under_different_mixes(dtype: torch.dtype, inputs: int) -> None:
    layer = Layer(dtype, inputs)
    counts, _, _ = four_rows()
    terms = [adapter(seed, rank, inputs=inputs) for seed, rank in ((1, 1), (2, 5), (3, 16))]
    resident = mix((terms[0], 0.5), (terms[1], 1.0))
    mixes = [
        mix((terms[0], 0.5), (terms[1], 1.0)),
        mix((terms[0], 1.5), (terms[2], 0.25)),
        mix(),
        mix((terms[1], -2.0), (terms[2], -0.5), (terms[0], 0.5)),
    ]
    x = randn(sum(counts), inputs, seed=5).to(dtype)
    y = layer.run(x, counts, mixes, resident)
    exact = layer.exact(x, counts, mixes, resident)
    plain = x.double() @ layer.weight.double() + layer.bias.double()
    # The product is rounded once, and once more when the correction is added to it.
    slack = rounding(exact, dtype) + rounding(plain, dtype) + 300 * UNIT * 30
    assert bool(((y.double() - exact).abs() <= slack).all())
    assert float((exact - plain)[3:].abs().mean()) > 0.5  # there was something to correct


def test_a_row_as_resident_gets_the_bits_of_no_correction() -> None:
    layer = Layer()
    counts, mixes, resident = four_rows()
    x = randn(sum(counts), INPUTS, seed=5)
    plain = layer.module(x)
    y = layer.run(x, counts, mixes, resident)
    assert torch.equal(y[:3], plain[:3])
    assert not (y[3:] == plain[3:]).any(dim=1).all()
    assert torch.equal(layer.module(x), plain)  # and nothing is left behind


def test_the_bits_of_a_corrected_row_do_not_depend_on_the_batch(threads: None) -> None:
    layer = Layer()
    counts, mixes, resident = four_rows()
    x = randn(sum(counts), INPUTS, seed=5)
    torch.set_num_threads(2)
    whole = layer.run(x, counts, mixes, resident)
    torch.set_num_threads(1)
    start = 0
    for count, asked in zip(counts, mixes, strict=True):
        some = slice(start, start := start + count)
        assert torch.equal(layer.run(x[some], [count], [asked], resident), whole[some])
    # The same rows from the last to the first: where each token of `x` is then.
    order = torch.tensor([11, 12, 4, 5, 6, 7, 8, 9, 10, 3, 0, 1, 2])
    again = layer.run(x[order], counts[::-1], mixes[::-1], resident)
    assert torch.equal(again, whole[order])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gate_of_zero_hides_what_its_factors_hold(value: float) -> None:
    layer = Layer()
    good, bad = adapter(1, rank=2), adapter(2, rank=3)
    bad.modules["m"].a[1, 4] = value
    bad.modules["m"].b[7, 2] = value
    x = randn(4, INPUTS, seed=5)
    clean = layer.run(x[:2], [2], [mix((good, 1.0))], mix())
    y = layer.run(x, [2, 2], [mix((good, 1.0)), mix((good, 1.0), (bad, 1e-3))], mix())
    assert torch.equal(y[:2], clean)
    assert not y[2:].isfinite().any(dim=1).all()
    # Resident in both: its gate is 0 for every row, and it is not even looked at.
    y = layer.run(x[:2], [2], [mix((good, 1.0), (bad, 1.0))], mix((bad, 1.0)))
    assert torch.equal(y, clean)


# Attention


def attended(
    query: Tensor, keys: Tensor, values: Tensor, tokens: list[tuple[int, int, int]], scale: float
) -> Tensor:
    """By the kernel; tokens are (slot, start, position)."""
    slots, starts, positions = torch.tensor(tokens).T.contiguous().unbind()
    result: Tensor = torch.ops.superpose.attend(
        query, keys, values, slots, starts, positions, scale
    )
    return result


def reference(
    query: Tensor, keys: Tensor, values: Tensor, tokens: list[tuple[int, int, int]], scale: float
) -> Tensor:
    """By torch in float64, a token at a time."""
    parts = []
    for t, (slot, start, position) in enumerate(tokens):
        window = slice(start, position + 1)
        with sdpa_kernel(SDPBackend.MATH):
            part = scaled_dot_product_attention(
                query[:, :, t : t + 1].double(),
                keys[slot, :, window].double()[None],
                values[slot, :, window].double()[None],
                scale=scale,
                enable_gqa=True,
            )
        parts.append(part[0, :, 0])
    return torch.stack(parts)[None]


# Lengths 1 to 70, at starts of 0 and later, in all slots.
TOKENS = [(i % 3, start, start + i) for i in range(70) for start in ({0, 9} if i < 61 else {0})]


def outside_is_nan(stored: Tensor, tokens: list[tuple[int, int, int]]) -> Tensor:
    """A copy with NaN wherever no token reads."""
    result = torch.full_like(stored, torch.nan)
    for slot, start, position in tokens:
        result[slot, :, start : position + 1] = stored[slot, :, start : position + 1]
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 8, 12, 16, 33, 64, 80])
@pytest.mark.parametrize("groups", [(4, 4), (6, 2)])
def test_attention_of_any_length_and_head(
    size: int, groups: tuple[int, int], dtype: torch.dtype
) -> None:
    query_heads, heads = groups
    count = len(TOKENS)
    # As the model gives it: heads turned to the front, without a copy.
    query = randn(1, count, query_heads, size).to(dtype).transpose(1, 2)
    keys, values = (randn(3, heads, 72, size, seed=seed).to(dtype) for seed in (1, 2))
    scale = 1.7 / size**0.5
    exact = reference(query, keys, values, TOKENS, scale)
    for given in (query, query.contiguous()):
        found = attended(given, keys, values, TOKENS, scale)
        assert found.shape == (1, count, query_heads, size)
        assert found.dtype == dtype
        error = (found.double() - exact).abs()
        assert bool((error <= 2e-6 * (1 + exact.abs()) + rounding(exact, dtype)).all())


def test_attention_reads_its_own_positions_and_no_others() -> None:
    # Each token by itself, with NaN at every position that is not its own.
    query = randn(1, 4, len(TOKENS), 12)
    keys, values = randn(3, 2, 72, 12, seed=1), randn(3, 2, 72, 12, seed=2)
    whole = attended(query, keys, values, TOKENS, 0.3)
    for t in range(0, len(TOKENS), 7):
        own = [TOKENS[t]]
        one = attended(
            query[:, :, t : t + 1], outside_is_nan(keys, own), outside_is_nan(values, own), own, 0.3
        )
        assert torch.equal(one[:, 0], whole[:, t])


def test_the_bits_of_attention_do_not_depend_on_the_batch_or_the_threads(threads: None) -> None:
    query = randn(1, 4, len(TOKENS), 20)
    keys, values = randn(3, 2, 72, 20, seed=1), randn(3, 2, 72, 20, seed=2)
    torch.set_num_threads(2)
    whole = attended(query, keys, values, TOKENS, 0.3)
    torch.set_num_threads(1)
    assert torch.equal(attended(query, keys, values, TOKENS, 0.3), whole)
    some = [3, 50, 51, 100]
    picked = attended(query[:, :, some], keys, values, [TOKENS[i] for i in some], 0.3)
    assert torch.equal(picked, whole[:, some])


def test_attention_to_scores_far_apart() -> None:
    # Differences of scores beyond what exp can hold in float32, both ways.
    query = randn(1, 4, len(TOKENS), 16, size=20.0)
    keys, values = randn(3, 4, 72, 16, seed=1, size=5.0), randn(3, 4, 72, 16, seed=2)
    exact = reference(query, keys, values, TOKENS, 1.0)
    found = attended(query, keys, values, TOKENS, 1.0)
    # Scores of a thousand carry errors of 1e-4.
    assert float((found.double() - exact).abs().max()) < 2e-3
    # The same shift of all scores changes nothing, however large.
    keys[:] = keys[:1, :, :1]
    found = attended(query, keys, values, TOKENS, 50.0)
    exact = reference(query, keys, values, TOKENS, 50.0)
    assert float((found.double() - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("at", [0, 8, 20])
def test_attention_hides_nothing_that_is_not_finite(
    where: str, value: float, at: int, dtype: torch.dtype
) -> None:
    tokens = [(slot, 0, 20) for slot in (0, 1, 2)]
    query = randn(1, 4, 3, 12).to(dtype)
    keys, values = (randn(3, 2, 24, 12, seed=seed).to(dtype) for seed in (1, 2))
    if where == "query":
        query[0, 1, 1, 3] = value
    else:
        {"key": keys, "value": values}[where][1, 0, at, 3] = value
    exact = reference(query, keys, values, tokens, 0.3)
    found = attended(query, keys, values, tokens, 0.3)
    assert torch.equal(found.isfinite(), exact.isfinite())
    assert bool(found[:, [0, 2]].isfinite().all())
    if math.isnan(value) or where == "value":  # a score of -inf is a weight of 0
        assert not bool(found[:, 1].isfinite().all())


def test_attention_to_nothing_but_minus_infinity_is_not_finite() -> None:
    query, keys = torch.ones(1, 1, 1, 8), torch.full((1, 1, 4, 8), -torch.inf)
    values = torch.ones(1, 1, 4, 8)
    assert bool(attended(query, keys, values, [(0, 0, 3)], 1.0).isnan().all())


# Folds

RANKS = {3: 4, 4: 4, 8: 8, 11: 12, 33: 36}


def fold_problem(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Base (in, out) in `dtype`, A (R, in), B (out, R); 127 inputs are 21 blocks and one more."""
    return (
        randn(127, 150, size=0.05).to(dtype),
        randn(rank, 127, seed=1),
        randn(150, rank, seed=2, size=0.01),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_fold_is_the_exact_sum_rounded_once(rank: int, dtype: torch.dtype, threads: None) -> None:
    base, a, b = fold_problem(rank, dtype)
    form, kept = PackedFormat(), pack(base, transposed=True)
    before = kept.clone()
    pair = form.arrange(a, b)
    assert pair[0].shape[1] == RANKS[rank]
    out = torch.full_like(kept, torch.nan)
    address = out.data_ptr()
    form.fold(out, kept, pair)
    assert out.data_ptr() == address
    assert torch.equal(kept, before)
    assert not out[-1, :, 150 % 16 :].any()  # what fills the last panel stays 0

    exact = base.double() + a.double().T @ b.double().T
    slack = (rank + 1) * UNIT * (base.double().abs() + a.double().abs().T @ b.double().abs().T)
    folded = unpack(out, 150)
    # Sums are float32: next to a tie of bfloat16 their rounding may be the other neighbour, and
    # nowhere else. Rounding is monotone, so the result is between those of the sum's two ends.
    low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
    assert bool(((low <= folded) & (folded <= high)).all())
    if dtype == torch.bfloat16:
        assert float((folded == exact.to(dtype)).float().mean()) > 0.999
    else:
        assert bool(((folded.double() - exact).abs() <= slack + rounding(exact, dtype)).all())

    torch.set_num_threads(1)
    again = torch.randn(out.shape).to(dtype)
    form.fold(again, kept, pair)
    torch.set_num_threads(2)
    third = torch.zeros_like(out)
    form.fold(third, kept, pair)
    assert torch.equal(again, out)
    assert torch.equal(third, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bfloat16_tie_goes_to_even(dtype: torch.dtype) -> None:
    # 1 + 2^-8 is halfway between 1 and 1 + 2^-7; 1 + 3 x 2^-8 halfway to 1 + 2^-6.
    base = torch.ones(2, 16, dtype=dtype)
    a = torch.tensor([[1.0, 3.0]])
    out = pack(base, transposed=True)
    PackedFormat().fold(out, out.clone(), PackedFormat().arrange(a, torch.full((16, 1), 2.0**-8)))
    exact = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8]], dtype=torch.float64).expand(2, 16)
    ties = torch.tensor([[1.0], [1 + 2.0**-6]], dtype=torch.float64).expand(2, 16)
    expected = exact if dtype == torch.float32 else ties
    assert torch.equal(unpack(out, 16).double(), expected)


def test_the_delta_of_packed_factors_is_their_product() -> None:
    base, a, b = fold_problem(11, torch.float32)
    form = PackedFormat()
    delta = unpack(form.delta(form.arrange(a, b)), 150)
    assert delta.dtype == torch.float64
    assert torch.allclose(delta, (b.double() @ a.double()).T, rtol=0, atol=1e-14)
    assert base.shape == delta.shape


def test_a_fold_of_other_shapes_is_refused() -> None:
    base, a, b = fold_problem(4, torch.float32)
    kept = pack(base, transposed=True)
    pair = PackedFormat().arrange(a[:, :-1], b)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        PackedFormat().fold(kept.clone(), kept, pair)
