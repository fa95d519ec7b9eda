"""What a decode step costs, in process, against everything that may make it dearer.

Sweeps:
    loaded: adapters that are loaded, none of them used.
    mixes: distinct mixes in a batch of 32 rows, three domains each.
    domains: domains a mix, every row of a batch of 8 another mix.
    rank: rank of the adapters, every row of a batch of 8 another mix of three.
    streams: rows in the batch, under the resident mix and every row under another.

The base is resident, so that a row under any other mix is corrected.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.inprocess import Local
from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.shapes import Group, adapter_folder, base_folder, prompts
from benchmarks.target import Weights
from superpose_server.control.registry import Registered, Registry

PROMPT_TOKENS = 32
# Room for the prompt, the measured steps, and what early rows make while others are prefilled.
MAX_LENGTH = 256
RANK = 4
DOMAINS = 24
LOADED = (1, 8, 64, 512)
MIXES = (0, 1, 2, 4, 8, 16, 32)
DOMAINS_A_MIX = (0, 1, 2, 4, 8)
RANKS = (4, 8, 16, 32, 64)
STREAMS = (1, 2, 4, 8, 16, 32, 64)
ROWS = 8
MIXED_ROWS = 32
DOMAINS_IN_MIX = 3

# What the first value of a sweep is called where it is not a number.
RESIDENT = "resident"


class Sweeps:
    """Makes the contestants of each sweep on one engine."""

    def __init__(self, local: Local, texts: list[list[int]], steps: int, loaded: list[int]) -> None:
        """Measure `steps` decode steps at a time."""
        self._local = local
        self._texts = texts
        self._steps = steps
        self._loaded = loaded
        self._domains = Group(DOMAINS).names

    def all(self) -> dict[str, Callable[[], dict[str, Measure]]]:
        """Return {sweep: makes its contestants}; the first of each is its baseline."""
        return {
            "loaded": self._sweep_loaded,
            "mixes": self._sweep_mixes,
            "domains": self._sweep_domains,
            "rank": self._sweep_rank,
            "streams": self._sweep_streams,
        }

    def _steps_of(self, mixes: list[Weights]) -> float:
        bound = [self._local.bind(mix) for mix in mixes]
        return self._local.step_seconds(self._texts[: len(bound)], bound, steps=self._steps)

    def _sweep_loaded(self) -> dict[str, Measure]:
        registry = self._local.runtime.registry
        everything = registry.all()

        def contestant(count: int) -> Measure:
            def measure() -> float:
                with _only(registry, everything, count):
                    return self._steps_of([{}] * ROWS)

            return measure

        return {str(count): contestant(count) for count in self._loaded}

    def _sweep_mixes(self) -> dict[str, Measure]:
        def contestant(count: int) -> Measure:
            mixes = random_mixes(self._domains, max(1, count), DOMAINS_IN_MIX)
            rows = [mixes[row % len(mixes)] if count else {} for row in range(MIXED_ROWS)]
            return lambda: self._steps_of(rows)

        return {str(count) if count else RESIDENT: contestant(count) for count in MIXES}

    def _sweep_domains(self) -> dict[str, Measure]:
        def contestant(count: int) -> Measure:
            rows = random_mixes(self._domains, ROWS, count) if count else [{}] * ROWS
            return lambda: self._steps_of(rows)

        return {str(count) if count else RESIDENT: contestant(count) for count in DOMAINS_A_MIX}

    def _sweep_rank(self) -> dict[str, Measure]:
        def contestant(rank: int) -> Measure:
            rows = random_mixes(rank_group(rank).names, ROWS, DOMAINS_IN_MIX)
            return lambda: self._steps_of(rows)

        def resident() -> float:
            return self._steps_of([{}] * ROWS)

        return {RESIDENT: resident, **{str(rank): contestant(rank) for rank in RANKS}}

    def _sweep_streams(self) -> dict[str, Measure]:
        def contestant(mixes: list[Weights]) -> Measure:
            return lambda: self._steps_of(mixes)

        contestants: dict[str, Measure] = {}
        for rows in STREAMS:
            mixed = random_mixes(self._domains, rows, DOMAINS_IN_MIX)
            contestants[f"{rows} {RESIDENT}"] = contestant([{}] * rows)
            contestants[f"{rows} mixed"] = contestant(mixed)
        return contestants


def rank_group(rank: int) -> Group:
    """Return the adapters of one rank that the sweep over ranks mixes."""
    return Group(DOMAINS_IN_MIX, rank, f"rank{rank}")


def random_mixes(domains: list[str], count: int, size: int) -> list[Weights]:
    """Return `count` different mixes of `size` domains each, with weights of one digit."""
    draw = random.Random(count * 100 + size)
    return [
        {domain: draw.choice((0.5, 0.7, 1.0)) + row / 1000 for domain in draw.sample(domains, size)}
        for row in range(count)
    ]


@contextmanager
def _only(registry: Registry, everything: list[Registered], count: int) -> Iterator[None]:
    """Leave no more than `count` adapters loaded."""
    for registered in everything[count:]:
        registry.remove(registered.domain)
    try:
        yield
    finally:
        for registered in everything[count:]:
            registry.put(registered)


def measure(
    options: Options, names: list[str], loaded: list[int], steps: int, tell: Tell
) -> tuple[Report, dict[str, Rounds]]:
    """Run the sweeps `names`, each for its share of the budget."""
    base = base_folder(options.model, options.cache, tell)
    groups = [Group(max(DOMAINS, *loaded), RANK)]
    if "rank" in names:
        groups += [rank_group(rank) for rank in RANKS]
    adapters = adapter_folder(base, options.cache, groups, tell)
    rows = max(STREAMS) if "streams" in names else MIXED_ROWS
    texts = prompts(base, rows, PROMPT_TOKENS)
    report = Report(
        "scaling",
        options.label,
        options.settings(prompt_tokens=PROMPT_TOKENS, steps=steps, max_batch=rows, rank=RANK),
    )
    results: dict[str, Rounds] = {}
    tell("loading")
    with Local(options, base, adapters, max_batch=rows, max_length=MAX_LENGTH) as local:
        sweeps = Sweeps(local, texts, steps, loaded).all()
        for name in names:
            contestants = sweeps[name]()
            results[name] = run_rounds(
                contestants,
                seconds=options.seconds / len(names),
                most=20,
                tell=lambda text, name=name: tell(f"{name}, {text}"),  # type: ignore[misc]
            )
    report.tables += [_table(name, rounds) for name, rounds in results.items()]
    report.notes.append(
        "Time of one decode step with all rows in the batch, mean over the steps of one round; "
        "within a sweep all values run in turns and ratios are taken round by round. Rows under "
        f"the resident mix ('{RESIDENT}') are the baseline where there is one."
    )
    report.data = {name: rounds.values for name, rounds in results.items()}
    return report, results


TITLES = {
    "loaded": f"Adapters loaded, none used ({ROWS} rows)",
    "mixes": f"Distinct mixes of {DOMAINS_IN_MIX} domains in a batch of {MIXED_ROWS}",
    "domains": f"Domains a mix ({ROWS} rows, every one another mix)",
    "rank": f"Rank of the adapters ({ROWS} rows, {DOMAINS_IN_MIX} domains each)",
    "streams": f"Rows in the batch (mixed: every one another mix of {DOMAINS_IN_MIX} domains)",
}


def _table(name: str, rounds: Rounds) -> Table:
    rows: list[list[Cell]] = []
    for value in rounds.values:
        step = rounds.spread(value).scaled(1e3)
        ratio = rounds.ratio(value, _baseline(name, value, rounds))
        row: list[Cell] = [
            value,
            step.median,
            f"{step.lower:.3g} - {step.upper:.3g}",
            ratio.median,
            f"{ratio.lower:.3f} - {ratio.upper:.3f}",
        ]
        if name == "streams":
            row.append(int(value.split()[0]) / step.median * 1e3)
        rows.append(row)
    columns = [name, "ms a step", "quartiles", "x baseline", "quartiles of x"]
    return Table(TITLES[name], columns + (["tokens/s"] if name == "streams" else []), rows)


def _baseline(name: str, value: str, rounds: Rounds) -> str:
    """Return what a value is compared with: the first of its sweep, or as many resident rows."""
    if name == "streams":
        return f"{value.split()[0]} {RESIDENT}"
    return next(iter(rounds.values))


def draw(results: dict[str, Rounds], figure: Any) -> None:
    """Draw one panel a sweep."""
    across = min(3, len(results))
    down = -(-len(results) // across)
    figure.set_size_inches(max(5.0, 3.3 * across), 3.2 * down + 1)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    for axes, (name, rounds) in zip(panels, results.items(), strict=False):
        if name == "streams":
            for kind in (RESIDENT, "mixed"):
                steps = {v: rounds.spread(v).median for v in rounds.values if v.endswith(kind)}
                speeds = [int(value.split()[0]) / step for value, step in steps.items()]
                labels = [value.split()[0] for value in steps]
                axes.plot(labels, speeds, marker="o", label=kind)
            axes.set_ylabel("tokens/s")
            axes.legend(fontsize=8)
        else:
            spreads = {value: rounds.spread(value).scaled(1e3) for value in rounds.values}
            medians = [spread.median for spread in spreads.values()]
            errors = [
                [s.median - s.lower for s in spreads.values()],
                [s.upper - s.median for s in spreads.values()],
            ]
            labels = ["res." if value == RESIDENT else value for value in spreads]
            axes.errorbar(labels, medians, errors, marker="o", capsize=3)
            axes.set_ylabel("ms a step")
        axes.set_ylim(0, axes.dataLim.ymax * 1.1)
        axes.set_xlabel(
            {
                "loaded": "adapters loaded",
                "mixes": "distinct mixes",
                "domains": "domains a mix",
                "rank": "rank",
                "streams": "rows",
            }[name]
        )
        axes.tick_params(axis="x", labelsize=8)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("scaling", "Measure what makes a decode step dearer.", seconds=300)
    parser.add_argument(
        "--sweeps",
        type=lambda text: text.split(","),
        default=list(TITLES),
        help="which of " + ", ".join(TITLES),
    )
    parser.add_argument("--loaded", type=numbers, default=list(LOADED), help="adapters loaded")
    parser.add_argument("--steps", type=int, default=16, help="decode steps of one measurement")
    parsed = parser.parse_args(arguments)
    unknown = set(parsed.sweeps) - set(TITLES)
    if unknown:
        parser.error(f"--sweeps has {', '.join(sorted(unknown))}: use {', '.join(TITLES)}")
    if not 1 <= parsed.steps <= MAX_LENGTH // 4:
        parser.error(f"--steps is {parsed.steps}: use 1 to {MAX_LENGTH // 4}")
    options = read_options(parsed)
    with progress("scaling", options.seconds) as tell:
        report, results = measure(options, parsed.sweeps, parsed.loaded, parsed.steps, tell)
    return report.finish(options, lambda figure: draw(results, figure))


if __name__ == "__main__":
    sys.exit(main())
