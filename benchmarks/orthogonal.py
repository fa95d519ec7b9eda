"""Two domains that are to be summed, trained plainly and in ways that are to avoid interference.

The first domain is trained plainly, and the second one plainly, beside the first without a penalty,
and with O-LoRA's; and both with a frozen A, random, in disjoint blocks, or with LoRI's sparse B.
What is asked is what the sum loses on the test rows of each domain, folded and scored as a server
does, at weight 1 and at the best common weight, which is chosen on validation rows: the losses of
a plain sum are mostly a matter of its scale. Everything is repeated for each seed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import Options, make_parser, numbers, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.shapes import base_folder
from benchmarks.stacked import silence
from benchmarks.study.config import Dtype, Evaluation
from benchmarks.study.evaluator import Local
from benchmarks.study.synthetic import write_topic
from superpose_adapters.adapter import Adapter
from superpose_adapters.base.tokenizer import load_tokenizer
from superpose_adapters.bundled import BUNDLES, MINI, resolve_base
from superpose_adapters.geometry import interference, overlap, rms
from superpose_adapters.scoring import EncodedText
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.data import Rows, read_data
from superpose_train.options import Options as Training
from superpose_train.scratch_memory import keep_scratch
from superpose_train.stacked.stack import train_many
from superpose_train.train import train

PLAIN, BESIDE, ORTHOGONAL = "plain", "beside the first, no penalty", "O-LoRA"
RANDOM, BLOCKS, SPARSE = "frozen A, random", "frozen A, blocks", "frozen A, sparse B"

_LENGTH = 64
_MADE_UP_ROWS = 600
_TOPICS = ("birds", "metals")
_SCALES = (0.3, 0.5, 0.7, 1.0)
# Of the second domain: of the first one's seed it would begin at the first one's A.
_OTHER_SEED = 1000

_Figures = Sequence[Mapping[str, float]]
"""What is reported of a way's pairs, one a seed."""


class Pairs:
    """Trains pairs of adapters, each in a folder of its own."""

    def __init__(
        self, options: Options, base: str, data: Sequence[Path], steps: int, folder: Path
    ) -> None:
        """Train on the two files of `data`, in `folder`."""
        self._folder = folder
        self._shared: dict[str, Any] = {
            "base": base,
            "max_length": _LENGTH,
            "batch_size": 8,
            "max_steps": steps,
            "max_eval_rows": 64,
            "learning_rate": 2e-3,
            "device": options.torch_device.type,
            "precision": options.dtype,
        }
        self._data = data

    def run(self, way: str, seed: int, at: int, **changes: Any) -> Training:
        """Return the run of one domain, the first being at 0."""
        path = self._data[at]
        return Training(
            data=(path,),
            name=_domain(path),
            out=self._folder / f"{seed} {way}" / _domain(path),
            seed=seed,
            init_seed=seed + at * _OTHER_SEED,
            **(self._shared | changes),
        )

    def runs(self, way: str, seed: int, **changes: Any) -> list[Training]:
        """Return the runs of both domains."""
        return [self.run(way, seed, at, **changes) for at in range(len(self._data))]

    def trained(self, seed: int, tell: Tell) -> dict[str, list[Path]]:
        """Train in every way; return {way: the folders of the pair}."""
        plain = self.runs(PLAIN, seed)
        random = self.runs(RANDOM, seed, frozen_a="random")
        # Of one basis.
        blocks = [
            replace(run, frozen_a=(at + 1, 2), init_seed=seed)
            for at, run in enumerate(self.runs(BLOCKS, seed))
        ]
        tell(f"seed {seed}: {PLAIN}, {RANDOM}, {BLOCKS}")
        train_many([*plain, *random, *blocks])
        pairs = {
            way: [run.out for run in runs]
            for way, runs in ((PLAIN, plain), (RANDOM, random), (BLOCKS, blocks))
        }
        first = plain[0].out
        for way, orthogonality in ((BESIDE, 0.0), (ORTHOGONAL, Training.orthogonality)):
            tell(f"seed {seed}: {way}")
            second = self.run(way, seed, 1, orthogonal_to=(first,), orthogonality=orthogonality)
            _train_quietly(second)
            pairs[way] = [first, second.out]
        sparse = self.runs(SPARSE, seed, frozen_a="random", sparsity=0.9)
        for run in sparse:
            tell(f"seed {seed}: {SPARSE}, {run.name}")
            _train_quietly(run)
        pairs[SPARSE] = [run.out for run in sparse]
        ways = (PLAIN, BESIDE, ORTHOGONAL, RANDOM, BLOCKS, SPARSE)
        return {way: pairs[way] for way in ways}

    def rows(self, model: Any) -> list[Rows]:
        """Return the encoded rows of each domain, for the base loaded as `model`."""
        tokenizer = load_tokenizer(resolve_base(self._shared["base"]))
        encoder = TextEncoder(tokenizer, vocabulary_of(model))
        return [read_data(run, encoder) for run in self.runs("rows", 0)]


def _domain(path: Path) -> str:
    return path.name.partition(".")[0]


def _train_quietly(run: Training) -> None:
    with silence():
        train(run)


def a_cosine(first: Adapter, second: Adapter) -> float:
    """Return the RMS of the cosines between rows of A's of one module, over all modules."""
    cosines: list[float] = []
    for module in first.modules.keys() & second.modules.keys():
        one, other = (
            torch.nn.functional.normalize(adapter.modules[module].a.double())
            for adapter in (first, second)
        )
        cosines += (one @ other.T).flatten().tolist()
    return rms(cosines)


