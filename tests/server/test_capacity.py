"""How many rows of how many tokens: what is asked for is given or refused, and never too much."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.server.helpers import open_model
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig

from superpose_server.model import capacity, model
from superpose_server.model.capacity import Capacity, find_capacity, positions_of

MIB = 1 << 20
GIB = 1 << 30
FEWEST = 1024

ASKED = st.fixed_dictionaries(
    {
        "token_bytes": st.integers(1, 1 << 21),
        "positions": st.integers(2, 1 << 17),
        "max_batch": st.integers(1, 512),
        "max_length": st.none() | st.integers(2, 1 << 17),
        "cache_bytes": st.none() | st.integers(1, 1 << 16).map(lambda mib: mib * MIB),
        "free": st.integers(0, 1 << 37),
        "share": st.sampled_from([0.25, 0.9, 1.0]),
    }
)


def needed(found: Capacity, token_bytes: int) -> int:
    """Bytes of all rows and the scratch slot."""
    return token_bytes * found.length * (found.rows + 1)


@given(asked=ASKED)
def test_what_is_given_fits_and_is_what_was_asked_for(asked: dict[str, Any]) -> None:
    assume((asked["max_length"] or 0) <= asked["positions"])
    try:
        found = find_capacity(**asked)
    except ValueError as refusal:
        check_refusal(str(refusal), asked)
        return
    assert needed(found, asked["token_bytes"]) <= asked["free"]
    assert 1 <= found.rows <= asked["max_batch"]
    assert 2 <= found.length <= asked["positions"]
    if asked["max_length"] is not None:
        assert found.length == asked["max_length"]
    if asked["cache_bytes"] is None:
        assert found.rows == asked["max_batch"]
        if asked["max_length"] is None and found.length < asked["positions"]:
            within = needed(found, asked["token_bytes"]) <= asked["share"] * asked["free"]
            assert within or found.length == FEWEST
            # And no token less than that.
            longer = Capacity(found.rows, found.length + 1)
            assert needed(longer, asked["token_bytes"]) > int(asked["share"] * asked["free"])
    else:
        assert needed(found, asked["token_bytes"]) <= asked["cache_bytes"]
        assert found.length == (asked["max_length"] or asked["positions"])
        if found.rows < asked["max_batch"]:  # one more would not fit
            more = Capacity(found.rows + 1, found.length)
            assert needed(more, asked["token_bytes"]) > asked["cache_bytes"]


def check_refusal(message: str, asked: dict[str, Any]) -> None:
    """A refusal is true, names the flags that help, and those help."""
    assert "\n" not in message
    if message.startswith("--cache-mib"):
        assert "--max-length" in message
        enough = re.search(r"give it (\d+) or more", message)
        assert enough is not None
        again = asked | {"cache_bytes": int(enough[1]) * MIB, "free": 1 << 60}
        assert find_capacity(**again).rows >= 1
        return
    assert re.search(r"\d+ MiB and \d+ MiB are free", message)
    assert {"--max-batch", "--max-length", "--cache-mib"} <= set(re.findall(r"--[\w-]+", message))
    # As little as could be asked for would not have been refused, or there is room for nothing.
    if asked["free"] >= 4 * asked["token_bytes"]:
        smallest = asked | {"max_batch": 1, "max_length": 2, "cache_bytes": None}
        assert find_capacity(**smallest) == Capacity(1, 2)


def capacity_of(**changes: Any) -> Capacity:
    values: dict[str, Any] = {
        "token_bytes": 100_000,
        "positions": 131_072,
        "max_batch": 32,
        "max_length": None,
        "cache_bytes": None,
        "free": 40 * GIB,
        "share": 0.25,
    }
    return find_capacity(**(values | changes))


def test_a_long_base_gets_a_default_limit_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=capacity.__name__):
        found = capacity_of()
    assert found == Capacity(32, 10 * GIB // (100_000 * 33))
    [record] = caplog.records
    for part in (str(found.length), "131072", "32 rows", "25 %", "--max-length", "--cache-mib"):
        assert part in record.getMessage()


def test_what_fits_or_is_asked_for_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert capacity_of(positions=1024) == Capacity(32, 1024)
        assert capacity_of(max_length=5000) == Capacity(32, 5000)
        assert capacity_of(cache_bytes=30 * GIB, max_length=20_000) == Capacity(15, 20_000)
    assert not caplog.records


def test_the_default_limit_does_not_go_below_1024_tokens() -> None:
    assert capacity_of(free=4 * GIB) == Capacity(32, FEWEST)
    assert capacity_of(free=4 * GIB, positions=512) == Capacity(32, 512)
    with pytest.raises(ValueError, match="32 rows of 1024 tokens needs 3223 MiB and 3072 MiB"):
        capacity_of(free=3 * GIB)
    assert capacity_of(free=3 * GIB, max_batch=16).rows == 16


def test_the_room_that_is_named_is_enough_to_the_last_byte() -> None:
    # 2.4 MiB, which is not 2.
    with pytest.raises(ValueError, match=r"--cache-mib 2 holds no row .* give it 3 or more"):
        capacity_of(token_bytes=1258, max_length=1000, cache_bytes=2 * MIB)
    found = capacity_of(token_bytes=1258, max_length=1000, cache_bytes=3 * MIB)
    assert found == Capacity(1, 1000)


def test_positions_are_found_under_the_name_that_a_family_has_for_them() -> None:
    assert positions_of(LlamaConfig(max_position_embeddings=77)) == 77
    assert positions_of(GPT2Config(n_positions=78)) == 78
    assert positions_of(MptConfig(max_seq_len=79)) == 79
    assert positions_of(BloomConfig()) is None


@pytest.mark.parametrize("kernels", [False])
def test_a_model_takes_no_more_than_what_is_free(
    bases: dict[str, Path], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = open_model(bases["llama"], kernels=kernels, max_batch=3)
    token = small.cache.nbytes // (4 * 64)
    assert small.cache.nbytes == token * 4 * 64
    monkeypatch.setattr(model, "free_bytes", lambda device: token * 4 * 64)
    # The whole of it was asked for, so the share does not matter.
    exact = open_model(bases["llama"], kernels=kernels, max_batch=3, max_length=64)
    assert exact.cache.nbytes == token * 4 * 64
    assert (exact.max_batch, exact.context_length, exact.scratch_slot) == (3, 64, 3)
    monkeypatch.setattr(model, "free_bytes", lambda device: token * 4 * 64 - 1)
    with pytest.raises(ValueError, match="the cache of 3 rows of 64 tokens needs"):
        open_model(bases["llama"], kernels=kernels, max_batch=3, max_length=64)
    assert open_model(bases["llama"], kernels=kernels, max_batch=3, max_length=63).max_batch == 3
    monkeypatch.setattr(capacity, "_FEWEST", 8)
    by_default = open_model(bases["llama"], kernels=kernels, max_batch=3)
    assert by_default.context_length == (token * 4 * 64 - 1) // 4 // (token * 4)
    assert by_default.cache.nbytes <= (token * 4 * 64) // 4


@pytest.mark.parametrize("length", [-1, 0, 1, 65])
def test_a_length_that_a_base_cannot_have_is_refused(bases: dict[str, Path], length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length is {length}: this base takes 2 to 64"):
        open_model(bases["gpt2"], max_length=length, dtype=torch.float32)
