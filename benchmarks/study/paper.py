"""What arXiv 2508.11985 reports, and what follows from its own figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.study.floor import random_floor
from benchmarks.study.statistics import Line, fit_line
from superpose_adapters.geometry import rms

_FILE = Path(__file__).with_name("paper.json")


@dataclass(frozen=True)
class Reported:
    """One row of the paper's Table 3 or 4.

    Attributes:
        terms: What is summed: domains, or `a+b` for a level-2 adapter.
        merged: Perplexity of the joint model.
        summed: Perplexity of the sum.
        change: The change in per cent, as printed.
        rms: RMS cosine, if it is given.
    """

    terms: frozenset[str]
    merged: float
    summed: float
    change: float
    rms: float | None

    @property
    def recomputed(self) -> float:
        """The change that follows from the two perplexities."""
        return 100 * (self.summed / self.merged - 1)


@cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    return facts


def _term(name: str) -> str:
    return "+".join(sorted(name.split("+")))


@cache
def pairs() -> tuple[Reported, ...]:
    """Return Table 3."""
    return tuple(_reported(row, "pair") for row in _facts()["table3_pairs"])


@cache
def triples() -> tuple[Reported, ...]:
    """Return Table 4."""
    return tuple(_reported(row, "sum_of") for row in _facts()["table4_triples"])


def _reported(row: dict[str, Any], terms: str) -> Reported:
    return Reported(
        frozenset(map(_term, row[terms])),
        row["ppl_merged"],
        row["ppl_summed"],
        row["change_percent"],
        row["rms"],
    )


def find(terms: Sequence[str]) -> Reported | None:
    """Return the paper's row of the same sum, or None."""
    wanted = frozenset(map(_term, terms))
    return next((row for row in (*pairs(), *triples()) if row.terms == wanted), None)


def cosines(first: str, second: str) -> list[list[float]] | None:
    """Return the paper's 12 x 3 cosines of two adapters (a level-2 one is `a+b`), or None."""
    wanted = {_term(first), _term(second)}
    if wanted == {"math", "medicine"}:
        table2: list[list[float]] = _facts()["table2_cosine_math_medicine"]["rows_by_layer"]
        return table2
    rows = _facts()["table5_cosine_level2_plus_third"]["rows_by_layer"]
    for at, third in enumerate(("finance", "medicine", "math")):
        pair = _term("+".join(sorted({"math", "medicine", "finance"} - {third})))
        if wanted == {third, pair}:
            return [row[3 * at : 3 * at + 3] for row in rows]
    return None


MODULE_TYPES = ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
"""The columns of `cosines`."""

MODULE_SIZES = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_proj": (3072, 768)}
"""(in, out) of GPT-2 Small's modules of each type; every type comes once a layer."""

RANK = 4
"""Of all its adapters."""


def floor(shared_rank: int | None = None) -> float:
    """Return the RMS cosine of random deltas of the paper's modules, from one A or not."""
    return rms(random_floor(*size, shared_rank) for size in MODULE_SIZES.values())


def table_rms(rows: Sequence[Sequence[float]]) -> float:
    """Return the RMS of a table of cosines."""
    return rms(value for row in rows for value in row)


def line() -> Line:
    """Return the line through Table 3, fitted by us."""
    fitted = fit_line(
        [row.rms for row in pairs() if row.rms is not None], [row.change for row in pairs()]
    )
    assert fitted is not None
    return fitted


def printed_line() -> tuple[float, float]:
    """Return slope and intercept as printed."""
    printed = _facts()["figure1_line"]
    return printed["slope"], printed["intercept"]


def errors() -> list[str]:
    """Return what is wrong in the paper, with the figures that show it."""
    wrong = [
        f"{' + '.join(sorted(row.terms))}: printed {row.change:+.2f} %, "
        f"from its perplexities {row.recomputed:+.2f} %"
        for row in triples()
        if abs(row.change - row.recomputed) >= 0.015
    ]
    foretold = [
        f"{line().at(row.rms):.1f} % against {row.recomputed:.1f} %"
        for row in triples()
        if row.rms is not None
    ]
    return [
        f"Table 4: {len(wrong)} of {len(triples())} changes do not follow from the perplexities in "
        f"the same row ({'; '.join(wrong)}). Table 3, the fitted line and the RMS values that its "
        "own tables allow to recompute are right.",
        "Equation (2): the indices are swapped. The rank-1 terms of B A are B[:, i] A[i, :], a "
        "column of B with a row of A.",
        "The level-2 blocks are counted among adapters of rank 2r. They are trained as adapters of "
        "rank 4, like all others.",
        f"Figure 1: the line goes through 3 points, which leaves 1 degree of freedom (R2 "
        f"{line().r2:.4f} says little then). Applied to Table 4 it foretells "
        f"{', '.join(foretold)}.",
        "Perplexities of 94 to 483 after tuning are far above what GPT-2 Small gives on such text, "
        "and no weighting of the three domains makes the merged models agree with one another. "
        "So signs, ratios and structure are what we compare, not absolute values.",
    ]
