from __future__ import annotations

import math

import pytest
import torch
from benchmarks.study.floor import random_floor
from benchmarks.study.geometry_stage import plain_products, weighted_products
from benchmarks.study.results import PairGeometry
from torch import Tensor

from superpose_adapters.adapter import Adapter, Factors

_SIZES = {"h.0.attn.c_attn": (24, 40), "h.0.mlp.c_proj": (32, 16), "h.1.mlp.c_proj": (32, 16)}


def _adapter(seed: int, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(
            torch.randn(rank, size[0], generator=generator),
            torch.randn(size[1], rank, generator=generator),
            16.0,
        )
        for name, size in _SIZES.items()
    }
    return Adapter(str(seed), modules)


def _dense(adapter: Adapter, module: str) -> Tensor:
    factors = adapter.modules[module]
    return factors.scaling * factors.b.double() @ factors.a.double()


@pytest.fixture
def pair() -> tuple[Adapter, Adapter]:
    return _adapter(0, 4), _adapter(1, 3)


def test_products_are_those_of_dense_deltas(pair: tuple[Adapter, Adapter]) -> None:
    for module, products in plain_products(*pair).items():
        first, second = (_dense(adapter, module) for adapter in pair)
        expected = ((first * second).sum(), first.norm(), second.norm())
        assert products == pytest.approx([float(each) for each in expected], rel=1e-12)


def test_weighted_products_are_those_of_dense_deltas(pair: tuple[Adapter, Adapter]) -> None:
    generator = torch.Generator().manual_seed(2)
    covariances = {}
    for name, (width, _) in _SIZES.items():
        x = torch.randn(100, width, generator=generator, dtype=torch.float64)
        covariances[name] = x.T @ x / 100
    for module, products in weighted_products(*pair, covariances).items():
        first, second = (_dense(adapter, module) for adapter in pair)
        c = covariances[module]
        expected = [
            float(torch.trace(one @ c @ other.T))
            for one, other in ((first, second), (first, first), (second, second))
        ]
        assert products == pytest.approx(
            [expected[0], math.sqrt(expected[1]), math.sqrt(expected[2])], rel=1e-10
        )


def test_the_identity_weighs_nothing(pair: tuple[Adapter, Adapter]) -> None:
    identity = {name: torch.eye(width) for name, (width, _) in _SIZES.items()}
    plain, weighted = plain_products(*pair), weighted_products(*pair, identity)
    for module in _SIZES:
        assert weighted[module] == pytest.approx(plain[module], rel=1e-9)


def test_summaries(pair: tuple[Adapter, Adapter]) -> None:
    geometry = PairGeometry(plain_products(*pair), _SIZES)
    dense = {name: tuple(_dense(adapter, name) for adapter in pair) for name in _SIZES}
    cosines = {n: float((a * b).sum() / (a.norm() * b.norm())) for n, (a, b) in dense.items()}
    assert geometry.cosines == pytest.approx(cosines)
    assert geometry.rms == pytest.approx(math.sqrt(sum(c * c for c in cosines.values()) / 3))
    assert geometry.rms_by_type == pytest.approx(
        {
            "attn.c_attn": abs(cosines["h.0.attn.c_attn"]),
            "mlp.c_proj": math.sqrt(
                (cosines["h.0.mlp.c_proj"] ** 2 + cosines["h.1.mlp.c_proj"] ** 2) / 2
            ),
        }
    )
    first, second = (torch.cat([dense[name][i].flatten() for name in _SIZES]) for i in (0, 1))
    assert geometry.weighted == pytest.approx(
        float(first @ second / (first.norm() * second.norm()))
    )
    assert geometry.floor == pytest.approx(math.sqrt((1 / (24 * 40) + 2 / (32 * 16)) / 3))


def test_the_weighted_rms_counts_modules_by_their_norms(pair: tuple[Adapter, Adapter]) -> None:
    geometry = PairGeometry(plain_products(*pair), _SIZES)
    squares = weights = 0.0
    for module in _SIZES:
        first, second = (_dense(adapter, module) for adapter in pair)
        weight = float(first.norm() * second.norm())
        squares += weight * float((first * second).sum() / (first.norm() * second.norm())) ** 2
        weights += weight
    assert geometry.weighted_rms == pytest.approx(math.sqrt(squares / weights))
    assert geometry.weighted_rms != pytest.approx(geometry.rms, rel=1e-3)


def test_deltas_of_one_random_a_lie_at_the_floor_of_a_shared_a() -> None:
    """Dense deltas of random B over one A, which PEFT starts at Kaiming's uniform distribution."""
    generator = torch.Generator().manual_seed(3)
    pairs, rank, width, out = 1000, 4, 128, 24
    a = torch.rand(pairs, rank, width, generator=generator) * 2 - 1
    first, second = (torch.randn(pairs, out, rank, generator=generator) @ a for _ in range(2))
    cosines = torch.cosine_similarity(first.flatten(1), second.flatten(1))
    found = float(cosines.square().mean().sqrt())
    assert found == pytest.approx(random_floor(width, out, rank), rel=0.06)
    assert found > 4 * random_floor(width, out)


def test_a_pair_with_a_shared_a_has_its_floor(pair: tuple[Adapter, Adapter]) -> None:
    geometry = PairGeometry(plain_products(*pair), _SIZES, shared_rank=4)
    assert geometry.floor == pytest.approx(math.sqrt((1 / (4 * 40) + 2 / (4 * 16)) / 3))
    assert geometry.floor_by_type == pytest.approx(
        {"attn.c_attn": 1 / math.sqrt(4 * 40), "mlp.c_proj": 1 / math.sqrt(4 * 16)}
    )


def test_random_deltas_lie_at_the_floor() -> None:
    found = [
        PairGeometry(plain_products(_adapter(2 * i, 4), _adapter(2 * i + 1, 4)), _SIZES)
        for i in range(200)
    ]
    mean_square = sum(geometry.rms**2 for geometry in found) / len(found)
    assert math.sqrt(mean_square) == pytest.approx(found[0].floor, rel=0.1)
