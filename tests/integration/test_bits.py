"""Removal restores, and a mix is the same bits whatever path led to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.harness import Family, LoopThread, Served, start

from superpose_client import AlreadyExistsError, NotFoundError

DOMAINS = ("a", "b", "c")
WEIGHTS = st.floats(-2, 2).filter(lambda weight: weight != 0)
MIXES = st.dictionaries(st.sampled_from(DOMAINS), WEIGHTS)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(DOMAINS), WEIGHTS),
        st.tuples(st.just("remove"), st.sampled_from(DOMAINS)),
        st.tuples(st.just("set"), MIXES),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base_served(
    request: pytest.FixtureRequest, loop: LoopThread, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server with `a`, `b` and `c` pushed and the base as default mix."""
    family: Family = request.getfixturevalue(request.param)
    folder: Path = tmp_path_factory.mktemp("bits")
    served = start(loop, family.base, folder / "state")
    family.push_all(served.client)
    yield served
    served.stop()


def change(served: Served, name: str, *arguments: object) -> None:
    """Make one change; one that the state refuses changes nothing."""
    with contextlib.suppress(AlreadyExistsError, NotFoundError):
        getattr(served.client, name)(*arguments)


@settings(max_examples=12)
@given(changes=CHANGES)
def test_setting_the_base_restores_every_byte(
    base_served: Served, changes: list[tuple[object, ...]]
) -> None:
    served = base_served
    served.client.set("base")
    before, scores = served.hashes(), served.score_bits()
    addresses = {name: p.data_ptr() for name, p in served.parameters().items()}
    served.client.set({"a": 1.0})
    assert served.hashes() != before
    assert served.score_bits() != scores
    for name, *arguments in changes:
        change(served, str(name), *arguments)
    assert served.client.verify().ok
    served.client.set("base")
    assert served.score_bits() == scores
    assert served.hashes() == before
    assert {name: p.data_ptr() for name, p in served.parameters().items()} == addresses
    assert served.client.verify().ok


@settings(max_examples=12)
@given(changes=CHANGES, mix=MIXES)
def test_a_mix_is_the_same_bits_by_any_path(
    base_served: Served, changes: list[tuple[object, ...]], mix: dict[str, float]
) -> None:
    served = base_served
    served.client.set("base")
    served.client.set(mix)
    straight, scores = served.client.verify(), served.score_bits()
    for name, *arguments in changes:
        change(served, str(name), *arguments)
    for domain in served.client.mix().weights:
        served.client.remove(domain)
    for domain, weight in reversed(mix.items()):
        served.client.add(domain, weight)
    roundabout = served.client.verify()
    assert straight.ok
    assert roundabout.ok
    assert roundabout.resident_hash == straight.resident_hash
    assert roundabout.mix.digest == straight.mix.digest
    assert served.score_bits() == scores
