"""Damage that nobody asks about is found while texts are made, and mended, or the server ends."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    End,
    Family,
    LoopThread,
    Served,
    Step,
    start,
    wait_until,
)
from torch import Tensor

from superpose_client import CallError, DataLossError
from superpose_server import command
from superpose_server.control.guard import default_interval
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.errors import DataLoss
from superpose_server.weights.resident import ResidentWeights

INFERENCE = "superpose.v1.InferenceService"
ADAPTED = "transformer.h.0.attn.c_attn"
EVERY = 0.2
STREAMS = 16


def spoil(tensor: Tensor) -> None:
    """Flip a bit of an exponent: the number is 256 times as large, or as small."""
    with torch.inference_mode():
        tensor.view(-1)[7:8].view(torch.int32).bitwise_xor_(1 << 26)


@pytest.fixture
def guarded(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Any:
    served = start(loop, gpt2.base, tmp_path / "state", verify_every=EVERY)
    try:
        gpt2.push_all(served.client)
        served.client.add("a")
        yield served
    finally:
        served.stop()


def go_on_only_while_checked(served: Served) -> None:
    """Hold rows between checks, so that none ends of itself before one finds what is damaged."""
    engine, recorder = served.runtime.local, served.recorder

    def gate(_: Step) -> None:
        wait_until(lambda: bool(engine._jobs) or recorder.gate is not gate, "a check is asked for")

    recorder.gate = gate


def go_on(served: Served) -> None:
    """Hold rows no more."""
    served.recorder.gate = lambda step: None


@dataclass(frozen=True)
class Finding:
    """What a check found, how many events of the engine came before it, and who ran then."""

    ok: bool
    events: int
    running: tuple[Sequence, ...]


def test_a_bit_that_flips_while_16_streams_run_is_found_and_mended(guarded: Served) -> None:
    served, recorder, engine = guarded, guarded.recorder, guarded.runtime.local
    expected, hashes = served.greedy(tokens=40), served.hashes()
    findings: list[Finding] = []  # Since the bit has flipped.
    enough = threading.Event()
    errors: list[CallError] = []

    # On the engine's thread, as all that touches `findings` and the recorder's events.
    def found(ok: bool) -> None:
        findings.append(Finding(ok, len(recorder.events), tuple(engine._scheduler.running)))
        if not ok:
            go_on(served)

    def flip_once_all_run(step: Step) -> None:
        wait_until(lambda: engine.running + engine.waiting == STREAMS, "all streams are there")
        if len(step.rows) == STREAMS:
            spoil(live(served))
            findings.clear()
            go_on_only_while_checked(served)

    def ask() -> None:
        """Make texts one after the other, whatever happens; the first is a long one."""
        tokens = 900
        while not enough.is_set():
            try:
                served.greedy(tokens=tokens)
            except CallError as error:
                errors.append(error)
                tokens = 40

    recorder.gate = flip_once_all_run
    served.runtime.integrity.follow(found)
    clients = [threading.Thread(target=ask) for _ in range(STREAMS)]
    for client in clients:
        client.start()
    wait_until(lambda: found_and_mended(findings) is not None, "it is found and mended")
    found_and = found_and_mended(findings)
    assert found_and is not None
    damaged, mended = found_and

    def texts_since_then() -> list[End]:
        ends = [event for event in recorder.events[mended.events :] if isinstance(event, End)]
        return [end for end in ends if end.reason is FinishReason.LENGTH]

    wait_until(lambda: len(texts_since_then()) > STREAMS, "texts are made again")
    enough.set()
    for client in clients:
        client.join(PATIENCE)

    # One that had begun may have passed the parameter; the next one may not.
    assert findings.index(damaged) <= 1
    # From there on no text ends but with an error, until all is mended.
    between = [e for e in recorder.events[damaged.events : mended.events] if isinstance(e, End)]
    assert all(isinstance(end.reason, DataLoss) for end in between)
    assert len(damaged.running) == STREAMS
    assert set(damaged.running) <= {end.row for end in between}
    assert {type(error) for error in errors} == {DataLossError}
    assert {tuple(end.row.tokens) for end in texts_since_then()} == {expected}
    assert served.hashes() == hashes
    assert served.client.verify().ok
    served.wait_for_health(INFERENCE, "SERVING")
    metric = served.runtime.metrics.registry.get_sample_value
    assert metric("superpose_weight_checks_total", {"result": "damaged"}) == 1
    assert metric("superpose_weights_mended_total") == 1
    assert metric("superpose_weights_verified") == 1


def found_and_mended(findings: list[Finding]) -> tuple[Finding, Finding] | None:
    """Return the first finding of damage and the next that there is none, if they are there."""
    rest = itertools.dropwhile(lambda finding: finding.ok, tuple(findings))
    damaged = next(rest, None)
    mended = next((finding for finding in rest if finding.ok), None)
    return None if damaged is None or mended is None else (damaged, mended)


def live(served: Served) -> Tensor:
    return served.weights._live[ADAPTED]


def prepared(served: Served) -> Tensor:
    """Factors that the next fold of the same mix would be made of."""
    spoil(live(served))
    return served.weights.resident.factors[ADAPTED][1]


def copy(served: Served) -> Tensor:
    """Factors that rows of another mix are corrected by."""
    held = iter(served.client.stream(PROMPT, mix="b", max_new_tokens=900, ignore_eos=True))
    next(held)
    go_on_only_while_checked(served)  # The factors are kept while the row runs.
    served.copies = held  # type: ignore[attr-defined]  # Runs on.
    stack = served.runtime.local.runner._corrections._stack
    assert stack is not None
    return stack.a[ADAPTED][0]


@pytest.mark.parametrize("what", [live, prepared, copy])
def test_what_can_be_made_anew_is(guarded: Served, what: Callable[[Served], Tensor]) -> None:
    expected = guarded.greedy(), guarded.greedy({"b": 1.0})
    mended = guarded.runtime.metrics.registry.get_sample_value
    spoil(what(guarded))
    wait_until(lambda: mended("superpose_weights_mended_total") == 1, "it is mended")
    go_on(guarded)
    assert (guarded.greedy(), guarded.greedy({"b": 1.0})) == expected
    assert guarded.client.verify().ok
    assert not guarded.server.failed.is_set()


def kept_base(served: Served) -> Tensor:
    return served.weights._base[ADAPTED]


def never_folded(served: Served) -> Tensor:
    return served.parameters()["transformer.wte.weight"].data


def adapter(served: Served) -> Tensor:
    registered = served.runtime.registry.find("c")
    assert registered is not None
    return registered.adapter.modules[ADAPTED].a


@pytest.mark.parametrize("what", [kept_base, never_folded, adapter])
def test_what_there_is_no_copy_of_ends_the_server(
    guarded: Served, what: Callable[[Served], Tensor]
) -> None:
    stream = guarded.client.stream(PROMPT, max_new_tokens=900, ignore_eos=True)
    next(stream)
    spoil(what(guarded))
    with pytest.raises(DataLossError):
        list(stream)
    wait_until(guarded.server.failed.is_set, "the server is to end")
    guarded.wait_for_health(INFERENCE, "NOT_SERVING")
    with pytest.raises(DataLossError, match="restart the server"):
        guarded.client.generate(PROMPT)


def test_the_command_says_what_is_damaged_and_exits_with_3(
    gpt2: Family,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = ResidentWeights.check

    def check(self: ResidentWeights) -> Generator[bool, None, Any]:
        spoil(self._parameters["transformer.wte.weight"].data)
        return real(self)

    monkeypatch.setattr(ResidentWeights, "check", check)
    flags = [f"--base={gpt2.base}", f"--state-dir={tmp_path / 'state'}", "--dtype=float32"]
    flags += ["--compile=off", "--device=cpu"]
    flags += ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", f"--verify-every={EVERY}"]
    monkeypatch.setattr(sys, "argv", ["superpose-server", *flags])
    with pytest.raises(SystemExit) as caught:
        command.run()
    assert caught.value.code == 3
    told = capsys.readouterr()
    assert told.out.startswith("ready ")
    (line,) = told.err.splitlines()
    assert line.startswith("superpose-server: transformer.wte.weight: damaged in memory")
    assert line.endswith("start the server again")
    assert "FATAL" in caplog.text


def test_changes_of_the_mix_do_not_keep_the_weights_from_being_checked(guarded: Served) -> None:
    """A mix changes more often than all weights can be looked through."""
    metric = guarded.runtime.metrics.registry.get_sample_value
    weights = itertools.cycle((0.5, 1.0, -1.0))
    before = metric("superpose_weight_checks_total", {"result": "ok"}) or 0

    def checked() -> bool:
        guarded.client.set({"a": next(weights)})
        return (metric("superpose_weight_checks_total", {"result": "ok"}) or 0) > before + 2

    wait_until(checked, "the weights were checked three times")
    assert metric("superpose_weight_checks_total", {"result": "damaged"}) is None


def test_without_a_number_a_check_is_as_rare_as_it_is_dear() -> None:
    assert default_interval(0.0) == default_interval(0.15) == 60.0
    assert default_interval(2.0) == 800.0  # of which it is 0.25 %


def test_no_check_outlives_the_server(guarded: Served) -> None:
    guarded.stop(grace=10.0)
    assert not guarded.runtime.guard._thread.is_alive()
