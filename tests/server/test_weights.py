from __future__ import annotations

import functools
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Hashable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.makers import tiny_gpt2, tiny_llama
from tests.server.helpers import (
    bound,
    dense_weights,
    flip_bit,
    open_model,
    open_weights,
    random_adapter,
)
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.errors import FailedPrecondition, Internal
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.packed import pack_modules
from superpose_server.weights import parameter_format
from superpose_server.weights.parameter_format import PackedFormat, Pair, PlainFormat
from superpose_server.weights.resident import PreparedMix, ResidentWeights, Verification

T = TypeVar("T")

FAMILIES: dict[str, Callable[[], nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}
CASES = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]


def some_adapters(layout: Layout) -> list[Adapter]:
    """Adapters that differ in modules, rank and size; one of them has no module in common."""
    names = [name for name in layout if not layout[name].tied and name != "lm_head"]
    return [
        random_adapter(layout, 1),
        random_adapter(layout, 2, modules=tuple(names[::2]), rank=1, size=0.2),
        random_adapter(layout, 3, modules=tuple(names[1:2]), rank=9),
        random_adapter(layout, 4, modules=tuple(names[-2:]), rank=3, size=1.0),
    ]


class Case:
    """Resident weights of one tiny model, with a copy of every bit that they began with."""

    def __init__(
        self,
        family: str = "gpt2",
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        *,
        on_host: bool = False,
    ) -> None:
        self.module = FAMILIES[family]().to(dtype).requires_grad_(False)
        self.layout = read_layout(self.module)
        self.adapters = some_adapters(self.layout)
        if packed:
            load_kernels()
            pack_modules(self.module, self.layout)
        self.start = self.bits()
        self.addresses = {n: p.data_ptr() for n, p in self.module.named_parameters()}
        self.weights = ResidentWeights(
            self.module, self.layout, "base", torch.device("cpu") if on_host else None
        )

    def bits(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def fold(self, mix: BoundMix) -> PreparedMix:
        prepared = self.weights.prepare(mix)
        self.weights.fold(prepared)
        return prepared

    def verify(self) -> Verification:
        return finish(self.weights)


def run_job(slices: Generator[bool, None, T]) -> T:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: T = end.value
            return result


def finish(weights: ResidentWeights) -> Verification:
    return run_job(weights.verify())


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        # As integers, so that 0.0 and -0.0 differ and equal NaN do not.
        assert torch.equal(tensor.view(integers), second[name].view(integers)), name


cached = functools.cache(Case)

WEIGHTS = st.sampled_from([1.0, 0.5, -1.0, 0.1, -2.75, 1e-3, 30.0])
# {domain: (adapter, weight)} as an operator changes it; two domains may name one adapter.
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("vwxyz"), st.integers(0, 3), WEIGHTS),
        st.tuples(st.just("remove"), st.sampled_from("vwxyz"), st.just(0), st.just(0.0)),
        st.tuples(st.just("clear"), st.just(""), st.just(0), st.just(0.0)),
    ),
    min_size=1,
    max_size=5,
)


def follow(changes: list[tuple[str, str, int, float]], adapters: list[Adapter]) -> list[BoundMix]:
    """The mix after each change."""
    domains: dict[str, BoundEntry] = {}
    mixes = []
    for action, domain, index, weight in changes:
        if action == "put":
            domains[domain] = BoundEntry(domain, adapters[index], weight)
        elif action == "remove":
            domains.pop(domain, None)
        else:
            domains.clear()
        # In the order of the changes, which differs from path to path.
        mixes.append(BoundMix.of("base", domains.values()))
    return mixes


@pytest.mark.parametrize(("family", "dtype"), CASES)
@given(changes=CHANGES)
def test_any_sequence_of_mixes_and_then_the_empty_mix_restores_every_bit(
    family: str, dtype: torch.dtype, kernels: bool, changes: list[tuple[str, str, int, float]]
) -> None:
    case = cached(family, dtype, kernels)
    for mix in follow(changes, case.adapters):
        case.fold(mix)
    case.fold(BoundMix("base"))
    assert_same_bits(case.bits(), case.start)
    assert {n: p.data_ptr() for n, p in case.module.named_parameters()} == case.addresses
    assert case.verify().ok


