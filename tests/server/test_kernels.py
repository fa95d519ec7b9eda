"""The CPU kernels against float64: products, corrections, attention, folds."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.server.helpers import flip_bit
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.layout import ModuleLayout
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.model import packed as packed_module
from superpose_server.model.batch import Batch, Span
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.packed import PANEL, TERM_FIELDS, PackedEmbedding, PackedLinear, pack
from superpose_server.weights.corrections import Corrections
from superpose_server.weights.kernel_correction import KernelCorrection
from superpose_server.weights.kernel_factors import KernelFactors
from superpose_server.weights.parameter_format import PackedFormat

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)

UNIT = 2.0**-24  # half an ulp of 1.0 in float32
HALF_ULP = {torch.float32: UNIT, torch.bfloat16: 2.0**-9}  # of 1.0
DTYPES = [torch.float32, torch.bfloat16]
NO_TERM = torch.zeros(TERM_FIELDS, dtype=torch.int64)


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


def unpack(packed: Tensor, in_features: int, out_features: int) -> Tensor:
    """Panels to (in, out), a feature at a time."""
    columns = [packed[j // PANEL, :, j % PANEL].reshape(-1) for j in range(out_features)]
    return torch.stack(columns, dim=1)[:in_features]


@pytest.fixture(params=["floats", "pairs", "tiles"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to compute products in bfloat16 that this processor has."""
    chosen = load_kernels().products
    if not torch.ops.superpose.use_products(request.param):
        pytest.skip("this processor has no such instructions")
    yield request.param
    torch.ops.superpose.use_products(chosen)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, term: Tensor) -> Tensor:
    result: Tensor = torch.ops.superpose.linear(x, packed, bias, out, term)
    return result


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """At least half the distance of `exact` to its neighbours in `dtype`."""
    return 2 * HALF_ULP[dtype] * exact.abs()


# Packing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("inputs", [1, 7, 32, 45])
def test_packing_loses_nothing_and_fills_up_with_zeros(
    inputs: int, out: int, transposed: bool, dtype: torch.dtype
) -> None:
    matrix = randn(inputs, out).to(dtype)
    packed = pack(matrix if transposed else matrix.T.contiguous(), transposed=transposed)
    depth = {torch.float32: inputs, torch.bfloat16: math.ceil(inputs / 32) * 32}[dtype]
    side = {torch.float32: 1, torch.bfloat16: 2}[dtype]
    assert packed.shape == (math.ceil(out / 16), depth // side, 16, side)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, inputs, out), matrix)
    assert int(packed.count_nonzero()) == int(matrix.count_nonzero())
    assert torch.equal(packed_module.unpack(packed, inputs, out), matrix)


# Products

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19, 30, 47, 59, 60, 61, 66, 70, 129]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("inputs", "out"), [(37, 50), (1, 16), (301, 7), (513, 33), (96, 64)])
def test_products_for_any_number_of_rows(
    inputs: int, out: int, biased: bool, dtype: torch.dtype, products: str
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
def test_a_product_keeps_the_leading_dimensions_and_takes_any_strides(
    dtype: torch.dtype, products: str
) -> None:
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
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(
    dtype: torch.dtype, threads: None, products: str
) -> None:
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, products: str) -> None:
    packed = pack(randn(40, 20).to(dtype), transposed=True)
    x = randn(9, 40, seed=1).to(dtype)
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
        """The same in float64, from factors in the dtype of the parameter."""
        rows = []
        tokens = iter(x.double())
        for count, asked in zip(counts, mixes, strict=True):
            weight = self.weight.double().clone()
            for sign, of in ((1.0, asked), (-1.0, resident)):
                for entry in of.entries:
                    f = entry.adapter.modules["m"]
                    a, b = (factor.to(self.weight.dtype).double() for factor in (f.a, f.b))
                    delta = f.scaling * (b @ a)
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


