"""How long a change of the resident weights takes, against PEFT's merge and a plain copy.

Folds of 1, 2, 3 and 8 adapters and the return to the base, each timed from the request until the
next decode step could run on the new weights. A copy of the same bytes is the floor: a fold must
read the base and write the weights. Preparation, which runs beside the engine, is reported apart.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.inprocess import Local, timed
from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Report, Table
from benchmarks.rounds import Measure, Rounds, run_rounds
from benchmarks.shapes import Group, adapter_folder, base_folder
from benchmarks.spread import Spread

COPY = "plain copy"
RESTORE = "restore (empty mix)"
PEFT_MERGE = "PEFT merge_adapter, 2"
PEFT_UNMERGE = "PEFT unmerge_adapter, 2"
PEFT_CAT = "PEFT add_weighted_adapter(cat) + merge, 2"


def fold_name(count: int) -> str:
    """Return the name of the fold of `count` adapters."""
    return f"fold of {count}"


class Superpose:
    """Folds on a running engine, all decode steps idle.

    Attributes:
        preparations: {fold: seconds of each preparation}.
        rejected: Folds after which another mix was resident.
    """

    def __init__(self, local: Local, names: list[str]) -> None:
        """Fold the adapters `names` on `local`."""
        self._local = local
        self._names = names
        self.preparations: dict[str, list[float]] = {}
        self.rejected: set[str] = set()

    def contestants(self, counts: list[int]) -> dict[str, Measure]:
        """Return the folds to be timed."""
        folds = {fold_name(count): self._fold(fold_name(count), count) for count in counts}
        return {**folds, RESTORE: self._restore}

    def _fold(self, name: str, count: int) -> Measure:
        def measure() -> float:
            mix = self._local.bind(dict.fromkeys(self._names[:count], 1.0))
            device = self._local.runtime.local.runner.model.device
            prepared: list[Any] = []
            seconds = timed(lambda: prepared.append(self._local.prepare(mix)), device)
            self.preparations.setdefault(name, []).append(seconds)
            resident: list[Any] = []
            seconds = timed(lambda: resident.append(self._local.fold(prepared[0])), device)
            if resident[0] != mix:
                self.rejected.add(name)
            return seconds

        return measure

    def _restore(self) -> float:
        self._fold("", 2)()
        base = self._local.prepare(self._local.bind({}))
        return timed(lambda: self._local.fold(base), self._local.runtime.local.runner.model.device)


class Peft:
    """PEFT's ways to get two adapters into the weights, and out."""

    def __init__(self, base: Path, adapters: list[Path], options: Options) -> None:
        """Load base and adapters with PEFT."""
        from peft import PeftModel

        self._device = options.torch_device
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=options.torch_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
            self._model: Any = PeftModel.from_pretrained(
                model.to(self._device), adapters[0], adapter_name=adapters[0].name
            )
            for folder in adapters[1:]:
                self._model.load_adapter(folder, adapter_name=folder.name)
        self._model.eval()
        self._names = [folder.name for folder in adapters]
        self._unmerge_seconds = 0.0

    def weights(self) -> list[torch.Tensor]:
        """Return the parameters of the adapted modules."""
        return [
            module.get_base_layer().weight.detach()
            for module in self._model.modules()
            if hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
        ]

    def contestants(self) -> dict[str, Measure]:
        """Return what is to be timed."""
        return {PEFT_MERGE: self._merge, PEFT_UNMERGE: self._unmerge, PEFT_CAT: self._cat}

    def _time(self, action: Callable[[], object]) -> float:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timed(action, self._device)

    def _merge(self) -> float:
        seconds = self._time(lambda: self._model.merge_adapter(self._names))
        self._unmerge_seconds = self._time(self._model.unmerge_adapter)
        return seconds

    def _unmerge(self) -> float:
        # It was timed after the last merge, so as not to merge once more for it.
        if not self._unmerge_seconds:
            self._merge()
        return self._unmerge_seconds

    def _cat(self) -> float:
        def merge_sum() -> None:
            weights = [1.0] * len(self._names)
            self._model.add_weighted_adapter(
                self._names, weights, adapter_name="sum", combination_type="cat"
            )
            self._model.merge_adapter(["sum"])

        seconds = self._time(merge_sum)
        self._time(self._model.unmerge_adapter)
        self._model.delete_adapter("sum")
        return seconds


def copy_contestant(sources: list[torch.Tensor]) -> Measure:
    """Return a plain copy of `sources` into buffers of their own."""
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    @torch.inference_mode()
    def measure() -> float:
        return timed(copy, sources[0].device)

    return measure


