"""Axes whose numbers can be read, and legends."""

from __future__ import annotations

from typing import Any

# A ratio of ends below which 1, 2 and 5 would leave an axis with one number or two.
_SHORT = 5.0


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 with plain numbers; a short one at every digit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    short = high < _SHORT * low
    axis.set_major_locator(LogLocator(subs=range(1, 10) if short else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: Any) -> None:
    """Label an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def legend(axes: Any, **options: Any) -> None:
    """Draw a legend, if there is anything to name: of a partial run there may be nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**({"frameon": False, "fontsize": 8} | options))
