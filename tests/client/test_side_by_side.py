import io
import unicodedata

import pytest
from rich.console import Console
from rich.text import Text

from superpose_client.side_by_side import GrowingText, SideBySide

WIDE = "日本語のテキストはとても長いので折り返されるべきです。"
COMBINED = "Cafe\u0301 a\u0300 la\u0300 cre\u0300me, " * 4
LONG = "supercalifragilisticexpialidocious"


def drawn(
    *texts: GrowingText, width: int = 80, height: int = 24, cut: bool = False, color: bool = False
) -> str:
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        height=height,
        color_system="standard" if color else None,
        force_terminal=color,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(SideBySide(texts, cut=cut))
    return file.getvalue()


def text(heading: str, content: str, ended: bool = True, foot: str = "") -> GrowingText:
    return GrowingText(heading, content, ended, Text(foot))


def cells(line: str) -> int:
    """The width of a line after Unicode's own tables."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in line
    )


def columns(shown: str, width: int) -> tuple[str, str]:
    """What stands left and right of a place, in cells; no character may lie across it."""
    left, right = "", ""
    for line in shown.splitlines():
        used = 0
        for character in line:
            if used < width:
                left += character
            else:
                right += character
            used += cells(character)
            assert not (used - cells(character) < width < used)
        left += "\n"
        right += "\n"
    return left, right


@pytest.mark.parametrize("content", [WIDE, COMBINED, LONG, f"{WIDE} {COMBINED}\n\n{LONG}"])
@pytest.mark.parametrize("width", [40, 57, 80])
def test_columns_are_as_wide_as_their_characters(content: str, width: int) -> None:
    shown = drawn(text("base", content), text("math", f"x {content}"), width=width)
    assert max(map(cells, shown.splitlines())) <= width - 2
    left, right = columns(shown, (width - 2 - 2) // 2 + 2)
    assert "".join(left.split()) == "base" + "".join(content.split())
    assert "".join(right.split()) == "mathx" + "".join(content.split())


@pytest.mark.parametrize("width", [12, 30, 39])
def test_where_columns_would_be_narrow_a_text_stands_below_the_other(width: int) -> None:
    shown = drawn(text("base", f"one {WIDE}"), text("math", "two"), width=width)
    assert max(map(cells, shown.splitlines())) <= width
    lines = shown.splitlines()
    assert lines[0] == "base"
    assert lines[-3:] == ["", "math", "two"]


def test_a_mix_that_is_longer_than_its_column_is_shown_whole() -> None:
    mix = "math=1,medicine=0.5,finance=-0.25"
    left, _ = columns(drawn(text(mix, "one"), text("base", "two"), width=40), 20)
    assert "".join(left.split()) == f"{mix}one"


@pytest.mark.parametrize("width", [80, 30])
def test_what_is_cut_is_the_beginning_of_the_texts(width: int) -> None:
    content = "\n".join(f"line{i}" for i in range(50))
    shown = drawn(
        text("base", content, foot="[end]"), text("math", content), width=width, height=12, cut=True
    )
    lines = [line.split() for line in shown.splitlines()]
    assert len(lines) <= 12
    words = [word for line in lines for word in line]
    assert [word for word in words if words.count(word) == 1][:1] == ["base"]
    assert {"base", "math", "line49", "[end]"} <= set(words)
    assert "line0" not in words


MARK = "\x1b[1;33m"


def marked(shown: str) -> list[str]:
    return [part.split("\x1b")[0] for part in shown.split(MARK)[1:]]


def test_the_words_that_differ_are_marked() -> None:
    one, other = text("base", "a man and a dog"), text("math", "a man or a dog too")
    assert sorted(marked(drawn(one, other, color=True))) == ["and", "or", "too"]


def test_words_that_a_text_has_not_come_to_are_not_marked() -> None:
    whole = text("base", "a man and a dog")
    for content, expected in (
        ("a man", []),
        ("a man a", []),  # May become "and" yet.
        ("a man an", []),
        ("a man or a", ["and", "or"]),
    ):
        growing = text("math", content, ended=False)
        assert sorted(marked(drawn(whole, growing, color=True))) == expected
    assert sorted(marked(drawn(whole, text("math", "a man"), color=True))) == ["a", "and", "dog"]


def test_no_control_character_of_a_text_reaches_the_terminal() -> None:
    shown = drawn(text("base", "5\x1b[2J\x07.\x9b3m"), text("math", "\r6"))
    assert shown.splitlines()[1].split() == ["5[2J.3m", "6"]
