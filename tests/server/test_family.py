"""Which kernels a process uses."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator

import pytest
import torch

from superpose_server.model.kernels import build
from superpose_server.model.kernels.build import CompilerError, load_kernels
from superpose_server.model.kernels.family import FAMILIES, FamilyError, families

AVX2 = {"avx2", "fma3", "bmi2", "f16c", "lzcnt"}
AVX512 = AVX2 | {"avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"}
AMX = AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"}

# Real processors, by what they have, and the families that they run.
PROCESSORS = {
    "Haswell": (AVX2, ["avx2", "generic"]),
    "Ivy Bridge, which has half of it": (AVX2 - {"avx2", "fma3", "bmi2"}, ["generic"]),
    "Skylake-SP": (AVX512, ["avx512", "avx2", "generic"]),
    "Knights Landing, with AVX512F alone": (AVX2 | {"avx512_f", "avx512_cd"}, ["avx2", "generic"]),
    "Zen 4": (AVX512 | {"avx512_bf16"}, ["avx512bf16", "avx512", "avx2", "generic"]),
    "Sapphire Rapids": (AMX, ["amx", "avx512bf16", "avx512", "avx2", "generic"]),
    "Neoverse": ({"neon", "bf16", "i8mm"}, ["generic"]),
}


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUPERPOSE_KERNELS", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, has: set[str]) -> None:
    found = {name: name in has for name in AMX | {"neon", "bf16", "i8mm"}}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_processor_runs_what_it_has_all_of(
    processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has, names = PROCESSORS[processor]
    pretend(monkeypatch, has)
    assert [family.name for family in families()] == names


def test_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AMX)
    for family in FAMILIES:
        monkeypatch.setenv("SUPERPOSE_KERNELS", family.name)
        assert families() == [family]


@pytest.mark.parametrize("name", ["amx", "AVX2", "neon", "avx2 "])
def test_what_the_processor_lacks_cannot_be_forced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, AVX512)
    monkeypatch.setenv("SUPERPOSE_KERNELS", name)
    with pytest.raises(FamilyError) as error:
        families()
    message = f"SUPERPOSE_KERNELS is {name!r}: this processor runs avx512, avx2, generic"
    assert str(error.value) == message


@pytest.fixture
def chosen() -> Iterator[None]:
    """Puts the products in use back."""
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    family = load_kernels()
    yield
    torch.ops.superpose.use_products(family.products)


def test_products_that_are_wrong_are_not_used(
    chosen: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_products_are_right", lambda products: products != "tiles")
    monkeypatch.setattr(torch.ops.superpose, "use_products", lambda products: True)
    with caplog.at_level(logging.WARNING):
        assert build._choose(list(FAMILIES[:3])).name == "avx512bf16"
    [record] = caplog.records
    assert record.message == "this machine fails at products of family=amx: not used"


def test_products_that_the_system_forbids_are_not_used(
    chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_products_are_right", lambda products: True)
    monkeypatch.setattr(torch.ops.superpose, "use_products", lambda products: products == "floats")
    assert build._choose(list(FAMILIES[:3])).name == "avx512"
    with pytest.raises(CompilerError, match=r"tried amx, avx512bf16\): pass --compile off"):
        build._choose(list(FAMILIES[:2]))


def test_the_check_of_products_finds_a_wrong_one(
    chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = load_kernels().products
    assert build._products_are_right(products)
    real = torch.ops.superpose.linear
    calls = []

    def wrong(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        result: torch.Tensor = real(*arguments)
        if len(calls) == 4:  # the second shape, by the products in question
            result[-1, -1] *= 1.02
        return result

    monkeypatch.setattr(torch.ops.superpose, "linear", wrong)
    assert not build._products_are_right(products)
