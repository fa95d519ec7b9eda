from __future__ import annotations

import math

import pytest
from benchmarks.study import paper


def test_rms_follows_from_the_papers_own_tables() -> None:
    for first, second in (
        ("math", "medicine"),
        ("math+medicine", "finance"),
        ("finance+math", "medicine"),
        ("finance+medicine", "math"),
    ):
        cosines = paper.cosines(first, second)
        reported = paper.find([first, second])
        assert cosines is not None
        assert reported is not None
        assert len(cosines) == 12
        assert paper.table_rms(cosines) == pytest.approx(reported.rms, abs=5e-5)


def test_one_module_type_carries_the_papers_rms() -> None:
    squares = dict.fromkeys(paper.MODULE_TYPES, 0.0)
    for first, second in (
        ("math", "medicine"),
        ("math+medicine", "finance"),
        ("finance+math", "medicine"),
        ("finance+medicine", "math"),
    ):
        for row in paper.cosines(first, second) or ():
            for name, value in zip(paper.MODULE_TYPES, row, strict=True):
                squares[name] += value**2
    assert squares["mlp.c_proj"] / sum(squares.values()) == pytest.approx(0.96, abs=0.01)


def test_the_line_is_the_papers() -> None:
    slope, intercept = paper.printed_line()
    line = paper.line()
    assert line.slope == pytest.approx(slope, abs=0.01)
    assert line.intercept == pytest.approx(intercept, abs=0.005)
    assert line.r2 == pytest.approx(0.99966, abs=1e-5)


def test_changes_recomputed() -> None:
    for row in paper.pairs():
        assert row.recomputed == pytest.approx(row.change, abs=0.015)
    assert [round(row.recomputed, 2) for row in paper.triples()] == [49.72, 86.69, 51.94, 103.78]


def test_the_errors_have_their_figures() -> None:
    errors = paper.errors()
    assert errors[0].startswith("Table 4: 3 of 4 changes")
    assert "28.8 % against 86.7 %, 49.6 % against 51.9 %, 58.6 % against 103.8 %" in errors[3]


def test_names_in_any_order() -> None:
    assert paper.find(["medicine", "math"]) is paper.find(["math", "medicine"])
    assert paper.find(["medicine+math", "finance"]) is paper.find(["math+medicine", "finance"])
    assert paper.find(["birds", "math"]) is None
    assert paper.cosines("birds", "math") is None


def test_the_floors_of_the_papers_modules() -> None:
    # 36 modules of three sizes, from d_in and d_out as GPT-2 Small has them.
    apart = (1 / (768 * 2304) + 1 / (768 * 768) + 1 / (3072 * 768)) / 3
    together = (1 / (4 * 2304) + 2 / (4 * 768)) / 3
    assert paper.floor() == pytest.approx(math.sqrt(apart))
    assert paper.floor() == pytest.approx(0.00095, abs=5e-6)
    assert paper.floor(paper.RANK) == pytest.approx(math.sqrt(together))
