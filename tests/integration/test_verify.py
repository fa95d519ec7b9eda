"""Damage to a single bit is found, and nothing is served from damaged weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.integration.harness import PROMPT, Family, LoopThread, Served, held, start
from torch import Tensor
from typer.testing import CliRunner

from superpose_adapters.mix import BoundMix, Mix
from superpose_client import Client, DataLossError
from superpose_client.cli import app
from superpose_server.engine.residency import Residency

ADAPTED = "transformer.h.0.attn.c_attn.weight"


def flip(tensor: Tensor) -> None:
    """Flip the lowest bit of one element."""
    with torch.inference_mode():
        tensor.view(-1)[7:8].view(torch.int32).bitwise_xor_(1)


@pytest.mark.parametrize(
    "name",
    [
        ADAPTED,
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.ln_1.bias",
        "transformer.wte.weight",
    ],
)
def test_one_flipped_bit_of_a_live_parameter_is_found(served: Served, name: str) -> None:
    served.runtime.guard.stop()  # Which would mend it, before or after it is flipped back.
    assert served.client.verify().ok
    flip(served.parameters()[name].data)
    found = served.client.verify()
    assert not found.ok
    assert found.damaged_resident == (name,)
    assert found.damaged_base == ()
    flip(served.parameters()[name].data)
    assert served.client.verify().ok


def test_one_flipped_bit_of_the_kept_base_is_found_and_stays(served: Served) -> None:
    flip(served.weights._base[ADAPTED.removesuffix(".weight")])
    found = served.client.verify()
    assert not found.ok
    assert found.damaged_base == (ADAPTED,)
    served.client.set("base")  # copies the damaged base into the weights
    assert not served.client.verify().ok


def test_a_fold_that_ruins_the_weights_ends_all_rows_and_is_noted_even_if_its_client_is_gone(
    served: Served,
) -> None:
    stream = served.client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    ruin(served)
    wanted = Mix.of({"b": 1.0})

    async def abandoned() -> None:
        task = asyncio.ensure_future(served.runtime.operate(lambda op: op.set(wanted, None)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with held(served.recorder):  # so that the fold comes after its client has gone
        served.loop.run(abandoned())
    with pytest.raises(DataLossError, match="restart the server"):
        list(stream)
    served.wait_for_health("superpose.v1.InferenceService", "NOT_SERVING")
    with pytest.raises(DataLossError):
        served.client.generate(PROMPT)


def ruin(served: Served) -> None:
    """Leave neither a fold nor a way back from it."""
    base = served.weights._base
    for module, parameter in base.items():
        base[module] = parameter.flatten()[:7]


def test_a_fold_that_nobody_asked_for_and_that_ruins_the_weights_is_told_of(
    loop: LoopThread, gpt2: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow_rows(_: Residency, rows: Sequence[BoundMix], resident: BoundMix) -> BoundMix | None:
        return rows[0] if rows[0] != resident else None

    monkeypatch.setattr(Residency, "choose", follow_rows)
    served = start(loop, gpt2.base, tmp_path / "state", residency="auto")
    try:
        gpt2.push_all(served.client)
        served.client.add("a")
        assert metric(served, "superpose_weights_verified") == 1
        ruin(served)
        with pytest.raises(DataLossError, match="restart the server") as caught:
            served.client.generate(PROMPT, mix="b", max_new_tokens=100, ignore_eos=True)
        assert caught.value.reason == "WEIGHTS_DAMAGED"
        served.wait_for_health("superpose.v1.InferenceService", "NOT_SERVING")
        assert served.client.health("superpose.v1.MixService") == "SERVING"
        assert metric(served, "superpose_weights_verified") == 0
        assert not served.client.info().weights_intact
        for call in CALLS:
            with pytest.raises(DataLossError):
                call(served.client)
    finally:
        served.stop()


def metric(served: Served, name: str) -> float | None:
    return served.runtime.metrics.registry.get_sample_value(name)


CALLS: list[Callable[[Client], object]] = [
    lambda client: client.generate(PROMPT),
    lambda client: list(client.stream(PROMPT)),
    lambda client: client.score(["abc"]),
    lambda client: client.generate(PROMPT, mix="base"),
]


def test_damaged_weights_serve_nothing_until_they_are_whole_again(served: Served) -> None:
    served.runtime.guard.stop()  # Which would mend them at once.
    scores = served.score_bits()
    stream = served.client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    flip(served.parameters()[ADAPTED].data)
    assert not served.client.verify().ok
    with pytest.raises(DataLossError, match="found damaged"):
        list(stream)
    assert not served.client.info().weights_intact
    served.wait_for_health("superpose.v1.InferenceService", "NOT_SERVING")
    assert served.client.health("superpose.v1.MixService") == "SERVING"
    for call in CALLS:
        with pytest.raises(DataLossError, match="failed their last verification") as caught:
            call(served.client)
        assert caught.value.reason == "WEIGHTS_DAMAGED"
    served.client.set("b")
    with pytest.raises(DataLossError):  # whole again, but nobody knows yet
        CALLS[0](served.client)
    assert served.client.verify().ok
    assert served.client.info().weights_intact
    served.wait_for_health("superpose.v1.InferenceService", "SERVING")
    for call in CALLS:
        call(served.client)
    served.client.set("a")
    assert served.score_bits() == scores


def test_adapterctl_verify_exits_with_1_on_damage(served: Served) -> None:
    command = ["verify", "--server", served.address]
    assert CliRunner().invoke(app, command).exit_code == 0
    flip(served.parameters()[ADAPTED].data)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert ADAPTED in result.stdout
    assert result.stderr == "adapterctl: the weights are not what they should be\n"


def test_verify_while_rows_run_and_the_mix_changes(served: Served) -> None:
    stream = served.client.stream(PROMPT, max_new_tokens=300, ignore_eos=True, temperature=0)
    tokens = len(next(stream).token_ids)
    for weight in (0.5, 0.25, -1.0):
        served.client.set({"b": weight})
        found = served.client.verify()
        assert found.ok
        assert found.mix.weights == {"b": weight}
        assert found.longest_stall_seconds > 0
    assert tokens + sum(len(chunk.token_ids) for chunk in stream) == 300
