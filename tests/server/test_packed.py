"""Packed parameters: what folds leave in them, what `verify` finds, and what the cache may take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.makers import save_base, tiny_gpt2
from tests.server.helpers import (
    bound,
    dense_weights,
    flip_bit,
    load_reference,
    open_model,
    open_weights,
    random_adapter,
)
from tests.zoo import build
from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.layout import read_layout
from superpose_server.model import memory
from superpose_server.model import model as model_module
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.memory import MIB, give_back, lasting_copy, lasting_zeros
from superpose_server.model.model import Model
from superpose_server.model.packed import PackedLinear, pack_modules
from superpose_server.weights.resident import ResidentWeights, Verification

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
DTYPES = [torch.float32, torch.bfloat16]


def open_packed(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    return open_model(folder, dtype, kernels=True, **options)


def lay_out(model: Model, name: str, live: Tensor) -> Tensor:
    """A packed parameter as the checkpoint has it."""
    shape = model.layout[name]
    columns = [live[j // 16, :, j % 16].reshape(-1) for j in range(shape.out_features)]
    matrix = torch.stack(columns, dim=1)[: shape.in_features]  # (in, out)
    return matrix if shape.transposed else matrix.T


def live_of(model: Model) -> dict[str, Tensor]:
    return {
        name: lay_out(model, name, model.module.get_submodule(name).weight) for name in model.layout
    }


def snapshot(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def same(model: Model, expected: dict[str, Tensor]) -> bool:
    parameters = dict(model.module.named_parameters())
    return parameters.keys() == expected.keys() and all(
        torch.equal(parameters[name], value) for name, value in expected.items()
    )


def verify(weights: ResidentWeights) -> Verification:
    slices = weights.verify()
    while True:
        try:
            next(slices)
        except StopIteration as end:
            found: Verification = end.value
            return found


def adapters_of(model: Model) -> list[Adapter]:
    layout = model.layout
    names = list(layout)
    return [
        random_adapter(layout, 1),
        random_adapter(layout, 2, rank=11, modules=tuple(names[:3])),
        random_adapter(layout, 3, rank=1, modules=(names[2], names[-2])),
    ]


class Case:
    """A packed model, its weights, its base as loaded, and mixes to fold."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = open_packed(folder, dtype)
        self.weights = open_weights(self.model)
        self.base = snapshot(self.model)
        one, two, three = adapters_of(self.model)
        self.mixes = [
            bound(),
            bound((one, 1.0)),
            bound((one, -0.5), (two, 2.0)),
            bound((three, 1.0)),
            bound((two, 0.1), (three, -1.0), (one, 0.7)),
        ]
        self.fresh: dict[int, dict[str, Tensor]] = {}

    def fold(self, mix: int) -> None:
        self.weights.fold(self.weights.prepare(self.mixes[mix]))


CASES: dict[tuple[str, torch.dtype], Case] = {}


