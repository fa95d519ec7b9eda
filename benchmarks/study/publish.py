"""From results to what a reader gets: tables, pictures, HTML, Markdown, JSON and Parquet."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.study.document import Picture, Section
from benchmarks.study.front import Front, front
from benchmarks.study.page import html, markdown
from benchmarks.study.plan import needed_keys, needs_of, reportable
from benchmarks.study.results import Results
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace
from superpose_adapters.durable import write_file

_DPI = 110
_COLUMNS = ("key", "model", "mix", "domain", "part", "template", "row", "nats", "tokens")


def publish(study: Study, workspace: Workspace) -> str:
    """Write the report from what is there, and return where it is."""
    results = Results(study, workspace)
    sections = [experiment.section(study, results) for experiment in reportable(study, workspace)]
    first = front(study, sections, workspace)
    pictures = {each.name: render(each) for section in sections for each in section.pictures}
    out = workspace.out
    for name, data in pictures.items():
        write_file(out / "figures" / f"{name}.png", data)
    write_file(out / "report.html", html(first, sections, pictures).encode())
    write_file(out / "report.md", markdown(first, sections).encode())
    write_file(out / "results.json", _json(study, first, sections))
    _write_parquet(study, workspace, out / "losses.parquet")
    return str(out / "report.html")


def render(picture: Picture) -> bytes:
    """Return a picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=picture.size, layout="constrained")
    picture.draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _json(study: Study, first: Front, sections: Sequence[Section]) -> bytes:
    value = {
        "name": study.config.name,
        "config": asdict(study.config),
        "inputs": asdict(study.inputs),
        "machines": first.machines,
        "report_made_on": describe().as_json(),
        "not_run": first.not_run,
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "tables": [
                    {
                        "title": t.title,
                        "columns": list(t.columns),
                        "rows": [list(r) for r in t.rows],
                    }
                    for t in section.tables
                ],
                "claims": [
                    {"text": c.text, "verdict": c.verdict, "evidence": c.evidence}
                    for c in section.claims
                ],
                "data": section.data,
            }
            for section in sections
        ],
    }
    return (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """Return `value` as JSON has it: six digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _write_parquet(study: Study, workspace: Workspace, path: Path) -> None:
    """Write one line a row and model, of what the study needs now: all to look further."""
    import pyarrow
    import pyarrow.parquet

    experiments = reportable(study, workspace)
    names = {
        study.adapter_key(spec): spec.name
        for experiment in experiments
        for spec in needs_of(experiment, study).adapters()
    }
    needed = needed_keys(study, experiments)
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for record in workspace.losses:
        rows = workspace.rows.get(record["rows"])
        if record["key"] not in needed or rows is None:
            continue
        tokens = rows["tokens"] if rows["part"] == "test" else [sum(rows["tokens"])]
        model = " + ".join(f"{weight:g} x {names.get(key, key)}" for key, weight in record["mix"])
        # A model without a finite loss has rows without nats.
        found = record.get("nats", [None] * len(tokens))
        for at, (nats, count) in enumerate(zip(found, tokens, strict=True)):
            columns["key"].append(record["key"])
            columns["model"].append(model or "base")
            columns["mix"].append(json.dumps(record["mix"]))
            columns["domain"].append(rows["domain"])
            columns["part"].append(rows["part"])
            columns["template"].append(rows["template"])
            columns["row"].append(at)
            columns["nats"].append(nats)
            columns["tokens"].append(count)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
    write_file(path, buffer.getvalue())