class Term:
    """A module's term for rows of a batch, as `KernelCorrection` lays it out, and a product."""

    def __init__(self, adapters: Sequence[Adapter], gate_rows: int = 3, *, head: bool = False):
        gates = torch.ones(gate_rows, len(adapters), dtype=torch.float64)
        self.terms = torch.zeros(1, TERM_FIELDS, dtype=torch.int64)
        heads = frozenset({"m"} if head else ())
        factors = KernelFactors(torch.float32)
        self.correction = KernelCorrection(adapters, gates, factors, self.terms, ["m"], heads)
        self.packed = pack(randn(INPUTS, OUT, seed=90), transposed=True)

    def run(self, tokens: Sequence[int], logits: Sequence[int], rows: int) -> Tensor:
        """The product of so many rows while tokens and logits are of these rows of the batch."""
        with ExitStack() as until:
            self.correction.attach(torch.tensor(tokens), torch.tensor(logits), until)
            x = randn(rows, INPUTS).to(self.packed)
            return linear(x, self.packed, None, OUT, self.terms[0])


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 6, 50_000])
def test_a_correction_of_other_tokens_than_the_module_sees_is_refused(
    rows: int, head: bool
) -> None:
    term = Term([adapter(1, rank=4)], head=head)
    tokens, logits = [0, 0, 1, 1, 2], [0, 1, 2]
    seen = len(logits if head else tokens)
    with pytest.raises(RuntimeError, match=f"a correction of {seen} tokens meets {rows}"):
        term.run(tokens, logits, rows)
    assert not term.terms.any()
    assert term.run(tokens, logits, seen).shape == (seen, OUT)  # and the next pass is well


@pytest.mark.parametrize("row", [-1, 3, 1 << 40])
def test_a_row_that_has_no_gates_is_refused(row: int) -> None:
    term = Term([adapter(1, rank=4)], gate_rows=3)
    with pytest.raises(RuntimeError, match=f"a correction of 3 rows meets row {row}$"):
        term.run([0, row, 2], [0], 3)


@pytest.mark.parametrize(("inputs", "out"), [(INPUTS + 1, OUT), (INPUTS, OUT - 1), (OUT, INPUTS)])
def test_a_correction_for_a_module_of_another_size_is_refused(inputs: int, out: int) -> None:
    term = Term([adapter(1, rank=4, inputs=inputs, out=out)])
    message = f"a correction of {inputs} features to {out} meets {INPUTS} to {OUT}"
    with pytest.raises(RuntimeError, match=message):
        term.run([0], [0], 1)


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ((4, INPUTS + 1), (OUT, 4), "factors of m are for modules of different sizes"),
        ((4, INPUTS), (OUT + 1, 4), "factors of m are for modules of different sizes"),
        ((4, INPUTS), (OUT, 3), "factors of m have ranks 4 and 3"),
    ],
)
def test_factors_that_do_not_fit_each_other_are_refused(
    a: tuple[int, int], b: tuple[int, int], what: str
) -> None:
    other = Adapter("f" * 64, {"m": Factors(torch.ones(a), torch.ones(b), 1.0)})
    with pytest.raises(ValueError, match=what):
        Term([adapter(1, rank=2), other])


def test_factors_in_another_dtype_than_the_parameter_are_refused() -> None:
    term = Term([adapter(1, rank=4)])
    term.packed = pack(randn(INPUTS, OUT, seed=90).bfloat16(), transposed=True)
    with pytest.raises(RuntimeError, match="factors of 4 bytes a number meet 2"):
        term.run([0], [0], 1)


def test_ranks_that_fill_no_panel_are_refused() -> None:
    domain, gates, rows = torch.tensor([0, 0, 3]), torch.ones(1), torch.tensor([0])
    of_rows = (gates.data_ptr(), 1, rows.data_ptr(), 1)
    term = torch.tensor((1, domain.data_ptr(), 2, INPUTS, OUT, *of_rows))
    packed = pack(randn(INPUTS, OUT, seed=90).bfloat16(), transposed=True)
    with pytest.raises(RuntimeError, match="3 ranks fill no panel"):
        linear(randn(1, INPUTS).bfloat16(), packed, None, OUT, term)


