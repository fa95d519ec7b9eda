"""Every way of merging a bundled base's three domains into one adapter, at its own best factor.

A merged adapter times a factor is a weight in a mix, and needs no new merge. How large a sum is
matters more than how it is made, so every method is shown at the factor that loses least on rows
for choosing, and what it loses is measured on others. Methods that learn from rows learn from the
former, too.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.options import Options, make_parser, read_options
from benchmarks.progress import Tell, progress
from benchmarks.report import Cell, Check, Report, Table
from benchmarks.study.config import Dtype, Evaluation
from benchmarks.study.evaluator import Local
from benchmarks.study.statistics import WORST_LOSS, Losses, clustered, join, percent_change
from superpose_adapters.adapter import Adapter
from superpose_adapters.base.tokenizer import load_tokenizer
from superpose_adapters.bundled import BUNDLES, DOMAINS, Bundle
from superpose_adapters.layout import Layout
from superpose_adapters.merge.deviation import deviation
from superpose_adapters.merge.merge import Part, merge
from superpose_adapters.merge.methods import DATA_METHODS, METHODS, read_method
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.peft.folder import Limits, parse_adapter, read_adapter
from superpose_adapters.peft.writing import adapter_files
from superpose_adapters.qa import Row, read_rows, split_key
from superpose_adapters.scoring import EncodedText
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_server.errors import FailedPrecondition
from superpose_train.merging.data_method import data_method
from superpose_train.merging.one_thread import one_thread

Mix = Mapping[Adapter, float]
Texts = Mapping[str, Sequence[EncodedText]]

ALL = " + ".join(DOMAINS)
HALF = "half of each"
_MAX_LENGTH = 64
_RESAMPLES = 2000
_TIMED = 3
_COARSE = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_FINER = (2**0.5, 2**0.25, 2**0.125)


def is_for_choosing(question: str) -> bool:
    """Tell whether a row is for learning and for choosing factors; what is reported is of others.

    Of the question alone, as `part_of` is, so that twins stay together.
    """
    return hashlib.sha256(f"merging {split_key(question)}".encode()).digest()[0] % 2 == 0


def best_factor(loss: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the factor that loses least, and {factor: loss} of all that were tried.

    Doublings first, and then finer and finer beside the best.
    """
    tried = {factor: loss(factor) for factor in _COARSE}
    for ratio in _FINER:
        best = min(tried, key=tried.__getitem__)
        for factor in (best / ratio, best * ratio):
            tried[factor] = loss(factor)
    return min(tried, key=tried.__getitem__), dict(sorted(tried.items()))


class Judge:
    """A bundled base in this process, and rows of its domains.

    Attributes:
        layout: Of the base.
        rows: Those for choosing, by domain.
        choosing: The same as token ids.
        reporting: The others.
    """

    def __init__(self, bundle: Bundle, options: Options, most: int) -> None:
        """Load the base, and read at most `most` rows a domain."""
        folder = bundle.base()
        dtype: Dtype = "bfloat16" if options.dtype == "bfloat16" else "float32"
        self._local = Local(folder, Evaluation(dtype=dtype, kernels=options.compile == "auto"))
        self.layout: Layout = self._local.model.layout
        encoder = TextEncoder(load_tokenizer(folder), vocabulary_of(self._local.model.module))
        self.rows: dict[str, list[Row]] = {}
        others: dict[str, list[Row]] = {}
        for domain in DOMAINS:
            rows = read_rows(bundle.held_out(domain))[:most]
            self.rows[domain] = [row for row in rows if is_for_choosing(row.question)]
            others[domain] = [row for row in rows if not is_for_choosing(row.question)]
        self.choosing = _encoded(encoder, self.rows)
        self.reporting = _encoded(encoder, others)

    def losses(self, mix: Mix, texts: Texts) -> dict[str, Losses]:
        """Return the losses of each domain's rows; WORST_LOSS where they are not finite."""
        bound = BoundMix.of(
            self._local.model.base_digest,
            (BoundEntry("part", adapter, weight) for adapter, weight in mix.items()),
        )
        found = {}
        for domain, each in texts.items():
            tokens = np.array([len(text.ids) - text.first_scored("all") for text in each], float)
            try:
                self._local.fold(bound)
                nats = np.array(self._local.score(bound, each, "all"))
            except FailedPrecondition:
                nats = WORST_LOSS * tokens
            found[domain] = clustered(domain, nats, tokens, range(len(each)))
        return found

    def mean(self, mix: Mix) -> float:
        """Return nats a token over all rows for choosing."""
        return join(list(self.losses(mix, self.choosing).values())).mean


def _encoded(
    encoder: TextEncoder, rows: Mapping[str, Sequence[Row]]
) -> dict[str, list[EncodedText]]:
    return {
        domain: [encoder.row(row.question, row.answer, _MAX_LENGTH) for row in each]
        for domain, each in rows.items()
    }


@dataclass(frozen=True)
class Merged:
    """What a method has made.

    Attributes:
        adapter: Of the three domains at weight 1.
        seconds: That merging took, learning included.
        off: Distance to the plain sum over its norm.
    """

    adapter: Adapter
    seconds: float
    off: float


