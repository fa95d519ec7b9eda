"""Fitted weights of a bundled base's three domains, against every point of a grid.

The rows are the bundle's held-out ones, of all domains together. `fit` holds a third of them out;
the grid is scored on the same two parts, so that what a search of a few dozen mixes misses can be
told from what the rows do not tell at all.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.serverprocess import ServerProcess
from superpose_adapters.bundled import BUNDLES, DOMAINS, Bundle
from superpose_adapters.qa import read_rows
from superpose_client import Client, FitResult, ItemScore, format_mix

Pair = tuple[str, str]
Weights = dict[str, float]

_MAX_LENGTH = 64
_MOST_SECONDS = 60.0
_MOST_EXCESS = 0.01  # of the best loss of the grid


def rows_of(bundle: Bundle, most: int) -> dict[str, list[Pair]]:
    """Return the first rows of each domain, {domain: (question, answer) pairs}."""
    return {
        domain: [(row.question, row.answer) for row in read_rows(bundle.held_out(domain))[:most]]
        for domain in DOMAINS
    }


def grid(step: float) -> list[Weights]:
    """Return every mix of the domains with weights from 0 to 1 in steps."""
    count = round(1 / step)
    levels = [round(level / count, 6) for level in range(count + 1)]
    return [
        dict(zip(DOMAINS, point, strict=True))
        for point in itertools.product(levels, repeat=len(DOMAINS))
    ]


def score_all(
    client: Client, texts: Sequence[Pair], mixes: Sequence[Weights], tell: Tell
) -> list[tuple[ItemScore, ...]]:
    """Return what each text scores under each mix."""
    at_once = client.info().limits.max_score_rows // len(texts)
    found: list[tuple[ItemScore, ...]] = []
    for start in range(0, len(mixes), at_once):
        tell(f"the grid, {start} of {len(mixes)} mixes")
        part = [
            {domain: weight for domain, weight in mix.items() if weight}
            for mix in mixes[start : start + at_once]
        ]
        scored = client.score(texts, mixes=part, max_length=_MAX_LENGTH)
        found += [block.items for block in scored.mixes]
    return found


def mean_loss(items: Sequence[ItemScore]) -> float:
    """Return the mean over the tokens of some texts, nats a token."""
    return -sum(item.logprob for item in items) / sum(item.tokens for item in items)


def fit(client: Client, texts: Sequence[Pair], domain_of: Sequence[str]) -> tuple[FitResult, float]:
    """Return fitted weights, and the seconds that they took."""
    started = time.perf_counter()
    sources = map(DOMAINS.index, domain_of)
    *_, last = client.fit(texts, DOMAINS, max_length=_MAX_LENGTH, sources=sources)
    assert last.result is not None
    return last.result, time.perf_counter() - started


def measure(options: Options, rows: int, step: float, tell: Tell) -> Report:
    """Fit, and score the grid."""
    by_domain = rows_of(BUNDLES[options.model], rows)
    texts = [pair for pairs in by_domain.values() for pair in pairs]
    domain_of = [domain for domain, pairs in by_domain.items() for _ in pairs]
    settings = options.settings(rows=len(texts), max_length=_MAX_LENGTH, step=step)
    report = Report("fit", options.label, settings)
    with (
        ServerProcess(Path(options.model), None, options.server_flags()) as server,
        Client(server.address) as client,
    ):
        tell("the fit")
        fitted, seconds = fit(client, texts, domain_of)
        mixes = grid(step)
        scores = score_all(client, texts, mixes, tell)
    held_out = set(fitted.held_out)
    fitted_on = [
        mean_loss([item for place, item in enumerate(items) if place not in held_out])
        for items in scores
    ]
    not_on = [mean_loss([items[place] for place in fitted.held_out]) for items in scores]
    best = min(range(len(mixes)), key=fitted_on.__getitem__)
    best_held_out = min(range(len(mixes)), key=not_on.__getitem__)
    report.tables += [
        _held_out(fitted, domain_of),
        Table(
            "The search and the grid",
            ("", "mixes scored", "weights", "fitted on, nats a token", "held out"),
            [
                [
                    "fit",
                    fitted.evaluations,
                    format_mix(fitted.mix.weights),
                    fitted.candidates[0].fitted_loss,
                    fitted.candidates[0].held_out_loss.value,
                ],
                _grid_row("best of the grid", mixes, best, fitted_on, not_on),
                _grid_row("best of the grid, held out", mixes, best_held_out, fitted_on, not_on),
            ],
        ),
    ]
    half = next(
        candidate
        for candidate in fitted.candidates
        if candidate.mix.weights == dict.fromkeys(DOMAINS, 0.5)
    )
    first = fitted.candidates[0]
    excess = first.fitted_loss / fitted_on[best] - 1
    report.checks += [
        Check(
            f"held out, the fitted weights lose no more than half of each "
            f"({first.held_out_loss.value:.4f}, {half.held_out_loss.value:.4f})",
            first.held_out_loss.value <= half.held_out_loss.value,
        ),
        Check(
            f"they lose at most {_MOST_EXCESS:.0%} more than the best of the grid ({excess:+.2%})",
            excess <= _MOST_EXCESS,
        ),
        Check(
            f"the fit takes less than {_MOST_SECONDS:.0f} s ({seconds:.1f})",
            seconds < _MOST_SECONDS,
        ),
    ]
    report.data |= {
        "fit_seconds": seconds,
        "evaluations": fitted.evaluations,
        "warnings": list(fitted.warnings),
        "grid": [
            {"weights": mix, "fitted": on, "held_out": off}
            for mix, on, off in zip(mixes, fitted_on, not_on, strict=True)
        ],
    }
    return report


def _held_out(fitted: FitResult, domain_of: Sequence[str]) -> Table:
    """Return what each mix loses on the held-out rows, of all domains and of each."""
    rows: list[list[Cell]] = []
    for candidate in fitted.candidates:
        items = dict(zip(fitted.held_out, candidate.held_out_items, strict=True))
        of_domains = [
            [item for place, item in items.items() if domain_of[place] == domain]
            for domain in DOMAINS
        ]
        loss = candidate.held_out_loss
        rows.append(
            [
                format_mix(candidate.mix.weights),
                loss.value,
                f"{loss.low:.3f} to {loss.high:.3f}",
                *(mean_loss(each) if each else None for each in of_domains),
            ]
        )
    columns = ("mix", "all", "95 %", *DOMAINS)
    return Table(f"Loss on {len(fitted.held_out)} held-out rows, nats a token", columns, rows)


def _grid_row(
    name: str,
    mixes: Sequence[Weights],
    place: int,
    fitted_on: Sequence[float],
    not_on: Sequence[float],
) -> list[Cell]:
    weights = format_mix({name: weight for name, weight in mixes[place].items() if weight})
    return [name, len(mixes), weights, fitted_on[place], not_on[place]]


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("fit", "Fit weights, and score every point of a grid.", seconds=600)
    parser.set_defaults(model="mini")
    parser.add_argument("--rows", type=int, default=48, help="rows of each domain, at most 48")
    parser.add_argument("--step", type=float, default=0.1, help="of the grid from 0 to 1")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    if options.model not in BUNDLES:
        parser.error(f"--model {options.model} has no held-out rows: use {' or '.join(BUNDLES)}")
    if not 0 < parsed.step <= 1 or abs(round(1 / parsed.step) * parsed.step - 1) > 1e-9:
        parser.error(f"--step {parsed.step} is no part of 1: use 0.1 or 0.5")
    with progress("fit", options.seconds) as tell:
        report = measure(options, parsed.rows, parsed.step, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