def losses(
    scorer: Local, folders: Sequence[Path], scale: float, texts: Sequence[Sequence[EncodedText]]
) -> list[float]:
    """Return the mean nats a token of each domain's rows under the sum times a common weight."""
    mix = [(folder, scale) for folder in folders]
    return [
        sum(scorer.row_nats(mix, rows, "all")) / sum(len(row.ids) - 1 for row in rows)
        for rows in texts
    ]


def figures_of(scorer: Local, folders: Sequence[Path], rows: Sequence[Rows]) -> dict[str, float]:
    """Return what is reported of one pair."""
    first, second = (scorer.adapter(folder) for folder in folders)
    validation = [part.validation for part in rows]
    test = [part.test for part in rows]
    scale = min(_SCALES, key=lambda each: sum(losses(scorer, folders, each, validation)))
    alone = [losses(scorer, [folder], 1.0, [test[at]])[0] for at, folder in enumerate(folders)]
    summed = losses(scorer, folders, 1.0, test)
    return {
        "a_cosine": a_cosine(first, second),
        "delta_cosine": overlap("first", first, "second", second).rms,
        "interference": interference([(first, 1.0), (second, 1.0)]).ratio,
        "first alone": alone[0],
        "second alone": alone[1],
        "sum, first": summed[0],
        "sum, second": summed[1],
        "sum": sum(summed) / 2,
        "best scale": scale,
        "sum, best scale": sum(losses(scorer, folders, scale, test)) / 2,
    }


def measure(
    options: Options, data: Sequence[Path], seeds: Sequence[int], steps: int, tell: Tell
) -> Report:
    """Train and score all pairs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = list(data) or [write_topic(topic, _MADE_UP_ROWS, folder) for topic in _TOPICS]
        report = Report(
            "orthogonal",
            options.label,
            options.settings(
                domains=[_domain(path) for path in paths], seeds=list(seeds), steps=steps, rank=4
            ),
        )
        bundled = options.model in BUNDLES
        base = options.model if bundled else str(base_folder(options.model, options.cache, tell))
        pairs = Pairs(options, base, paths, steps, folder)
        dtype: Dtype = "bfloat16" if options.dtype == "bfloat16" else "float32"
        scorer = Local(resolve_base(base), Evaluation(dtype=dtype, kernels=False))
        rows = pairs.rows(scorer.model.module)
        found: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            for way, folders in pairs.trained(seed, tell).items():
                found.setdefault(way, []).append(figures_of(scorer, folders, rows))
    plain = found[PLAIN]
    report.tables += [
        _table(
            "How far the two overlap",
            found,
            {
                "a_cosine": "rows of A, RMS cosine",
                "delta_cosine": "deltas, RMS cosine",
                "interference": "interference ratio",
            },
        ),
        _table(
            "Losses on test rows, nats a token",
            found,
            {
                "first alone": "first alone",
                "second alone": "second alone",
                "sum, first": "sum, on the first",
                "sum, second": "sum, on the second",
                "sum": "sum, mean of both",
                "best scale": "best common weight",
                "sum, best scale": "sum at it, mean of both",
            },
        ),
        Table(
            "The sum at weight 1 less the plain sum, seed by seed, nats a token",
            ("", *(f"seed {seed}" for seed in seeds)),
            [
                [way, *(one["sum"] - other["sum"] for one, other in zip(of, plain, strict=True))]
                for way, of in found.items()
                if way != PLAIN
            ],
        ),
    ]
    report.checks += [
        Check(
            "for every seed O-LoRA's A's overlap less than those trained beside without a penalty",
            _less(found[ORTHOGONAL], found[BESIDE], "a_cosine"),
        ),
        Check(
            "for every seed O-LoRA's sum at weight 1 loses less than the plain sum",
            _less(found[ORTHOGONAL], plain, "sum"),
        ),
    ]
    report.notes.append(
        "Means over seeds, in brackets the lowest and the highest. The first domain's adapter is "
        f"the same in '{PLAIN}', '{BESIDE}' and '{ORTHOGONAL}'; there the second alone was never "
        "trained to stand alone. A penalty's worth is the difference of the last two."
    )
    report.data = {way: [dict(each) for each in of] for way, of in found.items()}
    return report


def _less(one: _Figures, other: _Figures, key: str) -> bool:
    return all(a[key] < b[key] for a, b in zip(one, other, strict=True))


def _table(title: str, found: Mapping[str, _Figures], columns: Mapping[str, str]) -> Table:
    rows: list[list[Cell]] = []
    for way, of in found.items():
        row: list[Cell] = [way]
        for key in columns:
            values = [each[key] for each in of]
            mean = sum(values) / len(values)
            row.append(f"{mean:.3f} ({min(values):.3f} - {max(values):.3f})")
        rows.append(row)
    return Table(title, ("", *columns.values()), rows)


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    parser = make_parser("orthogonal", "Train two domains that are to be summed.", seconds=0)
    parser.set_defaults(model=MINI.name)
    parser.add_argument(
        "--data",
        type=Path,
        nargs=2,
        default=[],
        metavar="FILE",
        help="rows of the two domains, as superpose-train takes them; without it made-up ones",
    )
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of the trainings")
    parser.add_argument("--steps", type=int, default=60, help="of every adapter, of 8 rows each")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    keep_scratch()
    with progress("orthogonal", 300.0) as tell:
        report = measure(options, parsed.data, parsed.seeds, parsed.steps, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