def merge_by(name: str, base: str, parts: Sequence[Part], judge: Judge) -> Merged:
    """Merge by the method of this name, with its own defaults."""
    began = time.perf_counter()
    if name in DATA_METHODS:
        method = data_method(name, {}, base, parts, judge.rows)
    else:
        method = read_method(name, {})
    learning = time.perf_counter() - began
    times = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        with one_thread():
            pairs = merge(parts, method)
        times.append(time.perf_counter() - began)
    limits = Limits(max_rank=1 << 16, max_config_bytes=1 << 24)
    adapter = parse_adapter(*adapter_files(pairs, base=base), judge.layout, limits)
    return Merged(adapter, learning + statistics.median(times), deviation(parts, pairs).whole)


def measure(options: Options, names: Sequence[str], most: int, tell: Tell) -> Report:
    """Merge, choose factors, and measure."""
    bundle = BUNDLES[options.model]
    judge = Judge(bundle, options, most)
    parts = [
        Part(domain, read_adapter(folder, judge.layout), 1.0)
        for domain, folder in bundle.adapters().items()
    ]
    counts = {domain: len(texts) for domain, texts in judge.reporting.items()}
    report = Report(
        "merging",
        options.label,
        options.settings(
            rows_for_choosing=sum(map(len, judge.choosing.values())),
            rows_reported=sum(counts.values()),
            max_length=_MAX_LENGTH,
        ),
    )
    known: dict[str, dict[str, Losses]] = {}
    for name, mix in _references(parts).items():
        tell(name)
        known[name] = judge.losses(mix, judge.reporting)
    plain: list[list[Cell]] = [[name, None, None, None, *_cells(known[name])] for name in known]
    best: list[list[Cell]] = [
        [name, None, *_cells(known[name]), *_against(known[HALF], known[name])] for name in known
    ]
    for name in names:
        tell(f"{name}: merging")
        merged = merge_by(name, bundle.name, parts, judge)
        tell(f"{name}: its factor")
        factor, tried = best_factor(partial(_scaled_loss, judge, merged.adapter))
        at_one = judge.losses({merged.adapter: 1.0}, judge.reporting)
        at_best = judge.losses({merged.adapter: factor}, judge.reporting)
        plain.append([name, merged.adapter.rank, merged.seconds, merged.off, *_cells(at_one)])
        best.append([name, factor, *_cells(at_best), *_against(known[HALF], at_best)])
        if name == "sum":
            report.checks.append(_same(at_one, known[ALL]))
        report.data[name] = {
            "rank": merged.adapter.rank,
            "seconds": merged.seconds,
            "off_the_sum": merged.off,
            "chosen_on": {str(each): loss for each, loss in tried.items()},
        }
    losses = (*(f"{domain} rows" for domain in DOMAINS), "all")
    report.tables += [
        Table(
            "At weight 1: nats a token",
            ("", "rank", "merge, s", "off the sum", *losses),
            plain,
        ),
        Table(
            "At its own best factor: nats a token, and perplexity against half of each",
            ("", "factor", *losses, "perplexity, %", "95 %"),
            best,
        ),
    ]
    report.notes.append(
        "Methods have their default options. Factors are chosen, and methods that learn have "
        "learned, on rows that no loss here is of. `off the sum` is the norm of the difference to "
        "the plain sum, over the norm of that. Intervals are of the rows (bootstrap, paired), and "
        "cover neither training nor seeds. Rows reported: "
        f"{', '.join(f'{count} of {domain}' for domain, count in counts.items())}."
    )
    return report


def _references(parts: Sequence[Part]) -> dict[str, Mix]:
    """Return what to hold the methods against: mixes that need no merge."""
    of = {part.domain: part.adapter for part in parts}
    return {
        "base": {},
        **{f"{domain} alone": {adapter: 1.0} for domain, adapter in of.items()},
        ALL: dict.fromkeys(of.values(), 1.0),
        HALF: dict.fromkeys(of.values(), 0.5),
    }


def _scaled_loss(judge: Judge, adapter: Adapter, factor: float) -> float:
    return judge.mean({adapter: factor})


def _cells(losses: Mapping[str, Losses]) -> list[Cell]:
    return [*(each.mean for each in losses.values()), join(list(losses.values())).mean]


def _against(half: Mapping[str, Losses], losses: Mapping[str, Losses]) -> list[Cell]:
    pair = join(list(half.values())), join(list(losses.values()))
    if not pair[1].finite:
        return [None, None]
    change = percent_change([pair], _RESAMPLES)
    return [change.value, f"{change.low:+.1f} to {change.high:+.1f}"]


def _same(first: Mapping[str, Losses], second: Mapping[str, Losses]) -> Check:
    return Check(
        "the merged sum has the losses of the mix itself, to the last bit",
        all(bool((first[domain].nats == second[domain].nats).all()) for domain in first),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run as a command."""
    every = [*METHODS, *DATA_METHODS]
    parser = make_parser("merging", "Merge three domains by every method.", seconds=300)
    parser.set_defaults(model="mini")
    parser.add_argument("--rows", type=int, default=48, help="rows of each domain, at most 48")
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="METHOD")
    parsed = parser.parse_args(arguments)
    options = read_options(parsed)
    if options.model not in BUNDLES:
        parser.error(f"--model {options.model} has no adapters: use {' or '.join(BUNDLES)}")
    with progress("merging", options.seconds) as tell:
        report = measure(options, parsed.methods, parsed.rows, tell)
    return report.finish(options)


if __name__ == "__main__":
    sys.exit(main())