@pytest.mark.parametrize(("family", "dtype"), CASES)
@given(changes=CHANGES, data=st.data())
def test_the_weights_depend_on_the_mix_and_not_on_the_path(
    family: str,
    dtype: torch.dtype,
    kernels: bool,
    changes: list[tuple[str, str, int, float]],
    data: st.DataObject,
) -> None:
    case = cached(family, dtype, kernels)
    case.fold(BoundMix("base"))
    mixes = follow(changes, case.adapters)
    for mix in mixes:
        case.fold(mix)
    by_path, digest = case.bits(), case.verify().resident_hash
    case.fold(BoundMix("base"))
    # At once, and with the entries in another order.
    case.fold(BoundMix.of("base", data.draw(st.permutations(mixes[-1].entries))))
    assert_same_bits(case.bits(), by_path)
    assert case.verify().resident_hash == digest


@pytest.mark.parametrize("family", FAMILIES)
@given(changes=CHANGES)
def test_folded_weights_are_the_dense_sum(
    family: str, changes: list[tuple[str, str, int, float]]
) -> None:
    case = cached(family, torch.float32, False)
    mix = follow(changes, case.adapters)[-1]
    case.fold(mix)
    for name, exact in dense_weights(case.start, mix, case.layout).items():
        live = dict(case.module.named_parameters())[name].double()
        # 1e-6 of the largest term: some ten float32 roundings.
        scale = max(1.0, float(exact.abs().max())) + sum(abs(e.weight) for e in mix.entries)
        assert float((live - exact).abs().max()) <= 1e-6 * scale, name


def test_one_adapter_under_two_names_counts_twice() -> None:
    case = Case()
    adapter = case.adapters[0]
    case.fold(bound((adapter, 0.25), (adapter, 0.5)))
    twice = case.bits()
    case.fold(bound((adapter, 0.75)))
    assert_same_bits(case.bits(), twice)
    case.fold(bound((adapter, 1.5), (adapter, -1.5)))
    assert_same_bits(case.bits(), case.start)


def test_the_base_can_be_kept_on_the_host() -> None:
    case = Case(on_host=True)
    case.fold(bound((case.adapters[0], 1.0)))
    assert {t.device.type for t in case.weights._base.values()} == {"cpu"}
    case.fold(BoundMix("base"))
    assert_same_bits(case.bits(), case.start)


def test_only_adapted_modules_are_kept_and_counted() -> None:
    case = Case()
    assert case.weights.base_nbytes == 0
    adapter = case.adapters[2]
    case.weights.prepare(bound((adapter, 1.0)))
    (module,) = adapter.modules
    assert case.weights.base_nbytes == 4 * case.start[f"{module}.weight"].numel()


def test_preparing_changes_nothing_that_can_be_seen() -> None:
    case = Case()
    resident = case.fold(bound((case.adapters[0], 1.0)))
    before = case.bits()
    case.weights.prepare(bound((case.adapters[1], -3.0)))
    assert_same_bits(case.bits(), before)
    assert case.weights.resident is resident


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_loaded_checkpoint_verify_under_any_mix(
    family: str, bases: dict[str, Path], kernels: bool
) -> None:
    # The bits of a matrix product depend on the alignment of its output: that of tensors in a
    # mapped checkpoint is not that of fresh memory.
    model = open_model(bases[family], kernels=kernels)
    assert {p.data_ptr() % 64 for p in model.module.parameters()} == {0}
    weights = open_weights(model)
    adapter = random_adapter(model.layout, 7, rank=13)
    weights.fold(weights.prepare(bound((adapter, 1.0))))
    assert finish(weights).ok


def test_a_served_model_does_not_share_memory_with_the_checkpoint(
    bases: dict[str, Path], kernels: bool
) -> None:
    model = open_model(bases["gpt2"], kernels=kernels)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [fields[0].split("-") for fields in maps if fields[-1].endswith(".safetensors")]
    for name, parameter in model.module.named_parameters():
        address = parameter.data_ptr()
        assert not any(int(a, 16) <= address < int(b, 16) for a, b in mapped), name


# Folds of several parameters together, as on a GPU.