def base_weights(local: Local, folder: Path) -> list[torch.Tensor]:
    """Return copies of the base parameters that the adapters in `folder` adapt."""
    model = local.runtime.local.runner.model
    adapter = local.runtime.registry.get(folder.name).adapter
    plain: Any = AutoModelForCausalLM.from_pretrained(
        local.runtime.config.base, dtype=model.dtype
    ).to(model.device)
    return [plain.get_submodule(name).weight.detach().clone() for name in adapter.modules]


def measure(options: Options, counts: list[int], tell: Tell) -> tuple[Report, Rounds]:
    """Run the benchmark."""
    base = base_folder(options.model, options.cache, tell)
    group = Group(max(*counts, 2))
    folder = adapter_folder(base, options.cache, [group], tell)
    report = Report("fold", options.label, options.settings(adapters_rank=group.rank))
    tell("loading")
    with Local(options, base, folder, max_batch=1, max_length=64) as local:
        superpose = Superpose(local, group.names)
        contestants = superpose.contestants(counts)
        try:
            peft = Peft(base, [folder / name for name in group.names[:2]], options)
        except ImportError:
            report.notes.append("PEFT is absent and was left out.")
            sources = base_weights(local, folder / group.names[0])
        else:
            contestants |= peft.contestants()
            sources = peft.weights()
        contestants = {COPY: copy_contestant(sources), **contestants}
        rounds = run_rounds(contestants, seconds=options.seconds, tell=tell)
        local.fold(local.prepare(local.bind({})))
    parameters = sum(source.numel() for source in sources)
    size = sum(source.numel() * source.element_size() for source in sources)
    report.settings |= {
        "modules": len(sources),
        "adapted_parameters": parameters,
        "adapted_mib": round(size / 2**20, 1),
        "rounds": rounds.count,
    }
    report.tables.append(_table(rounds, superpose))
    report.notes += [f"{name}: another mix was resident afterwards." for name in superpose.rejected]
    report.notes.append(
        "Contestants run in turns in one process, the engine idle; ratios are taken round by "
        "round. A fold is timed from the call until the next step could run. The copy is of the "
        "adapted base parameters into buffers of their own."
    )
    report.data = {"seconds": rounds.values, "preparation_seconds": superpose.preparations}
    return report, rounds


def _table(rounds: Rounds, superpose: Superpose) -> Table:
    rows: list[list[Cell]] = []
    against = PEFT_MERGE if PEFT_MERGE in rounds.values else None
    for name in rounds.values:
        took = rounds.spread(name).scaled(1e3)
        prepared = Spread.of(superpose.preparations.get(name, [])).median * 1e3
        faster = rounds.ratio(against, name).median if against else None
        rows.append(
            [
                name,
                took.median,
                f"{took.lower:.3g} - {took.upper:.3g}",
                rounds.ratio(name, COPY).median,
                faster,
                prepared,
            ]
        )
    columns = (
        "what",
        "ms, median",
        "ms, quartiles",
        "x plain copy",
        "x faster than PEFT merge",
        "preparation, ms",
    )
    return Table("Time to change the resident weights", columns, rows)


def draw(rounds: Rounds, figure: Any) -> None:
    """Draw one bar a contestant."""
    axes = figure.subplots()
    names = list(rounds.values)[::-1]
    for at, name in enumerate(names):
        took = rounds.spread(name).scaled(1e3)
        ours = name == RESTORE or name.startswith("fold of")
        colour = "tab:blue" if ours else "tab:gray" if name == COPY else "tab:orange"
        errors = [[took.median - took.lower], [took.upper - took.median]]
        axes.barh(at, took.median, xerr=errors, color=colour, ecolor="black", capsize=3)
        ratio = rounds.ratio(name, COPY).median
        axes.annotate(
            f"{took.median:.3g} ms ({ratio:.2f}x copy)",
            (took.upper, at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    least = min(rounds.spread(name).median * 1e3 for name in names)
    axes.set_xlim(10.0 ** math.floor(math.log10(least)), axes.get_xlim()[1] * 4)
    axes.set_xlabel("milliseconds (log), median and quartiles; less is better")


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("fold", "Time folds against PEFT and a plain copy.", seconds=60)
    parser.add_argument(
        "--counts", type=numbers, default=[1, 2, 3, 8], help="adapters that are folded"
    )
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    with progress("fold", options.seconds) as tell:
        report, rounds = measure(options, parsed.counts, tell)
    return report.finish(options, lambda figure: draw(rounds, figure))


if __name__ == "__main__":
    sys.exit(main())
