"""Texts beside each other on a terminal, drawn anew while they grow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from superpose_client.control_characters import without_control_characters
from superpose_client.differences import differing_words, word_spans

_GAP = 2  # cells between columns
# Cells at the right that stay free, because a terminal echoes Ctrl-C as ^C where the cursor is; a
# line that this breaks would not be wiped away.
_MARGIN = 2
_NARROWEST = 18  # cells; columns that would be narrower stand one below the other
_DIFFERS = "bold yellow"


@dataclass
class GrowingText:
    """One text: what stands above it, and below it once it has ended."""

    heading: str
    text: str = ""
    ended: bool = False
    foot: Text = field(default_factory=Text)


@contextmanager
def drawn_side_by_side(texts: Sequence[GrowingText]) -> Iterator[None]:
    """Draw the texts while the block runs, their last lines if there is no room for all.

    However it ends, all that has come of them is printed then. Standard output is a terminal.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    drawing = Live(
        SideBySide(texts, cut=True), console=console, transient=True, refresh_per_second=8
    )
    try:
        with drawing:
            yield
    finally:
        if any(each.text for each in texts):
            console.print(SideBySide(texts))


class SideBySide:
    """Texts in columns with the words marked that differ.

    Lines are broken by the cells that characters fill. With `cut`, what does not fit into the
    height of the terminal is left out: of each text the first lines below its heading.
    """

    def __init__(self, texts: Sequence[GrowingText], *, cut: bool = False) -> None:
        """Show these texts, as they are when the screen is drawn."""
        self._texts = texts
        self._cut = cut

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the columns, or what stands for them."""
        count = len(self._texts)
        whole = max(1, options.max_width - _MARGIN)
        width = (whole - _GAP * (count - 1)) // count
        beside = width >= _NARROWEST
        if not beside:
            width = whole
        height = None
        if self._cut:
            height = options.max_height if beside else options.max_height // count - 1
        blocks = [
            _block(console, each, text, width, height)
            for each, text in zip(self._texts, _marked(self._texts), strict=True)
        ]
        if beside:
            table = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
            for _ in blocks:
                table.add_column(width=width)
            table.add_row(*blocks)
            yield table
        else:
            for number, block in enumerate(blocks):
                if number > 0:
                    yield ""
                yield block


def _block(console: Console, each: GrowingText, text: Text, width: int, height: int | None) -> Text:
    """Return heading, text and foot, broken into lines of `width`; the last ones if cut."""
    head = list(Text(each.heading, style="bold").wrap(console, width))
    body = [*text.wrap(console, width), *(each.foot.wrap(console, width) if each.foot else ())]
    if height is not None:
        room = max(1, height - len(head))
        body = body[-room:]
    return Text("\n").join([*head, *body])


def _marked(texts: Sequence[GrowingText]) -> list[Text]:
    """Return the texts with the words styled that differ.

    While a text still grows, words that it has not come to are no difference yet.
    """
    plain = [without_control_characters(each.text) for each in texts]
    spans = [word_spans(text) for text in plain]
    # The last word of a text that grows may be the beginning of one.
    growing = [max(0, len(s) - 1) for s, each in zip(spans, texts, strict=True) if not each.ended]
    if growing:
        spans = [each[: min(growing)] for each in spans]
    words = [
        [text[begin:end] for begin, end in each] for text, each in zip(plain, spans, strict=True)
    ]
    marked = []
    for text, places, differing in zip(plain, spans, differing_words(words), strict=True):
        styled = Text(text)
        for index in differing:
            styled.stylize(_DIFFERS, *places[index])
        marked.append(styled)
    return marked