def test_parameters_folded_together_change_and_verify_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kind(self: PlainFormat, out: Tensor, pair: Pair) -> Hashable:
        return self.layout, pair[0].shape

    monkeypatch.setattr(PlainFormat, "kind", kind)
    # Room for two of the larger parameters.
    monkeypatch.setattr(parameter_format, "_TOGETHER", 2 * 64 * 192)
    case = Case(dtype=torch.bfloat16)
    mix = bound((case.adapters[0], 0.5), (case.adapters[1], -1.0), (case.adapters[2], 2.0))
    prepared = case.fold(mix)
    assert max(len(group) for group in prepared.groups) > 1
    grouped = sorted(module for group in prepared.groups for module in group)
    assert grouped == sorted(prepared.factors)
    for group in prepared.groups:
        sizes = [case.start[f"{module}.weight"].numel() for module in group]
        assert len(group) == 1 or sum(sizes) <= 2 * 64 * 192
    live = dict(case.module.named_parameters())
    for name, exact in dense_weights(case.start, mix, case.layout).items():
        # One rounding to 8 bits, and some in float32 before it.
        limit = 2.0**-8 * exact.abs() + 1e-5
        assert bool(((live[name].double() - exact).abs() <= limit).all()), name
    assert case.verify().ok
    assert run_job(case.weights.measure_fold_error(prepared)) < 0.5
    damaged = f"{prepared.groups[0][-1]}.weight"
    with torch.no_grad():
        live[damaged].view(-1)[3] += 1.0
    assert case.verify().findings.damaged_resident == (damaged,)
    case.fold(BoundMix("base"))
    assert_same_bits(case.bits(), case.start)


# Faults in a fold.


