"""How far a stage is and how long it will still take, on stderr: a bar, or lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float, str], None]
"""Takes how much more is done, and what is done next."""

# Between two lines in a log.
_LINE_SECONDS = 15.0


@contextmanager
def steps(name: str, total: float) -> Iterator[Advance]:
    """Show how much of `total` is done; yield how to tell of more."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn(f"[bold]{name}[/bold]"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda more, text: bar.update(task, advance=more, description=text)
        return
    began = time.monotonic()
    done = 0.0
    told = -_LINE_SECONDS

    def line(more: float, text: str) -> None:
        nonlocal done, told
        done += more
        elapsed = time.monotonic() - began
        if elapsed - told >= _LINE_SECONDS or done >= total:
            told = elapsed
            left = f", {duration(elapsed * (total - done) / done)} left" if done else ""
            share = done / total if total else 1.0
            console.print(f"{name}: {share:.0%}{left}; {text}", soft_wrap=True, highlight=False)

    yield line


def duration(seconds: float) -> str:
    """Return a time for a reader."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