def case_of(bases: dict[str, Path], family: str, dtype: torch.dtype) -> Case:
    """One for all examples, which leave the base in it."""
    if (family, dtype) not in CASES:
        CASES[family, dtype] = Case(bases[family], dtype)
    return CASES[family, dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_parameters_are_those_of_the_checkpoint(base: Path, dtype: torch.dtype) -> None:
    model = open_packed(base, dtype)
    reference = dict(load_reference(base, dtype).named_parameters(remove_duplicate=False))
    for name, value in live_of(model).items():
        module = model.module.get_submodule(name)
        assert isinstance(module, PackedLinear)
        assert torch.equal(value, reference[f"{name}.weight"])
        assert (module.bias is None) == (f"{name}.bias" not in reference)
        if module.bias is not None:
            assert torch.equal(module.bias, reference[f"{name}.bias"])
    served = dict(model.module.named_parameters(remove_duplicate=False))
    assert served.keys() == reference.keys()
    for name, value in reference.items():
        if served[name].dim() < 3:
            assert torch.equal(served[name], value)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_reads_the_parameter_of_a_tied_head(base: Path, dtype: torch.dtype) -> None:
    model: Any = open_packed(base, dtype).module
    reference: Any = load_reference(base, dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = reference.get_input_embeddings().weight is reference.get_output_embeddings().weight
    assert (embedding.weight is head.weight) == tied
    ids = torch.arange(reference.config.vocab_size)[None]
    assert torch.equal(embedding(ids), reference.get_input_embeddings()(ids))


@needs_compiler
def test_an_embedding_that_does_more_than_look_up_keeps_its_parameter(
    bases: dict[str, Path],
) -> None:
    model: Any = load_reference(bases["gpt2"], torch.float32)
    old = model.transformer.wte

    class Scaled(torch.nn.Embedding):
        """As Gemma has one."""

    scaled = Scaled(*old.weight.shape)
    scaled.weight = old.weight
    model.transformer.wte = scaled
    load_kernels()
    pack_modules(model, read_layout(model))
    assert model.transformer.wte is scaled
    assert isinstance(model.lm_head, PackedLinear)
    assert model.lm_head.weight.dim() == 4
    assert scaled.weight is old.weight


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_folds_are_the_dense_sums_rounded_once(base: Path, dtype: torch.dtype) -> None:
    case = Case(base, dtype)
    reference = dict(load_reference(base, dtype).named_parameters(remove_duplicate=False))
    weights = {f"{name}.weight": reference[f"{name}.weight"] for name in case.model.layout}
    for mix in range(len(case.mixes)):
        case.fold(mix)
        exact = dense_weights(weights, case.mixes[mix], case.model.layout)
        for name, live in live_of(case.model).items():
            expected = exact[f"{name}.weight"]
            error = (live.double() - expected).abs()
            # Plus what sums of float32 lose: 12 terms of less than 1.
            limit = 2 * HALF_ULP[dtype] * expected.abs() + 24 * 2.0**-24
            assert bool((error <= limit).all())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@given(path=st.lists(st.integers(0, 4), max_size=8))
def test_bits_do_not_depend_on_the_path_and_the_base_comes_back(
    bases: dict[str, Path], family: str, dtype: torch.dtype, path: list[int]
) -> None:
    case = case_of(bases, family, dtype)
    addresses = {name: p.data_ptr() for name, p in case.model.module.named_parameters()}
    for mix in path:
        case.fold(mix)
        fresh = case.fresh.setdefault(mix, snapshot(case.model))
        assert same(case.model, fresh)
    if path:
        assert verify(case.weights).ok
    case.fold(0)
    assert same(case.model, case.base)
    assert addresses == {name: p.data_ptr() for name, p in case.model.module.named_parameters()}


@needs_compiler
def test_the_order_of_a_mix_does_not_matter(base: Path) -> None:
    case = Case(base, torch.float32)
    terms = list(zip(adapters_of(case.model), (0.5, -1.0, 2.0), strict=True))
    found = []
    for order in (terms, terms[::-1], [terms[1], terms[0], terms[2]]):
        case.weights.fold(case.weights.prepare(bound(*order)))
        found.append(snapshot(case.model))
    assert all(same(case.model, parameters) for parameters in found)
    assert not same(case.model, case.base)


@needs_compiler
def test_every_flipped_bit_is_found(base: Path) -> None:
    case = Case(base, torch.float32)
    case.fold(2)
    clean = verify(case.weights)
    assert clean.ok
    parameters = dict(case.model.module.named_parameters())
    for name, parameter in parameters.items():
        flip_bit(parameter, parameter.numel() - 1)  # in a panel that is not full: what fills it
        found = verify(case.weights)
        assert found.findings.damaged_resident == (name,)
        assert found.findings.damaged_base == ()
        assert found.resident_hash != clean.resident_hash
        flip_bit(parameter, parameter.numel() - 1)
    for module, kept in case.weights._base.items():
        flip_bit(kept, 5)
        found = verify(case.weights)
        assert f"{module}.weight" in found.findings.damaged_base
        flip_bit(kept, 5)
    assert verify(case.weights) == clean


@needs_compiler
def test_the_fold_error_of_packed_parameters_is_that_of_plain_ones(base: Path) -> None:
    found = []
    for kernels in (True, False):
        model = open_model(base, torch.bfloat16, kernels=kernels)
        weights = open_weights(model)
        prepared = weights.prepare(bound((random_adapter(model.layout, 1, size=1e-3), 1.0)))
        slices = weights.measure_fold_error(prepared)
        while True:
            try:
                next(slices)
            except StopIteration as end:
                measured = end.value
                break
        assert measured == pytest.approx(prepared.fold_error, rel=0.2)
        found.append((measured, prepared.fold_error))
    # A head that is not full is filled up with zeros, which rounding does not touch.
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


@needs_compiler
def test_a_failed_fold_puts_the_mix_back(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(base, torch.float32)
    case.fold(1)
    before = snapshot(case.model)
    prepared = case.weights.prepare(case.mixes[4])
    last = list(prepared.factors)[-1]
    prepared.factors[last] = (torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(Exception, match="the fold failed"):
        case.weights.fold(prepared)
    assert same(case.model, before)
    assert verify(case.weights).ok


# Memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 3, 1 << 16])  # from malloc, and in pages of its own
def test_what_lasts_is_a_copy_of_its_own(rows: int, dtype: torch.dtype) -> None:
    zeros = lasting_zeros((rows, 16), dtype, torch.device("cpu"))
    assert zeros.shape == (rows, 16)
    assert zeros.dtype == dtype
    assert not zeros.any()
    value = torch.randn(16, rows).to(dtype).T
    copy = lasting_copy(value)
    give_back()
    assert torch.equal(copy, value)
    assert copy.is_contiguous()
    assert copy.data_ptr() % 64 == 0
    value.zero_()
    assert copy.any() == bool(rows)


def test_memory_that_the_system_refuses_is_no_other_error() -> None:
    with pytest.raises(MemoryError, match="cannot be allocated"):
        lasting_zeros((1 << 60,), torch.bfloat16, torch.device("cpu"))


def test_nothing_that_serves_shares_memory_with_the_file(tmp_path: Path) -> None:
    folder = save_base(build("glm4_moe"), tmp_path)  # whose routers have a buffer that is stored
    module = open_model(folder).module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert any("e_score_correction_bias" in name for name in before)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:  # in place, so that a mapping would see it
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def slot_bytes(model: Model) -> int:
    """By the configuration: keys and values of each layer, float32."""
    config = model.module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head * model.context_length * 4)


def test_the_cache_takes_what_its_rows_take(base: Path) -> None:
    model = open_model(base, max_batch=3)
    assert model.max_batch == 3
    assert model.cache.nbytes == 4 * slot_bytes(model)  # and the scratch slot


def test_a_budget_lowers_the_number_of_rows(base: Path) -> None:
    slot = slot_bytes(open_model(base))
    for budget, rows in ((2 * slot, 1), (4 * slot - 1, 2), (4 * slot, 3), (100 * slot, 4)):
        model = open_model(base, cache_bytes=budget)
        assert model.max_batch == rows
        assert model.scratch_slot == rows
        assert model.cache.nbytes == (rows + 1) * slot <= budget


def test_a_budget_for_no_row_is_refused_with_one_that_is_enough(bases: dict[str, Path]) -> None:
    slot = slot_bytes(open_model(bases["gpt2"]))
    with pytest.raises(ValueError, match="--cache-mib 0 holds no row of 64 tokens") as caught:
        open_model(bases["gpt2"], cache_bytes=2 * slot - 1)
    assert "--max-length" in str(caught.value)


def test_the_budget_that_a_refusal_names_is_enough(tmp_path: Path) -> None:
    folder = save_base(tiny_gpt2(n_positions=3000), tmp_path)  # a slot of 1.46 MiB
    with pytest.raises(ValueError, match=r"--cache-mib 2 holds no row of 3000") as caught:
        open_model(folder, cache_bytes=2 * MIB)
    named = int(str(caught.value).split("give it ")[1].split(" ")[0])
    assert open_model(folder, cache_bytes=named * MIB).max_batch == 1


def test_a_cache_that_does_not_fit_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = slot_bytes(open_model(base))
    monkeypatch.setattr(model_module, "free_bytes", lambda device: 5 * slot - 1)
    with pytest.raises(ValueError, match="the cache of 4 rows of 64 tokens needs") as caught:
        open_model(base)
    for flag in ("--max-batch", "--max-length", "--cache-mib"):
        assert flag in str(caught.value)
    assert open_model(base, max_batch=3).max_batch == 3
    assert open_model(base, max_length=32).max_batch == 4
    assert open_model(base, cache_bytes=4 * slot).max_batch == 3


def test_free_memory_is_the_machines_or_the_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.free_bytes(cpu) > 1 << 60  # nothing is known
    meminfo.write_text("MemTotal:       8000 kB\nMemAvailable:   3000 kB\n")
    assert memory.free_bytes(cpu) == 3000 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 7\ninactive_file 100000\n")
    assert memory.free_bytes(cpu) == 3000 * 1024
    (group / "memory.max").write_text("2000000\n")
    assert memory.free_bytes(cpu) == 1200000