def fail_folds(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Let folds of a module raise at `calls`, counted from 0, half-way through their work."""
    numbers = itertools.count()

    def replace(form: type[PlainFormat | PackedFormat]) -> None:
        real = form.fold

        def failing(self: Any, outs: list[Tensor], bases: list[Tensor], pairs: list[Pair]) -> None:
            real(self, outs, bases, pairs)
            if next(numbers) in calls:
                outs[0][: -(-outs[0].shape[0] // 2)] = torch.nan
                raise MemoryError("no memory, says the test")

        monkeypatch.setattr(form, "fold", failing)

    replace(PlainFormat)
    replace(PackedFormat)


def modules_of(adapter: Adapter) -> int:
    return len(adapter.modules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("before", ["base", "mix"])
def test_a_fold_that_fails_leaves_the_old_weights(
    monkeypatch: pytest.MonkeyPatch, family: str, place: str, before: str, kernels: bool
) -> None:
    case = Case(family, packed=kernels)
    old = case.fold(bound((case.adapters[1], 0.5)) if before == "mix" else BoundMix("base"))
    bits = case.bits()
    target = case.weights.prepare(bound((case.adapters[0], 1.0), (case.adapters[1], -2.0)))
    count = modules_of(case.adapters[0])
    call = {"first": 0, "middle": count // 2, "last": count - 1}[place]
    fail_folds(monkeypatch, call)
    with pytest.raises(Internal, match="the fold failed") as caught:
        case.weights.fold(target)
    assert caught.value.reason == "FOLD_FAILED"
    assert_same_bits(case.bits(), bits)
    assert case.weights.resident.mix == old.mix
    assert case.verify().ok
    monkeypatch.undo()
    case.weights.fold(target)
    assert case.weights.resident is target
    assert case.verify().ok


@pytest.mark.parametrize("again", [0, 1, -1])
def test_a_refold_that_fails_too_leaves_the_base(
    monkeypatch: pytest.MonkeyPatch, again: int, kernels: bool
) -> None:
    case = Case(packed=kernels)
    old = bound((case.adapters[1], 0.5))
    case.fold(old)
    target = case.weights.prepare(bound((case.adapters[0], 1.0)))
    first = 2  # a module before the last, so that some are written and some are not
    refolded = range(modules_of(case.adapters[1]))
    fail_folds(monkeypatch, first, first + 1 + refolded[again])
    with pytest.raises(Internal):
        case.weights.fold(target)
    assert_same_bits(case.bits(), case.start)
    assert case.weights.resident.mix == BoundMix("base")
    assert case.verify().ok
    monkeypatch.undo()
    case.fold(old)
    assert case.weights.resident.mix == old


def test_restoring_to_the_base_that_fails_keeps_the_old_mix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    old = case.fold(bound((case.adapters[0], 1.0)))
    bits = case.bits()
    real = torch._foreach_copy_
    calls = itertools.count()

    def failing(outs: list[Tensor], sources: list[Tensor]) -> None:
        if next(calls) == 0:
            real(outs[:3], sources[:3])
            raise RuntimeError("device lost, says the test")
        real(outs, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", failing)
    with pytest.raises(Internal):
        case.weights.fold(PreparedMix(BoundMix("base")))
    monkeypatch.undo()
    assert_same_bits(case.bits(), bits)
    assert case.weights.resident is old


def test_what_is_no_longer_resident_is_freed() -> None:
    case = Case()
    gone = weakref.ref(case.adapters[0])
    case.fold(bound((case.adapters[0], 1.0)))
    case.adapters.clear()
    gc.collect()
    assert gone() is not None
    case.fold(BoundMix("base"))
    gc.collect()
    assert gone() is None


def test_adapters_are_listed_while_another_thread_adds_some() -> None:
    """A check lists them on the engine's thread, and an operator pushes."""
    weights = Case().weights
    adapters = [Adapter(f"{number}", {}) for number in range(6000)]
    for adapter in adapters[:3000]:
        weights.keep_base(adapter)
    pushes = threading.Thread(target=lambda: [*map(weights.keep_base, adapters[3000:])])
    switches = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        pushes.start()
        while pushes.is_alive():
            assert len(weights.adapters) >= 3000
    finally:
        sys.setswitchinterval(switches)
        pushes.join()
    assert len(weights.adapters) == 6000


# Verification.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_names_the_live_parameter_of_which_one_bit_was_flipped(
    family: str, dtype: torch.dtype, kernels: bool
) -> None:
    case = Case(family, dtype, kernels)
    case.fold(bound((case.adapters[0], 1.0)))
    clean = case.verify()
    assert clean.ok
    names = list(case.start)
    # Every parameter: adapted modules, embeddings, norms and biases, which no adapter changes.
    for name in names:
        parameter = dict(case.module.named_parameters())[name]
        flip_bit(parameter, parameter.numel() - 1)
        found = case.verify()
        assert not found.ok
        assert found.findings.damaged_resident == (name,)
        assert found.findings.damaged_base == ()
        assert found.resident_hash != clean.resident_hash
        flip_bit(parameter, parameter.numel() - 1)
    assert case.verify() == clean


@pytest.mark.parametrize("folded", [False, True])
def test_verify_names_the_kept_base_of_which_one_bit_was_flipped(folded: bool) -> None:
    case = Case()
    prepared = case.weights.prepare(bound((case.adapters[0], 1.0)))
    if folded:
        case.weights.fold(prepared)
    for module in prepared.factors:
        flip_bit(case.weights._base[module])
        found = case.verify()
        assert not found.ok
        assert found.findings.damaged_base == (f"{module}.weight",)
        if not folded:
            assert found.findings.damaged_resident == ()  # what is live is the base, and whole
        flip_bit(case.weights._base[module])
    assert case.verify().ok


def test_verify_begins_anew_when_the_resident_mix_changes() -> None:
    case = Case()
    case.fold(bound((case.adapters[0], 1.0)))
    other = case.weights.prepare(bound((case.adapters[1], 1.0)))
    slices = case.weights.verify()
    steps = 0
    result: Verification | None = None
    while result is None:
        try:
            next(slices)
        except StopIteration as end:
            result = end.value
        steps += 1
        if steps == len(case.start) // 2:
            case.weights.fold(other)
    assert result.ok
    assert result.mix == other.mix
    assert result == case.verify()
    assert steps > len(case.start)  # every parameter was read again


# Folds that make no sense.


def huge(layout: Layout, size: float) -> Adapter:
    module = next(iter(layout))
    shape = layout[module]
    factors = Factors(
        torch.full((1, shape.in_features), size), torch.full((shape.out_features, 1), size), 1.0
    )
    return Adapter("f" * 64, {module: factors})


