from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix, Mix
from superpose_server.control.named_mixes import NamedMix, NamedMixes
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.errors import InvalidArgument, NotFound

ONE, TWO = Adapter("1" * 64, {}), Adapter("2" * 64, {})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry("base", max_domains=2, named_mixes=NamedMixes(tmp_path))
    made.put(Registered("medicine", TWO, Source.PUSHED))
    made.put(Registered("math", ONE, Source.BUNDLED))
    return made


def test_domains_are_listed_in_order(registry: Registry) -> None:
    assert [r.domain for r in registry.all()] == ["math", "medicine"]
    assert len(registry) == 2
    assert registry.get("math").source is Source.BUNDLED


def test_a_domain_that_names_nothing_is_not_found(registry: Registry, tmp_path: Path) -> None:
    assert registry.find("law") is None
    with pytest.raises(NotFound, match=r"'law'.*math, medicine") as caught:
        registry.get("law")
    assert caught.value.metadata == {"domain": "law"}
    with pytest.raises(NotFound, match="loaded: none"):
        Registry("base", 1, NamedMixes(tmp_path)).get("math")


def test_a_name_of_any_length_makes_a_short_message(registry: Registry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.get("x" * 10_000)
    assert len(caught.value.message) < 300


def test_a_mix_is_bound_to_what_its_names_mean_now(registry: Registry) -> None:
    bound = registry.bind(Mix.of({"math": 0.5, "medicine": -1.0}))
    assert bound.weights == {ONE: 0.5, TWO: -1.0}
    assert bound.base_digest == "base"
    registry.put(Registered("math", TWO, Source.PUSHED))
    assert bound.weights == {ONE: 0.5, TWO: -1.0}
    assert registry.bind(Mix.of({"math": 0.5})).weights == {TWO: 0.5}
    registry.remove("math")
    with pytest.raises(NotFound):
        registry.bind(Mix.of({"math": 1}))
    assert registry.bind(Mix()) == BoundMix("base")


def test_a_reader_s_list_is_not_changed_under_it(registry: Registry) -> None:
    before = registry.all()
    registry.remove("math")
    registry.remove("never there")
    assert [r.domain for r in before] == ["math", "medicine"]


def test_a_mix_of_too_many_domains_is_refused(registry: Registry) -> None:
    with pytest.raises(InvalidArgument, match="3 domains: use at most 2") as caught:
        registry.bind(Mix.of({"a": 1, "b": 1, "c": 1}))
    assert caught.value.reason == "TOO_MANY_DOMAINS"
    assert caught.value.field == "mix"
    registry.check_size(2)


# Named mixes.


def name(registry: Registry, name: str, weights: dict[str, float]) -> None:
    registry.named_mixes.put(NamedMix(name, Mix.of(weights)))


def test_a_named_mix_stands_for_its_domains_times_its_weight(registry: Registry) -> None:
    name(registry, "qa", {"math": 1.0, "medicine": -0.5})
    name(registry, "plain", {})
    for asked, meant in (
        ({"qa": 1}, {ONE: 1.0, TWO: -0.5}),
        ({"qa": 0.5}, {ONE: 0.5, TWO: -0.25}),
        ({"qa": 1, "math": 0.25}, {ONE: 1.25, TWO: -0.5}),
        ({"qa": 1, "math": -1}, {TWO: -0.5}),
        ({"plain": 3}, {}),
        ({"plain": 3, "math": 2}, {ONE: 2.0}),
    ):
        assert registry.bind(Mix.of(asked)).weights == meant, asked


def test_a_sum_of_named_mixes_has_no_order_and_one_rounding(registry: Registry) -> None:
    name(registry, "a", {"math": 0.1})
    name(registry, "b", {"math": 0.2})
    name(registry, "c", {"math": 0.3})
    exact = Fraction(0.1) + Fraction(0.2) + Fraction(0.3)
    bound = registry.bind(Mix.of({"c": 1, "a": 1, "b": 1}))
    assert bound.weights == {ONE: float(exact)}
    assert float(exact) != 0.1 + 0.2 + 0.3


def test_a_name_means_what_it_stands_for_when_it_is_bound(registry: Registry) -> None:
    name(registry, "qa", {"math": 1})
    before = registry.bind(Mix.of({"qa": 1}))
    name(registry, "qa", {"medicine": 1})
    assert before.weights == {ONE: 1.0}
    assert registry.bind(Mix.of({"qa": 1})).weights == {TWO: 1.0}
    registry.put(Registered("medicine", ONE, Source.PUSHED))
    assert registry.bind(Mix.of({"qa": 1})).weights == {ONE: 1.0}
    registry.remove("medicine")
    with pytest.raises(NotFound, match="named mix qa holds medicine, which is not loaded") as gone:
        registry.bind(Mix.of({"qa": 1}))
    assert gone.value.reason == "DOMAIN_NOT_FOUND"
    assert gone.value.metadata == {"domain": "medicine"}


def test_what_named_mixes_sum_to_is_checked_like_any_mix(registry: Registry) -> None:
    name(registry, "loud", {"math": 9000})
    with pytest.raises(InvalidArgument, match="weight of math is 18000") as caught:
        registry.bind(Mix.of({"loud": 2}))
    assert (caught.value.reason, caught.value.field) == ("INVALID_MIX", "mix")
    registry.put(Registered("law", ONE, Source.PUSHED))
    name(registry, "all", {"math": 1, "medicine": 1, "law": 1})
    with pytest.raises(InvalidArgument, match="3 domains: use at most 2"):
        registry.bind(Mix.of({"all": 1}))


def test_where_a_domain_is_wanted_a_named_mix_is_not_found(registry: Registry) -> None:
    name(registry, "qa", {"math": 1})
    with pytest.raises(NotFound, match="qa is a named mix and no domain: use one of its domains"):
        registry.get("qa")
    with pytest.raises(NotFound, match=r"'law'.*loaded: math, medicine; named mixes: qa\)"):
        registry.get("law")
