from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.mix import BoundEntry, BoundMix, Mix
from superpose_adapters.mix_syntax import MAX_ABS_WEIGHT, NAME_PATTERN, RESERVED_NAMES

domains = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda n: n not in RESERVED_NAMES)
weights = st.floats(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT)
mixes = st.dictionaries(domains, weights, max_size=5)


def adapter(name: str) -> Adapter:
    factors = Factors(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    return Adapter(digest=f"{name:0>64}", modules={"m": factors})


ADAPTERS = [adapter(c) for c in "abc"]
entries = st.lists(
    st.builds(BoundEntry, domain=domains, adapter=st.sampled_from(ADAPTERS), weight=weights),
    max_size=5,
)


@given(mixes, st.randoms())
def test_a_mix_has_no_order_and_no_zeros(content: dict[str, float], random: Any) -> None:
    pairs = list(content.items())
    random.shuffle(pairs)
    mix = Mix.of(pairs)
    assert mix == Mix.of(content)
    assert hash(mix) == hash(Mix.of(content))
    assert dict(mix.entries) == {d: w for d, w in content.items() if w != 0}
    assert Mix.of([*pairs, ("zz-absent", 0.0)] if "zz-absent" not in content else pairs) == mix


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e300, -10001.0])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of math is"):
        Mix.of({"math": weight})


def test_the_limits_of_a_weight_are_allowed() -> None:
    assert Mix.of({"math": 1e4, "law": -1e4}).entries == (("law", -1e4), ("math", 1e4))


def test_a_domain_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="math is named twice"):
        Mix.of([("math", 1.0), ("math", 2.0)])


@given(entries, st.randoms())
def test_a_bound_mix_depends_on_its_content_alone(content: list[BoundEntry], random: Any) -> None:
    shuffled = list(content)
    random.shuffle(shuffled)
    one, other = BoundMix.of("base", content), BoundMix.of("base", shuffled)
    assert one.digest == other.digest
    assert list(one.weights) == list(other.weights)
    assert one.weights == other.weights
    assert [a.digest for a in one.weights] == sorted({e.adapter.digest for e in content})
    for a, weight in one.weights.items():
        exact = math.fsum(e.weight for e in content if e.adapter == a)
        assert weight == pytest.approx(exact, abs=1e-9)


@given(entries)
def test_the_digest_does_not_know_names(content: list[BoundEntry]) -> None:
    renamed = [BoundEntry("x", e.adapter, e.weight) for e in content]
    assert BoundMix.of("base", content).digest == BoundMix.of("base", renamed).digest


def test_the_digest_sees_base_adapter_and_weight() -> None:
    def digest(base: str = "base", a: Adapter = ADAPTERS[0], weight: float = 1.0) -> str:
        return BoundMix.of(base, [BoundEntry("d", a, weight)]).digest

    digests = {
        digest(),
        digest(base="other"),
        digest(a=ADAPTERS[1]),
        digest(weight=math.nextafter(1.0, 2.0)),
        digest(weight=-1.0),
        BoundMix("base").digest,
    }
    assert len(digests) == 6


def test_adapters_are_equal_when_their_digests_are() -> None:
    assert adapter("a") == adapter("a")
    assert {adapter("a"), adapter("a"), adapter("b")} == {adapter("b"), adapter("a")}
    assert adapter("a") != adapter("b")
    assert adapter("a").rank == 1
    assert adapter("a").parameters == 5