@pytest.mark.parametrize(
    ("dtype", "size", "weight"),
    [
        (torch.float16, 20.0, 1e3),  # 4e5 is above 65504
        (torch.float16, 20.0, -1e3),
        (torch.float32, 1e18, 1e4),  # 1e40
        (torch.float32, 1e36, 1e4),  # weight x B overflows by itself
        (torch.bfloat16, 1e18, 1e4),
    ],
)
def test_a_fold_that_would_not_be_finite_is_refused(
    dtype: torch.dtype, size: float, weight: float
) -> None:
    case = Case("llama", dtype)
    with pytest.raises(FailedPrecondition, match=f"d0={weight:g}") as caught:
        case.weights.prepare(bound((huge(case.layout, size), weight)))
    assert caught.value.reason == "FOLD_NOT_FINITE"
    assert next(iter(case.layout)) in str(caught.value)
    assert_same_bits(case.bits(), case.start)


def test_large_terms_that_cancel_are_not_refused() -> None:
    case = Case("llama", torch.float16)
    first = huge(case.layout, 20.0)
    second = Adapter("e" * 64, dict(first.modules))
    case.fold(bound((first, 1e3), (second, -1e3)))
    assert_same_bits(case.bits(), case.start)


def sized_adapter(case: Case, share: float) -> Adapter:
    """An adapter whose delta has `share` of the norm of each module's base parameter."""
    adapter = case.adapters[0]
    modules = {}
    for name, factors in adapter.modules.items():
        norm = case.start[f"{name}.weight"].double().norm()
        delta = factors.scaling * (factors.b.double() @ factors.a.double()).norm()
        modules[name] = Factors(factors.a, factors.b * float(share * norm / delta), factors.scaling)
    return Adapter(f"{share}".encode().hex(), modules)


def test_a_tiny_delta_is_not_folded_in_bfloat16() -> None:
    case = Case(dtype=torch.bfloat16)
    tiny = bound((sized_adapter(case, 0.0005), 1.0))
    prepared = case.fold(tiny)
    assert not prepared.foldable
    assert case.weights.resident.mix == BoundMix("base")
    assert_same_bits(case.bits(), case.start)
    # It is swallowed from above as well: what was folded goes.
    case.fold(bound((sized_adapter(case, 0.02), 1.0)))
    assert case.weights.resident.mix != BoundMix("base")
    case.weights.fold(prepared)
    assert_same_bits(case.bits(), case.start)


def test_the_same_tiny_delta_is_folded_in_float32() -> None:
    case = Case()
    assert case.fold(bound((sized_adapter(case, 0.0005), 1.0))).foldable
    assert case.weights.resident.mix != BoundMix("base")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.005, 0.02, 0.1])
def test_expected_and_measured_fold_error_agree(family: str, share: float) -> None:
    case = Case(family, torch.bfloat16)
    prepared = case.fold(bound((sized_adapter(case, share), 1.0)))
    measured = run_job(case.weights.measure_fold_error(prepared))
    live = case.bits()
    exact = dense_weights(case.start, prepared.mix, case.layout)
    names = [f"{module}.weight" for module in prepared.factors]
    lost = sum(float((live[n].double() - exact[n]).square().sum()) for n in names)
    delta = sum(float((exact[n] - case.start[n].double()).square().sum()) for n in names)
    if prepared.foldable:
        assert measured == pytest.approx((lost / delta) ** 0.5, rel=1e-6)
    assert prepared.fold_error == pytest.approx(measured, rel=0.2)


def test_analysis_reads_the_base_and_not_the_folded_weights() -> None:
    case = Case()
    mix = bound((case.adapters[0], 1.0), (case.adapters[1], 0.5))
    before = case.weights.analyze(case.weights.prepare(mix))
    case.fold(mix)
    assert case.weights.analyze(case.weights.prepare(mix)) == before
    norm = sum(
        float((exact - case.start[name].double()).square().sum())
        for name, exact in dense_weights(case.start, mix, case.layout).items()
    )
    assert before.norm == pytest.approx(norm**0.5, rel=1e-5)
