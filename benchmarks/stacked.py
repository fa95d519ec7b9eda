"""Training of several adapters at once over one base, against training them one by one.

Whole runs are timed, from the call to the adapters on the disk: loading, evaluations and writing
are part of both. One by one is `train`, which is PEFT and transformers.Trainer. Every row fills
its 64 tokens, so no time goes into padding.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.shapes import base_folder
from superpose_adapters.bundled import BUNDLES, MINI
from superpose_train.options import Options as Training
from superpose_train.precision import Decided
from superpose_train.scratch_memory import keep_scratch
from superpose_train.stacked.stack import train_many
from superpose_train.train import train

ALONE = "one by one"
_LENGTH = 64
_ROWS = 400


def at_once(count: int) -> str:
    """Return the name of a stack of `count` adapters."""
    return f"{count} at once"


def write_rows(path: Path) -> None:
    """Write rows of made-up words, each longer than what is trained on."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(_ROWS):
            words = [f"{draw.getrandbits(40):010x}" for _ in range(24)]
            row = {"question": " ".join(words[:8]), "answer": " ".join(words[8:])}
            file.write(json.dumps(row) + "\n")


class Trainings:
    """Trains the same runs in several ways, each time into a new folder."""

    def __init__(
        self, base: str, device: str, precision: Decided, steps: int, batch: int, folder: Path
    ) -> None:
        """Train on `base`, in `folder`."""
        self._base = base
        self._device = device
        self._precision = precision
        self._steps = steps
        self._batch = batch
        self._folder = folder
        self._calls = 0
        write_rows(folder / "rows.jsonl")

    def tokens(self, count: int) -> int:
        """Return how many tokens `count` adapters are trained on."""
        return count * self._steps * self._batch * _LENGTH

    def contestants(self, counts: list[int]) -> dict[str, Measure]:
        """Return what is to be timed, in tokens a second."""
        return {ALONE: self._alone, **{at_once(count): self._stacked(count) for count in counts}}

    def _runs(self, count: int) -> list[Training]:
        self._calls += 1
        return [
            Training(
                base=self._base,
                data=(self._folder / "rows.jsonl",),
                name=f"a{seed}",
                out=self._folder / str(self._calls) / f"a{seed}",
                max_length=_LENGTH,
                batch_size=self._batch,
                max_steps=self._steps,
                max_eval_rows=16,
                seed=seed,
                device=self._device,
                precision=self._precision,
            )
            for seed in range(count)
        ]

    def _alone(self) -> float:
        # The speed of one is that of any number: each is a call of its own.
        runs = self._runs(1)
        began = time.perf_counter()
        with silence():
            train(runs[0])
        return self.tokens(1) / (time.perf_counter() - began)

    def _stacked(self, count: int) -> Measure:
        def measure() -> float:
            runs = self._runs(count)
            began = time.perf_counter()
            with silence():
                train_many(runs, max_stack=count)
            return self.tokens(count) / (time.perf_counter() - began)

        return measure


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep Trainer's bars and logs from the report."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def measure(
    options: Options, counts: list[int], steps: int, batch: int, tell: Tell
) -> tuple[Report, Rounds]:
    """Run the benchmark."""
    bundled = options.model in BUNDLES
    base = options.model if bundled else str(base_folder(options.model, options.cache, tell))
    report = Report(
        "stacked",
        options.label,
        options.settings(steps=steps, batch_rows=batch, row_tokens=_LENGTH, adapters_rank=4),
    )
    device = options.torch_device.type
    precision: Decided = "bfloat16" if options.dtype == "bfloat16" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(base, device, precision, steps, batch, Path(folder))
        rounds = run_rounds(trainings.contestants(counts), seconds=options.seconds, tell=tell)
    rows: list[list[Cell]] = []
    for name in rounds.values:
        speed = rounds.spread(name)
        ratio = rounds.ratio(name, ALONE)
        rows.append(
            [
                name,
                speed.median,
                f"{speed.lower:.4g} - {speed.upper:.4g}",
                ratio.median,
                f"{ratio.lower:.3g} - {ratio.upper:.3g}",
            ]
        )
    columns = ("adapters", "tokens/s, median", "tokens/s, quartiles", "x one by one", "quartiles")
    report.tables.append(Table("Speed of training, all adapters together", columns, rows))
    report.settings["rounds"] = rounds.count
    report.notes.append(
        "Contestants run in turns in one process; ratios are taken round by round. Whole runs are "
        "timed: loading the base, evaluations (16 validation rows, eight times) and writing."
    )
    report.data = {"tokens_per_second": rounds.values}
    return report, rounds


def draw(rounds: Rounds, figure: Any) -> None:
    """Draw one bar a contestant."""
    axes = figure.subplots()
    names = list(rounds.values)
    for at, name in enumerate(names):
        speed = rounds.spread(name)
        errors = [[speed.median - speed.lower], [speed.upper - speed.median]]
        colour = "tab:gray" if name == ALONE else "tab:blue"
        axes.bar(at, speed.median, yerr=errors, color=colour, ecolor="black", capsize=3)
        label = f"{speed.median:.4g}\n{rounds.ratio(name, ALONE).median:.2f}x"
        axes.annotate(
            label, (at, speed.upper), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.25 * max(rounds.spread(name).upper for name in names))
    axes.set_ylabel("tokens/s, all adapters together; more is better")


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("stacked", "Time training at once against one by one.", seconds=240)
    parser.set_defaults(model=MINI.name)
    parser.add_argument(
        "--counts", type=numbers, default=[1, 2, 4, 8], help="adapters that are trained at once"
    )
    parser.add_argument("--steps", type=int, default=24, help="of every adapter")
    parser.add_argument("--batch-rows", type=int, default=16, help="of every adapter, a step")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    keep_scratch()
    with progress("stacked", options.seconds) as tell:
        report, rounds = measure(options, parsed.counts, parsed.steps, parsed.batch_rows, tell)
    return report.finish(options, lambda figure: draw(rounds, figure))


if __name__ == "__main__":
    sys.exit(main())
