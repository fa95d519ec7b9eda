"""What a benchmark leaves behind: NAME-LABEL.json with every value, .md with tables, .png."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine, describe
from benchmarks.options import Options

Cell = str | float | int | None
# Takes a matplotlib figure, which is absent where matplotlib is, and draws into it.
Draw = Callable[[Any], None]


@dataclass(frozen=True)
class Table:
    """Rows under columns whose names state the units."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return the table; columns of numbers are aligned to the right."""
        shown = [[show(cell) for cell in row] for row in self.rows]
        right = [
            any(isinstance(row[at], float | int) for row in self.rows)
            for at in range(len(self.columns))
        ]
        lines = [
            _line(self.columns),
            _line(["---:" if number else "---" for number in right]),
            *(_line(row) for row in shown),
        ]
        return "\n".join([f"**{self.title}**", "", *lines])


@dataclass(frozen=True)
class Check:
    """Something that must hold, and whether it did."""

    text: str
    ok: bool


@dataclass
class Report:
    """One run of one benchmark.

    Attributes:
        name: The benchmark.
        label: What sets this run apart from others of it.
        settings: What was asked for.
        tables: The figures that a reader wants.
        checks: What must hold.
        notes: How to read them.
        data: Every value that was measured, as plain JSON values.
    """

    name: str
    label: str
    settings: dict[str, object]
    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)
    machine: Machine = field(default_factory=describe)

    @property
    def ok(self) -> bool:
        """True if everything holds that must."""
        return all(check.ok for check in self.checks)

    def markdown(self) -> str:
        """Return the report for a reader."""
        settings = ", ".join(f"{name} {show_any(value)}" for name, value in self.settings.items())
        parts = [f"## {self.name}: {self.label}", settings]
        parts += [table.markdown() for table in self.tables]
        if self.checks:
            parts.append(
                "\n".join(f"- {'holds' if c.ok else 'FAILS'}: {c.text}" for c in self.checks)
            )
        parts += self.notes
        parts.append(f"*{self.machine.caption}*")
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, object]:
        """Return the whole report as plain values; what is not finite becomes null."""
        return {
            "name": self.name,
            "label": self.label,
            "settings": self.settings,
            "machine": self.machine.as_json(),
            "tables": [
                {
                    "title": table.title,
                    "columns": list(table.columns),
                    "rows": [list(row) for row in table.rows],
                }
                for table in self.tables
            ],
            "checks": [vars(check) for check in self.checks],
            "notes": self.notes,
            "data": self.data,
        }

    def write(self, folder: Path, draw: Draw | None = None) -> None:
        """Write the files; without matplotlib there is no plot, and a line says so."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{self.name}-{self.label}"
        stem.with_name(f"{stem.name}.json").write_text(_dumps(self.as_json()))
        stem.with_name(f"{stem.name}.md").write_text(self.markdown())
        if draw is not None:
            _plot(self, stem.with_name(f"{stem.name}.png"), draw)

    def finish(self, options: Options, draw: Draw | None = None) -> int:
        """Write the files, print the report, and return the exit status: 1 if a check fails."""
        self.write(options.out, draw)
        print(_dumps(self.as_json()) if options.json else self.markdown())
        return 0 if self.ok else 1


# Smaller ones would be mostly zeros.
_TINY = 1e-5


def show(cell: Cell) -> str:
    """Return a cell as text: three digits that matter, tiny numbers as a power of ten."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    if cell == 0:
        return "0"
    if abs(cell) < _TINY:
        return f"{cell:.2e}"
    places = max(0, 2 - math.floor(math.log10(abs(cell)))) if math.isfinite(cell) else 0
    return f"{cell:.{places}f}"


def show_any(value: object) -> str:
    """Return a setting as text."""
    if isinstance(value, list | tuple):
        return "/".join(show_any(part) for part in value)
    return show(value) if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _dumps(value: dict[str, object]) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: floats with six digits, no NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _plot(report: Report, path: Path, draw: Draw) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no plot {path.name}: matplotlib is absent", file=sys.stderr)
        return
    figure = Figure(figsize=(9.0, 5.5), layout="constrained")
    draw(figure)
    figure.suptitle(f"{report.name}: {report.label}", x=0.01, ha="left", fontweight="bold")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    caption = "\n".join(textwrap.wrap(report.machine.caption, 110))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color="dimgray")
    figure.savefig(path, dpi=130)