def test_factors_are_kept_as_long_as_their_adapter() -> None:
    factors, one = KernelFactors(torch.bfloat16), adapter(1, rank=4)
    (first,), (again,) = factors.of([one], "m"), factors.of([one], "m")
    assert first is again
    kept = weakref.ref(first)
    del first, again, one
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_flipped_bit_of_kept_factors_is_found(dtype: torch.dtype, side: str) -> None:
    factors, one, other = KernelFactors(dtype), adapter(1, rank=4), adapter(2, rank=4)
    (pair,) = factors.of([one], "m")
    nbytes = pair.a.nbytes + pair.b.nbytes
    assert list(factors.compare(one)) == [(True, nbytes)]
    assert list(factors.compare(other)) == []  # of which nothing is kept
    flip_bit(getattr(pair, side), 5)
    assert list(factors.compare(one)) == [(False, nbytes)]
    flip_bit(getattr(pair, side), 5)
    assert list(factors.compare(one)) == [(True, nbytes)]


def test_a_term_without_domains_is_none_whatever_else_it_says() -> None:
    term = torch.full((TERM_FIELDS,), 7)
    term[0] = 0
    x, packed = randn(3, INPUTS), pack(randn(INPUTS, OUT, seed=90), transposed=True)
    expected = linear(x, packed, None, OUT, NO_TERM)
    assert torch.equal(linear(x, packed, None, OUT, term), expected)


@pytest.mark.parametrize(
    "term", [torch.zeros(4, dtype=torch.int64), torch.zeros(TERM_FIELDS), torch.zeros(0).long()]
)
def test_what_is_no_term_is_refused(term: Tensor) -> None:
    with pytest.raises(RuntimeError, match=f"a term has {TERM_FIELDS} fields"):
        linear(randn(3, INPUTS), pack(randn(INPUTS, OUT), transposed=True), None, OUT, term)


# Embeddings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [[3], [[0, 15, 16], [49, 49, 31]], list(range(50)), []])
def test_an_embedding_reads_the_rows_of_a_packed_head(dtype: torch.dtype, ids: list[Any]) -> None:
    rows = randn(OUT, INPUTS).to(dtype)  # as a head has them, (out, in)
    embedding = PackedEmbedding(nn.Parameter(pack(rows, transposed=False)), INPUTS)
    wanted = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(embedding(wanted), nn.functional.embedding(wanted, rows))


@pytest.mark.parametrize("bad", [-1, 64, 1 << 40])
def test_a_row_that_is_not_there_is_refused(bad: int) -> None:
    packed = pack(randn(OUT, INPUTS), transposed=False)  # four panels of 16 rows
    with pytest.raises(IndexError, match=f"embed: row {bad} of 64"):
        torch.ops.superpose.embed(torch.tensor([0, bad]), packed, INPUTS)


# Attention

# (slot, start, position) of each token.
Tokens = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Options:
    """What attention does to its scores beyond scaling."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def first(self, start: int, position: int) -> int:
        """The first position that a token reads."""
        return start if self.window is None else max(start, position - self.window + 1)


PLAIN = Options()


def attended(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: Tokens,
    scale: float,
    options: Options = PLAIN,
) -> Tensor:
    """By the kernel."""
    slots, starts, positions = torch.tensor(tokens).T.contiguous().unbind()
    found: Tensor = torch.ops.superpose.attend(
        query,
        keys,
        values,
        slots,
        starts,
        positions,
        scale,
        options.window,
        options.softcap,
        options.sinks,
    )
    return found


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: Tokens,
    scale: float,
    options: Options = PLAIN,
) -> Tensor:
    """By torch in float64, a token at a time, as transformers' Gemma 2 and GPT-OSS have it."""
    group = query.shape[1] // keys.shape[1]
    parts = []
    for t, (slot, start, position) in enumerate(tokens):
        read = slice(options.first(start, position), position + 1)
        own_keys, own_values = (
            stored[slot, :, read].double().repeat_interleave(group, dim=0)
            for stored in (keys, values)
        )
        scores = (query[0, :, t, None].double() @ own_keys.transpose(1, 2))[:, 0] * scale
        if options.softcap is not None:
            scores = options.softcap * (scores / options.softcap).tanh()
        if options.sinks is not None:
            scores = torch.cat((scores, options.sinks.double()[:, None]), dim=1)
        weights = scores.softmax(dim=1)[:, : own_values.shape[1]]
        parts.append((weights[:, None] @ own_values)[:, 0])
    return torch.stack(parts)[None]


