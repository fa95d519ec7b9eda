"""How far a benchmark is, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Tell = Callable[[str], None]

# Between two lines in a log.
_LINE_SECONDS = 10.0


@contextmanager
def progress(name: str, seconds: float) -> Iterator[Tell]:
    """Show the progress of benchmark `name`, which takes about `seconds`; yield how to tell it."""
    console = Console(stderr=True)
    started = time.monotonic()
    if not console.is_terminal:
        told = -_LINE_SECONDS

        def line(text: str) -> None:
            nonlocal told
            elapsed = time.monotonic() - started
            if elapsed - told >= _LINE_SECONDS:
                told = elapsed
                console.print(f"{name}: {text} ({elapsed:.0f} of {seconds:.0f} s)", soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn(f"[bold]{name}[/bold]"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn(f"of {seconds:.0f} s"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=seconds)

        def update(text: str) -> None:
            bar.update(task, completed=time.monotonic() - started, description=text)

        yield update
