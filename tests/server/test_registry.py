from __future__ import annotations

import pytest

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix, Mix
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.errors import InvalidArgument, NotFound

ONE, TWO = Adapter("1" * 64, {}), Adapter("2" * 64, {})


@pytest.fixture
def registry() -> Registry:
    made = Registry("base", max_domains=2)
    made.put(Registered("medicine", TWO, Source.PUSHED))
    made.put(Registered("math", ONE, Source.BUNDLED))
    return made


def test_domains_are_listed_in_order(registry: Registry) -> None:
    assert [r.domain for r in registry.all()] == ["math", "medicine"]
    assert len(registry) == 2
    assert registry.get("math").source is Source.BUNDLED


def test_a_domain_that_names_nothing_is_not_found(registry: Registry) -> None:
    assert registry.find("law") is None
    with pytest.raises(NotFound, match=r"'law'.*math, medicine") as caught:
        registry.get("law")
    assert caught.value.metadata == {"domain": "law"}
    with pytest.raises(NotFound, match="loaded: none"):
        Registry("base", 1).get("math")


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