# Lengths 1 to 70, at starts of 0 and later, in all slots.
TOKENS = [(i % 3, start, start + i) for i in range(70) for start in ({0, 9} if i < 61 else {0})]


def outside_is_nan(stored: Tensor, tokens: Tokens, options: Options = PLAIN) -> Tensor:
    """A copy with NaN wherever no token reads."""
    result = torch.full_like(stored, torch.nan)
    for slot, start, position in tokens:
        read = slice(options.first(start, position), position + 1)
        result[slot, :, read] = stored[slot, :, read]
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
    for asked in (query, query.contiguous()):
        found = attended(asked, keys, values, TOKENS, scale)
        assert found.shape == (1, count, query_heads, size)
        assert found.dtype == dtype
        error = (found.double() - exact).abs()
        assert bool((error <= 2e-6 * (1 + exact.abs()) + rounding(exact, dtype)).all())


LENGTH = 72


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    """Query, keys, values, tokens, scale and options, for tokens near every edge."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.sampled_from([8, 17, 64, 80, 128, 256]))
    value_size = draw(st.sampled_from([size, size, 8, 17, 80]))
    query_heads, heads = draw(st.sampled_from([(4, 4), (6, 2), (3, 1)]))
    window = draw(st.none() | st.sampled_from([1, 2, 7, 15, 16, 17, 33, LENGTH, 1 << 62]))
    # Where a window ends, and where a vector does.
    edges = {0, 1, 15, 16, 17, LENGTH - 1}
    if window is not None:
        edges |= {window + off for off in (-2, -1, 0, 1) if 0 <= window + off < LENGTH}
    starts = st.sampled_from(sorted(edges))
    spans = st.tuples(starts, st.sampled_from(sorted(edges)) | st.integers(0, LENGTH - 1))
    tokens = [
        (i % 3, *sorted(span))
        for i, span in enumerate(draw(st.lists(spans, min_size=1, max_size=9)))
    ]
    seed = draw(st.integers(0, 1 << 20))
    sinks = draw(st.sampled_from([None, torch.float32, dtype]))
    options = Options(
        window,
        draw(st.sampled_from([None, 0.5, 5.0, 50.0])),
        None if sinks is None else randn(query_heads, seed=seed, size=3.0).to(sinks),
    )
    query = randn(1, len(tokens), query_heads, size, seed=seed + 1).to(dtype).transpose(1, 2)
    keys = randn(3, heads, LENGTH, size, seed=seed + 2).to(dtype)
    values = randn(3, heads, LENGTH, value_size, seed=seed + 3).to(dtype)
    return query, keys, values, tokens, draw(st.sampled_from([0.3, 1.7])) / size**0.5, options


@given(problem=problems())
def test_attention_with_windows_caps_and_sinks(problem: tuple[Any, ...]) -> None:
    query, keys, values, tokens, scale, options = problem
    exact = reference(query, keys, values, tokens, scale, options)
    # What no token reads must not matter.
    keys, values = (outside_is_nan(stored, tokens, options) for stored in (keys, values))
    found = attended(query, keys, values, tokens, scale, options)
    assert found.shape == exact.shape
    assert found.dtype == query.dtype
    error = (found.double() - exact).abs()
    assert bool((error <= 4e-6 * (1 + exact.abs()) + rounding(exact, query.dtype)).all())


SINKS = randn(4, seed=7)
EVERY_OPTION = [
    PLAIN,
    Options(window=9),
    Options(softcap=1.5),
    Options(sinks=SINKS),
    Options(9, 1.5, SINKS),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 9, 16, 17, 70, 1000])
def test_a_window_has_the_bits_of_a_later_start(window: int, dtype: torch.dtype) -> None:
    query = randn(1, 4, len(TOKENS), 20).to(dtype)
    keys, values = (randn(3, 2, LENGTH, 20, seed=seed).to(dtype) for seed in (1, 2))
    options = Options(window)
    later = [(slot, options.first(start, position), position) for slot, start, position in TOKENS]
    found = attended(query, keys, values, TOKENS, 0.3, options)
    assert torch.equal(found, attended(query, keys, values, later, 0.3))


@pytest.mark.parametrize("cap", [1.0, 50.0, 2.0**20])
def test_a_soft_cap_is_exact_near_zero_and_far_from_it(cap: float) -> None:
    # One position, and a sink with the score that is due: their weights tell the difference of the
    # two, to far less than the last digit of either.
    ratios = torch.cat([torch.logspace(-6, 1.3, 3000), torch.linspace(0.55, 0.7, 1000)])
    scores = torch.cat([ratios, -ratios, torch.zeros(1)]) * cap
    due = cap * (scores.double() / cap).tanh()
    query, one = scores[None, :, None, None], torch.ones(1, 1, 1, 1)
    share = attended(query, one, one, [(0, 0, 0)], 1.0, Options(softcap=cap, sinks=due.float()))
    found = due.float().double() + share.double().flatten().logit()
    # The share itself is known to 2^-24, four times that as a difference of scores.
    assert bool(((found - due).abs() <= 1e-6 * due.abs() + 8 * UNIT).all())


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_attention_reads_its_own_positions_and_no_others(options: Options) -> None:
    # Each token by itself, with NaN at every position that is not its own.
    query = randn(1, 4, len(TOKENS), 12)
    keys, values = randn(3, 2, LENGTH, 12, seed=1), randn(3, 2, LENGTH, 12, seed=2)
    whole = attended(query, keys, values, TOKENS, 0.3, options)
    for t in range(0, len(TOKENS), 7):
        own = [TOKENS[t]]
        own_keys, own_values = (outside_is_nan(stored, own, options) for stored in (keys, values))
        one = attended(query[:, :, t : t + 1], own_keys, own_values, own, 0.3, options)
        assert torch.equal(one[:, 0], whole[:, t])


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_the_bits_of_attention_do_not_depend_on_the_batch_or_the_threads(
    options: Options, threads: None
) -> None:
    query = randn(1, 4, len(TOKENS), 20)
    keys, values = randn(3, 2, LENGTH, 20, seed=1), randn(3, 2, LENGTH, 20, seed=2)
    torch.set_num_threads(2)
    whole = attended(query, keys, values, TOKENS, 0.3, options)
    torch.set_num_threads(1)
    assert torch.equal(attended(query, keys, values, TOKENS, 0.3, options), whole)
    some = [3, 50, 51, 100]
    tokens = [TOKENS[i] for i in some]
    assert torch.equal(
        attended(query[:, :, some], keys, values, tokens, 0.3, options), whole[:, some]
    )


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
@pytest.mark.parametrize("options", EVERY_OPTION)
def test_attention_hides_nothing_that_is_not_finite(
    options: Options, where: str, value: float, at: int, dtype: torch.dtype
) -> None:
    tokens = [(slot, 0, 20) for slot in (0, 1, 2)]
    query = randn(1, 4, 3, 12).to(dtype)
    keys, values = (randn(3, 2, 24, 12, seed=seed).to(dtype) for seed in (1, 2))
    if where == "query":
        query[0, 1, 1, 3] = value
    else:
        {"key": keys, "value": values}[where][1, 0, at, 3] = value
    exact = reference(query, keys, values, tokens, 0.3, options)
    found = attended(query, keys, values, tokens, 0.3, options)
    assert torch.equal(found.isfinite(), exact.isfinite())
    assert bool(found[:, [0, 2]].isfinite().all())
    read = where == "query" or at >= options.first(0, 20)
    # A score of -inf is a weight of 0, and one that is capped is finite.
    if read and (math.isnan(value) or where == "value"):
        assert not bool(found[:, 1].isfinite().all())


def test_attention_to_nothing_but_minus_infinity_is_not_finite() -> None:
    query, keys = torch.ones(1, 1, 1, 8), torch.full((1, 1, 4, 8), -torch.inf)
    values = torch.ones(1, 1, 4, 8)
    assert bool(attended(query, keys, values, [(0, 0, 3)], 1.0).isnan().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sink_that_is_not_finite_is_not_hidden(value: float) -> None:
    sinks = SINKS.clone()
    sinks[2] = value
    keys, values = randn(1, 2, 8, 12, seed=1), randn(1, 2, 8, 12, seed=2)
    found = attended(randn(1, 4, 1, 12), keys, values, [(0, 0, 5)], 0.3, Options(sinks=sinks))
    assert bool(found[0, 0, 2].isnan().all())
    assert bool(found[0, 0, [0, 1, 3]].isfinite().all())


def test_a_sink_of_minus_infinity_takes_nothing() -> None:
    query = randn(1, 4, 1, 12)
    keys, values = randn(1, 2, 8, 12, seed=1), randn(1, 2, 8, 12, seed=2)
    none = Options(sinks=torch.full((4,), -torch.inf))
    found = attended(query, keys, values, [(0, 0, 5)], 0.3, none)
    assert torch.equal(found, attended(query, keys, values, [(0, 0, 5)], 0.3))


@pytest.mark.parametrize(
    "token",
    [(-1, 0, 3), (3, 0, 3), (0, -1, 3), (0, 4, 3), (0, 0, 8), (0, 8, 8), (1 << 40, 0, 3)],
)
@pytest.mark.parametrize("window", [None, 2])
def test_attention_to_positions_outside_of_the_slots_is_refused(
    token: tuple[int, int, int], window: int | None
) -> None:
    query, stored = randn(1, 4, 2, 12), randn(3, 2, 8, 12)
    with pytest.raises(RuntimeError, match="are not all in 3 slots of 8"):
        attended(query, stored, stored, [(0, 0, 3), token], 0.3, Options(window))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(window=0), "a window of 0 positions"),
        (Options(window=-5), "a window of -5 positions"),
        (Options(softcap=0.0), "a softcap of 0"),
        (Options(softcap=-1.0), "a softcap of -1"),
        (Options(softcap=math.inf), "a softcap of inf"),
        (Options(softcap=math.nan), "a softcap of nan"),
        (Options(sinks=torch.zeros(3)), "one a query head"),
        (Options(sinks=torch.zeros(5)), "one a query head"),
        (Options(sinks=torch.zeros(4).double()), "sinks are float32 or as the query"),
    ],
)
def test_options_out_of_range_are_refused(options: Options, message: str) -> None:
    query, stored = randn(1, 4, 1, 12), randn(3, 2, 8, 12)
    with pytest.raises(RuntimeError, match=message):
        attended(query, stored, stored, [(0, 0, 3)], 0.3, options)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (randn(3, 2, 8, 11), randn(3, 2, 8, 12)),
        (randn(3, 3, 8, 12), randn(3, 3, 8, 12)),
        (randn(3, 0, 8, 12), randn(3, 0, 8, 12)),
        (randn(3, 2, 8, 12), randn(2, 2, 8, 12)),
        (randn(3, 2, 8, 12), randn(3, 1, 8, 12)),
        (randn(3, 2, 8, 12), randn(3, 2, 7, 12)),
        (randn(3, 2, 8, 12), randn(3, 2, 8, 12).bfloat16()),
        (randn(3, 2, 12, 8).transpose(2, 3), randn(3, 2, 8, 12)),
    ],
)
def test_attention_to_a_cache_of_other_shapes_is_refused(keys: Tensor, values: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        attended(randn(1, 4, 1, 12), keys, values, [(0, 0, 3)], 0.3)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1).long(), torch.zeros(2), torch.zeros(4).long()[::2]]
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tables_that_are_not_of_the_tokens_are_refused(which: int, wrong: Tensor) -> None:
    query, stored = randn(1, 4, 2, 12), randn(3, 2, 8, 12)
    tables = [torch.zeros(2).long() for _ in range(3)]
    tables[which] = wrong
    with pytest.raises(RuntimeError, match="are int64, one a token"):
        torch.ops.superpose.attend(query, stored, stored, *tables, 0.3)


@pytest.mark.parametrize("options", EVERY_OPTION)
def test_torch_compile_is_told_the_shape_of_what_attention_returns(options: Options) -> None:
    query = randn(1, 5, 4, 12).transpose(1, 2)
    tables = [torch.zeros(5).long() for _ in range(3)]
    others = (randn(3, 2, 8, 12), randn(3, 2, 8, 7), *tables, 0.3)
    more = (options.window, options.softcap, options.sinks)
    operator = torch.ops.superpose.attend.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (query, *others, *more), test_utils=checks)
    named = {"window": options.window, "softcap": options.softcap, "sinks": options.sinks}
    torch.library.opcheck(operator, (query, *others), named, test_utils=checks)


# Folds

FOLDED = ModuleLayout(127, 150, transposed=True)
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
    form, kept = PackedFormat(FOLDED, dtype), pack(base, transposed=True)
    before = kept.clone()
    pair = form.arrange(a, b)
    assert pair[0].shape[1] == RANKS[rank]
    out = torch.full_like(kept, torch.nan)
    address = out.data_ptr()
    form.fold([out], [kept], [pair])
    assert out.data_ptr() == address
    assert torch.equal(kept, before)
    assert int(out.count_nonzero()) == int(unpack(out, 127, 150).count_nonzero())

    exact = base.double() + a.double().T @ b.double().T
    slack = (rank + 1) * UNIT * (base.double().abs() + a.double().abs().T @ b.double().abs().T)
    folded = unpack(out, 127, 150)
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
    form.fold([again], [kept], [pair])
    torch.set_num_threads(2)
    third = torch.zeros_like(out)
    form.fold([third], [kept], [pair])
    assert torch.equal(again, out)
    assert torch.equal(third, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bfloat16_tie_goes_to_even(dtype: torch.dtype) -> None:
    # 1 + 2^-8 is halfway between 1 and 1 + 2^-7; 1 + 3 x 2^-8 halfway to 1 + 2^-6.
    base = torch.ones(2, 16, dtype=dtype)
    a = torch.tensor([[1.0, 3.0]])
    out = pack(base, transposed=True)
    form = PackedFormat(ModuleLayout(2, 16, transposed=True), dtype)
    pair = form.arrange(a, torch.full((16, 1), 2.0**-8))
    form.fold([out], [out.clone()], [pair])
    exact = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8]], dtype=torch.float64).expand(2, 16)
    ties = torch.tensor([[1.0], [1 + 2.0**-6]], dtype=torch.float64).expand(2, 16)
    expected = exact if dtype == torch.float32 else ties
    assert torch.equal(unpack(out, 2, 16).double(), expected)


def test_the_delta_of_packed_factors_is_their_product() -> None:
    base, a, b = fold_problem(11, torch.float32)
    for dtype in DTYPES:
        form = PackedFormat(FOLDED, dtype)
        delta = form.delta(form.arrange(a, b))
        assert delta.dtype == torch.float64
        assert delta.shape == base.shape
        assert torch.allclose(delta, (b.double() @ a.double()).T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_plain_parameter_is_the_checkpoints_unless_what_fills_it_up_is_damaged(
    transposed: bool, dtype: torch.dtype
) -> None:
    layout = ModuleLayout(127, 150, transposed=transposed)
    parameter = randn(*((127, 150) if transposed else (150, 127))).to(dtype)
    packed = pack(parameter, transposed=transposed)
    form = PackedFormat(layout, dtype)
    assert torch.equal(form.plain(packed), parameter)
    packed[-1, 5, -1, -1] = -0.0  # of output feature 159
    assert form.plain(packed).shape == packed.shape


def test_a_fold_of_other_shapes_is_refused() -> None:
    base, a, b = fold_problem(4, torch.float32)
    kept = pack(base, transposed=True)
    form = PackedFormat(FOLDED, torch.float32)
    pair = form.arrange(a[:, :-1], b)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        form.fold([kept.clone()], [kept], [pair])
