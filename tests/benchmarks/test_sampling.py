from __future__ import annotations

from argparse import ArgumentTypeError

import pytest
from benchmarks.sampling import SAMPLINGS, describe, samplings

from superpose_server.engine.sampling import SamplingParams


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_server_takes_every_sampling(name: str) -> None:
    assert SamplingParams(**SAMPLINGS[name]).temperature == SAMPLINGS[name]["temperature"]  # type: ignore[arg-type]


def test_samplings_are_read_and_an_unknown_one_is_named() -> None:
    assert samplings("greedy,top_k") == ["greedy", "top_k"]
    with pytest.raises(ArgumentTypeError, match="beam is none of greedy, top_p, top_k"):
        samplings("greedy,beam")


def test_a_report_says_whose_logits_it_had() -> None:
    assert "random weights" in describe("small")
    assert "trained weights" in describe("mini")
