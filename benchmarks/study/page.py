"""The report as Markdown and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.report import Table, show
from benchmarks.study.document import Section
from benchmarks.study.front import Front
from benchmarks.study.verdict import Verdict

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Liberation Sans", Arial, sans-serif; color: #222;
  max-width: 1100px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; }
h2 { margin-top: 2.6rem; border-bottom: 2px solid #1f4e79; padding-bottom: .2rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
nav { font-size: .9rem; margin: 1rem 0; }
nav a { margin-right: 1rem; color: #1f4e79; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .3rem 0 1rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
th { border-bottom: 2px solid #999; font-weight: 600; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.holds { color: #2f6b3c; font-weight: 600; white-space: nowrap; }
td.fails { color: #a33b22; font-weight: 600; white-space: nowrap; }
td.open { color: #777; white-space: nowrap; }
tr.paper td { background: #f3f0e6; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .86rem; color: #555; max-width: 60rem; }
.warning { background: #fdf4e3; border-left: 4px solid #b8902b; padding: .6rem 1rem; }
.warning ul { margin: .3rem 0; padding-left: 1.2rem; }
dt { font-weight: 600; float: left; clear: left; margin-right: .6rem; }
dd { margin: 0 0 .3rem; }
pre { background: #f6f6f6; padding: .8rem; font-size: .78rem; overflow-x: auto; }
footer { margin-top: 3rem; color: #666; font-size: .8rem; }
"""

_VERDICTS = {
    Verdict.HOLDS.value: "holds",
    Verdict.FAILS.value: "fails",
    Verdict.OPEN.value: "open",
    Verdict.NOT_RUN.value: "open",
}
# What Markdown would not print as it stands, such as a template's <tag>.
_SPECIAL = re.compile(r"([\\`*_<>])")


def markdown(front: Front, sections: Sequence[Section]) -> str:
    """Return the report as Markdown; pictures lie in figures/ beside it."""
    parts = [f"# {_text(front.title)}", *map(_text, front.lead)]
    parts += ["## Summary", *map(_text, front.summary), _table(front.claims)]
    parts += ["## What was not run", _list(front.not_run)]
    parts += ["## Words", "\n".join(f"- **{_text(w)}**: {_text(m)}" for w, m in front.words)]
    parts += ["## What the paper leaves open", _list(front.choices)]
    for section in sections:
        parts += [f"## {_text(section.title)}", *map(_text, section.text)]
        parts += [_table(table) for table in section.tables if table.rows]
        for picture in section.pictures:
            caption = _text(picture.caption)
            parts.append(f"![{caption}](figures/{picture.name}.png)\n\n*{caption}*")
        parts += map(_text, section.notes)
    parts += ["## Errors in the paper", _list(front.errors)]
    parts += ["## How it was run", _table(front.times), _list(front.machines)]
    parts += ["Every option:", f"```json\n{front.options}\n```"]
    return "\n\n".join(parts) + "\n"


def html(front: Front, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """Return the report as one page; `pictures` holds PNG by name."""
    links = [
        ("words", "Words"),
        ("choices", "What the paper leaves open"),
        *((s.name, s.title) for s in sections),
        ("paper", "Errors in the paper"),
        ("run", "How it was run"),
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(front.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(front.title)}</h1>",
        *(f"<p>{escape(each)}</p>" for each in front.lead),
        '<h2 id="summary">Summary</h2>',
        *(f"<p>{escape(each)}</p>" for each in front.summary),
        f'<div class="warning"><strong>What was not run</strong>{_html_list(front.not_run)}</div>',
        _html_table(front.claims),
        "<nav>" + "".join(f'<a href="#{n}">{escape(t)}</a>' for n, t in links) + "</nav>",
        '<h2 id="words">Words</h2>',
        "<dl>"
        + "".join(f"<dt>{escape(w)}</dt><dd>{escape(m)}</dd>" for w, m in front.words)
        + "</dl>",
        '<h2 id="choices">What the paper leaves open</h2>',
        _html_list(front.choices),
    ]
    for section in sections:
        parts.append(f'<h2 id="{section.name}">{escape(section.title)}</h2>')
        parts += [f"<p>{escape(each)}</p>" for each in section.text]
        parts += [_html_table(table) for table in section.tables if table.rows]
        for picture in section.pictures:
            data = base64.b64encode(pictures[picture.name]).decode()
            parts.append(
                f'<figure><img alt="{escape(picture.caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
            )
        parts += [f"<p>{escape(each)}</p>" for each in section.notes]
    parts += [
        '<h2 id="paper">Errors in the paper</h2>',
        _html_list(front.errors),
        '<h2 id="run">How it was run</h2>',
        _html_table(front.times),
        _html_list(front.machines),
        f"<details><summary>Every option</summary><pre>{escape(front.options)}</pre></details>",
        "<footer>Made by python -m benchmarks.study report</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Return plain text as Markdown that shows it as it stands."""
    return _SPECIAL.sub(r"\\\1", text)


def _table(table: Table) -> str:
    """Return a table whose cells and columns show as they stand."""
    rows = [[_text(cell) if isinstance(cell, str) else cell for cell in r] for r in table.rows]
    return Table(_text(table.title), [_text(c) for c in table.columns], rows).markdown()


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_text(line)}" for line in lines)


def _html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _html_table(table: Table) -> str:
    numbers = [
        any(isinstance(row[at], float | int) for row in table.rows)
        for at in range(len(table.columns))
    ]
    head = "".join(
        f'<th class="{_kind(number)}">{escape(column)}</th>'
        for column, number in zip(table.columns, numbers, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = []
        for at, (cell, number) in enumerate(zip(row, numbers, strict=True)):
            kind = _kind(number)
            if at == 0 and isinstance(cell, str):
                kind = _VERDICTS.get(cell, kind)
            cells.append(f'<td class="{kind}">{escape(show(cell))}</td>')
        of_paper = ' class="paper"' if "paper" in row[:2] else ""
        rows.append(f"<tr{of_paper}>{''.join(cells)}</tr>")
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _kind(number: bool) -> str:
    return "number" if number else ""
