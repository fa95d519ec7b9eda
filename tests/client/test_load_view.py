"""`adapterctl top`: what is shown of looks at a server."""

from __future__ import annotations

from itertools import islice

import pytest
from rich.console import Console, RenderableType

from superpose_client import ServerInfo
from superpose_client.load_view import Look, looks, show_looks, view
from superpose_proto.v1 import mix_pb2, server_pb2


def info(*tokens: int, replicas: bool = True) -> ServerInfo:
    """A server whose engines have generated so many tokens."""
    names = [
        server_pb2.Replica(
            name=f"r{at}",
            node="n",
            generation=4,
            digest="cd" * 32,
            running=at,
            waiting=2,
            generated_tokens=count,
            weights_intact=at != 2,
        )
        for at, count in enumerate(tokens)
    ]
    return ServerInfo.from_proto(
        server_pb2.GetServerInfoResponse(
            base="mini",
            mix=mix_pb2.MixState(generation=4),
            running=3,
            waiting=1,
            weights_intact=True,
            generated_tokens=sum(tokens),
            replicas=names if replicas else (),
        )
    )


def lines(shown: RenderableType) -> list[list[str]]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    return [line.split() for line in capture.get().splitlines()]


def test_a_server_without_replicas_is_one_row() -> None:
    before, now = Look(info(100, replicas=False), 10.0), Look(info(350, replicas=False), 12.0)
    mix, _, row = lines(view(now, before))
    assert mix[:3] == ["mini", "generation", "4"]
    assert row == ["server", "-", "4", "3", "1", "125", "whole"]


def test_each_replica_is_a_row_with_its_own_speed() -> None:
    before, now = Look(info(100, 7), 10.0), Look(info(200, 7, 0), 10.5)
    rows = lines(view(now, before))[2:]
    assert rows[0] == ["r0", "n", "4", "0", "2", "200", "whole"]
    assert rows[1] == ["r1", "n", "4", "1", "2", "0", "whole"]
    # New since the look before: nobody knows its speed.
    assert rows[2] == ["r2", "n", "4", "2", "2", "-", "DAMAGED"]


@pytest.mark.parametrize("before", [None, Look(info(500), 1.0)])
def test_a_speed_that_nobody_knows_is_no_number(before: Look | None) -> None:
    """At the first look, and where a replica has begun anew."""
    assert lines(view(Look(info(100), 2.0), before))[2][5] == "-"


def test_looks_are_as_far_apart_as_asked_for() -> None:
    now = 0.0
    waits: list[float] = []

    def ask() -> ServerInfo:
        nonlocal now
        now += 0.25
        return info(1)

    def wait(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    times = [look.time for look in islice(looks(ask, 1.0, lambda: now, wait), 4)]
    assert times == [0.25, 1.5, 2.75, 4.0]
    assert waits == [1.0, 1.0, 1.0]


def test_in_a_pipe_every_look_stands_below_the_one_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_looks(iter([Look(info(10), 1.0), Look(info(30), 2.0)]))
    printed = capsys.readouterr().out
    assert printed.count("RUNS ROWS") == 2
    assert [line.split()[5] for line in printed.splitlines() if line.startswith("r0")] == [
        "-",
        "20",
    ]
