from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.machine import Machine, describe
from benchmarks.report import Check, Report, Table, show

MACHINE = Machine(
    cpu="A processor",
    cpu_features=("avx2",),
    cores=2,
    threads=2,
    memory_gib=24.0,
    gpu=None,
    system="Linux 6",
    versions={"python": "3.11", "torch": "2.13"},
    commit="abc",
    dirty=True,
    date="2026-01-02T03:04:05+00:00",
)


def report() -> Report:
    return Report(
        "fold",
        "here",
        {"model": "tiny", "seconds": 1.5},
        tables=[Table("Times", ("what", "ms", "n"), [["a", 1.23456, 3], ["b", math.nan, None]])],
        checks=[Check("it holds", True)],
        notes=["A note."],
        data={"a": [0.123456789, math.inf], "path": [Path("x").name]},
        machine=MACHINE,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.0123"),
        (0.0, "0"),
        (-2.0, "-2.00"),
        (math.nan, "-"),
        (None, "-"),
        (7, "7"),
        ("x", "x"),
    ],
)
def test_a_cell_shows_three_digits(value: Any, text: str) -> None:
    assert show(value) == text


def test_the_markdown_has_everything_a_reader_needs() -> None:
    text = report().markdown()
    assert "| what | ms | n |\n| --- | ---: | ---: |\n| a | 1.23 | 3 |\n| b | - | - |" in text
    assert "model tiny, seconds 1.50" in text
    assert "- holds: it holds" in text
    assert "A note." in text
    assert "A processor, 2 cores, 2 threads; python 3.11 torch 2.13; commit abc (changed)" in text


def test_the_json_is_plain_and_has_no_nan(tmp_path: Path) -> None:
    report().write(tmp_path)
    read = json.loads((tmp_path / "fold-here.json").read_text())
    assert read["data"] == {"a": [0.123457, None], "path": ["x"]}
    assert read["tables"][0]["rows"] == [["a", 1.23456, 3], ["b", None, None]]
    assert read["machine"]["commit"] == "abc"
    assert read["checks"] == [{"text": "it holds", "ok": True}]


def test_a_plot_is_written_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def draw(figure: Any) -> None:
        figure.subplots().plot([1, 2], [3, 4])

    report().write(tmp_path, draw)
    assert (tmp_path / "fold-here.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report().write(tmp_path, lambda figure: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fold-here.json", "fold-here.md"]
    assert "matplotlib is absent" in capsys.readouterr().err


def test_a_check_that_fails_makes_the_report_fail() -> None:
    failing = report()
    failing.checks.append(Check("it does not", False))
    assert not failing.ok
    assert "- FAILS: it does not" in failing.markdown()


def test_the_machine_is_described_without_its_folders() -> None:
    described = json.dumps(describe().as_json())
    assert '"torch"' in described
    assert str(Path.home()) not in described
    assert str(Path(__file__).parents[2]) not in described
