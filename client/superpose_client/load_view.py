"""What a server is doing, looked at again and again: `adapterctl top`."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.live import Live

from superpose_client.mix import format_mix
from superpose_client.results import ServerInfo
from superpose_client.screens import Rows, show


@dataclass(frozen=True)
class Look:
    """One look at a server.

    Attributes:
        info: What it said.
        time: When, in seconds of any one clock.
    """

    info: ServerInfo
    time: float


def looks(
    ask: Callable[[], ServerInfo],
    every: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Look]:
    """Ask what a server is doing, once in `every` seconds, for ever."""
    while True:
        look = Look(ask(), clock())
        yield look
        wait(max(0.0, look.time + every - clock()))


def show_looks(found: Iterator[Look]) -> None:
    """Show each look in the place of the one before; where that is no terminal, below it."""
    before: Look | None = None
    if not sys.stdout.isatty():
        for now in found:
            show(view(now, before))
            sys.stdout.flush()
            before = now
        return
    with Live(auto_refresh=False, screen=True) as live:
        for now in found:
            live.update(view(now, before), refresh=True)
            before = now


def view(now: Look, before: Look | None) -> RenderableType:
    """Return what to show: the mix, and a row for each process that runs rows.

    Tokens a second are those since the look `before`, without which nobody knows them.
    """
    info = now.info
    table = Rows("RUNS ROWS", "NODE", ">GENERATION", ">RUNNING", ">WAITING", ">TOKENS/S", "WEIGHTS")
    for name, node, generation, running, waiting, tokens, intact in _engines(info):
        table.add_row(
            name,
            node,
            generation,
            str(running),
            str(waiting),
            _speed(name, tokens, now, before),
            "whole" if intact else "DAMAGED",
        )
    mix = f"{info.base}  generation {info.mix.generation}  {format_mix(info.mix.weights)}"
    return Group(mix, table)


def _engines(info: ServerInfo) -> list[tuple[str, str, str, int, int, int, bool]]:
    if not info.replicas:
        server = (info.running, info.waiting, info.generated_tokens, info.weights_intact)
        return [("server", "-", str(info.mix.generation), *server)]
    return [
        (
            each.name,
            each.node,
            "-" if each.generation is None else str(each.generation),
            each.running,
            each.waiting,
            each.generated_tokens,
            each.weights_intact,
        )
        for each in info.replicas
    ]


def _speed(name: str, tokens: int, now: Look, before: Look | None) -> str:
    if before is None or now.time <= before.time:
        return "-"
    earlier = {engine[0]: engine[5] for engine in _engines(before.info)}
    if name not in earlier or tokens < earlier[name]:  # It is new, or has begun anew.
        return "-"
    return f"{(tokens - earlier[name]) / (now.time - before.time):,.0f}"
