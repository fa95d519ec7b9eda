"""What `adapterctl` shows to people: results as rich renderables.

Columns are aligned with spaces and have no frames, so that one screen suits a terminal and goes
through grep and awk as well.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import singledispatch
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from superpose_client.files_fitted import FilesFitted
from superpose_client.mix import format_mix, format_weight
from superpose_client.results import (
    AdapterInfo,
    Analysis,
    BoundEntry,
    Change,
    CurrentMix,
    Estimate,
    FitResult,
    FollowedFile,
    MergeResult,
    MixState,
    NamedMix,
    PairAnalysis,
    Provenance,
    PushResult,
    Replica,
    ScoreResult,
    ServerInfo,
    TopLogprobs,
    Usage,
    Verification,
)

# In a pipe nothing is wrapped: its reader has no right margin.
_PIPE_WIDTH = 100_000
_NAMES_SHOWN = 20


def show(renderable: RenderableType) -> None:
    """Print on standard output: text literally, and plain where no terminal reads it."""
    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(renderable)
        return
    console.width = _PIPE_WIDTH
    with console.capture() as capture:
        console.print(renderable)
    # Columns are filled up with blanks, the last one too.
    for line in capture.get().splitlines():
        print(line.rstrip())


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Draw a bar on standard error, if that is a terminal; yield what takes the number done."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        what,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


class Rows:
    """A table; where that is too wide, row after row with a line for each column.

    So that neither a name nor a figure is cut, whatever the width.
    """

    def __init__(self, *headers: str) -> None:
        """Begin a table without rows; headers that begin with > stand above numbers."""
        self._headers = headers
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row, a cell for each header. An empty one continues what stands above it."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or what stands for it."""
        table = self._table()
        if console.measure(table, options=options.update(width=_PIPE_WIDTH)).maximum <= (
            options.max_width
        ):
            yield table
            return
        names = [header.removeprefix(">").lower() for header in self._headers]
        for number, row in enumerate(self._rows):
            if number > 0:
                yield ""
            yield _fields(*((name, cell) for name, cell in zip(names, row, strict=True) if cell))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in self._headers:
            number = header.startswith(">")
            table.add_column(
                header.removeprefix(">"), justify="right" if number else "left", no_wrap=True
            )
        for row in self._rows:
            table.add_row(*row)
        return table


@singledispatch
def screen(result: Any) -> RenderableType:
    """Return what to show for a result."""
    raise TypeError(f"no screen for {type(result).__name__}")


@screen.register
def _(info: ServerInfo) -> RenderableType:
    limits, engines = info.limits, max(1, len(info.replicas))
    sound: str | Text = "no fault found"
    if not info.weights_intact:
        sound = Text("DAMAGED: a verification failed; see adapterctl verify", style="bold red")
    fields = _fields(
        ("server", f"superpose {info.version}, up {timedelta(seconds=int(info.uptime_seconds))}"),
        ("base", info.base),
        ("base digest", info.base_digest),
        ("parameters", f"{info.dtype} on {info.device}"),
        ("weights", sound),
        ("context", f"{info.context_length:,} tokens"),
        ("running", f"{info.running} of {limits.max_batch * engines}"),
        ("waiting", f"{info.waiting} of {limits.max_queue * engines}"),
        ("adapters", str(info.adapters)),
        *_followed_fields(info.followed),
        *_mix_fields(info.mix),
    )
    return Group(fields, "", _replicas(info.replicas)) if info.replicas else fields


def _replicas(replicas: Sequence[Replica]) -> Rows:
    table = Rows("REPLICA", "NODE", ">GENERATION", "DIGEST", ">RUNNING", ">WAITING", ">TOKENS", "")
    for replica in replicas:
        table.add_row(
            replica.name,
            replica.node,
            "-" if replica.generation is None else str(replica.generation),
            _short(replica.digest),
            str(replica.running),
            str(replica.waiting),
            f"{replica.generated_tokens:,}",
            "" if replica.weights_intact else "DAMAGED",
        )
    return table


def _followed_fields(followed: FollowedFile | None) -> list[tuple[str, str | Text]]:
    if followed is None:
        return []
    if followed.reached:
        return [("follows", followed.name)]
    problem = f"{followed.name}, and is NOT at what it says: {followed.problem}"
    return [("follows", Text(problem, style="bold red"))]


@screen.register
def _(mix: MixState) -> RenderableType:
    return _with_entries(mix, _mix_fields(mix))


@screen.register
def _(mix: CurrentMix) -> RenderableType:
    fields = _mix_fields(mix)
    if mix.resident.digest != mix.digest:
        resident = format_mix(mix.resident.weights)
        fields.append(("resident", f"{resident}; requests under other mixes are corrected"))
    return _with_entries(mix, fields)


@screen.register
def _(named: NamedMix) -> RenderableType:
    return _fields(("name", named.name), ("mix", format_mix(named.weights)))


# A list of adapters.
@screen.register
def _(adapters: tuple) -> RenderableType:  # type: ignore[type-arg]
    if not adapters:
        return Text("no adapters; push one with: adapterctl push NAME DIR")
    table = Rows("DOMAIN", ">WEIGHT", ">RANK", ">PARAMETERS", ">SIZE", "SOURCE", "DIGEST")
    for adapter in adapters:
        table.add_row(
            adapter.domain,
            format_weight(adapter.weight) if adapter.weight else "-",
            str(adapter.rank),
            f"{adapter.parameters:,}",
            decimal(adapter.bytes, precision=0),
            _source(adapter),
            _short(adapter.digest),
        )
    return table


@screen.register
def _(adapter: AdapterInfo) -> RenderableType:
    weight = format_weight(adapter.weight) if adapter.weight else "not in the default mix"
    fields = [
        ("domain", adapter.domain),
        ("weight", weight),
        ("digest", adapter.digest),
        ("source", _source(adapter)),
        ("rank", str(adapter.rank)),
        ("parameters", f"{adapter.parameters:,}"),
        ("size", decimal(adapter.bytes)),
    ]
    if adapter.modules:
        fields.append((f"{len(adapter.modules)} modules", _by_layer(adapter.modules)))
    if adapter.config_json:
        fields.append(("config", adapter.config_json))
    whole = _fields(*fields, *_merge_fields(adapter.provenance), *_warnings(adapter.warnings))
    return _above_entries(whole, adapter.provenance.parts if adapter.provenance else ())


@screen.register
def _(result: PushResult) -> RenderableType:
    return Group(screen(result.adapter), _fields(("generation", str(result.generation))))


@screen.register
def _(result: MergeResult) -> RenderableType:
    return Group(
        screen(result.adapter),
        "",
        _fields(
            ("deviation", f"{result.deviation:.2%} of the plain sum's norm"),
            ("merged in", f"{result.seconds:.2f} s"),
            ("generation", str(result.generation)),
        ),
    )


@screen.register
def _(result: ScoreResult) -> RenderableType:
    bare = sum(not item.tokens for item in result.items)
    texts = f"{len(result.items):,}"
    if bare:
        texts += f", {bare:,} of them without a token that counts"
    return _fields(
        ("perplexity", f"{result.perplexity:,.4f}"),
        ("tokens", f"{result.tokens:,}"),
        ("texts", texts),
        *_mix_fields(result.mix),
    )


@screen.register
def _(result: FitResult) -> RenderableType:
    table = Rows("MIX", ">FITTED ON", ">HELD OUT", ">95 %", ">OVER THE FIT", ">95 %")
    for number, candidate in enumerate(result.candidates):
        table.add_row(
            format_mix(candidate.mix.weights),
            f"{candidate.fitted_loss:.4f}",
            *_estimate(candidate.held_out_loss, ""),
            *(_estimate(candidate.excess, "+") if number else ("", "")),
        )
    parts: list[RenderableType] = [
        _fields(
            ("mix", format_mix(result.mix.weights)),
            ("fitted on", f"{result.fitted_rows:,} rows, {result.fitted_tokens:,} tokens"),
            ("held out", f"{result.held_out_rows:,} rows, {result.held_out_tokens:,} tokens"),
            ("mixes scored", f"{result.evaluations:,}"),
            ("losses", "nats a token"),
        ),
        "",
        table,
    ]
    if result.warnings:
        parts += ["", _fields(*_warnings(result.warnings))]
    return Group(*parts)


@screen.register
def _(fitted: FilesFitted) -> RenderableType:
    names = fitted.names
    if len(names) < 2:
        return screen(fitted.result)
    table = Rows("HELD OUT, BY FILE", *(f">{name}" for name in names.values()))
    for candidate in fitted.result.candidates:
        losses = fitted.losses(candidate)
        cells = ("no row" if loss is None else f"{loss:.4f}" for loss in losses)
        table.add_row(format_mix(candidate.mix.weights), *cells)
    return Group(screen(fitted.result), "", table)


def _estimate(estimate: Estimate, sign: str) -> tuple[str, str]:
    if math.isnan(estimate.low):
        return f"{estimate.value:{sign}.4f}", "too few rows"
    return (
        f"{estimate.value:{sign}.4f}",
        f"{estimate.low:{sign}.4f} to {estimate.high:{sign}.4f}",
    )


@screen.register
def _(result: Verification) -> RenderableType:
    verdict = Text("ok: every parameter in use is what it should be", style="bold green")
    damage: list[tuple[str, str | Text]] = []
    if not result.ok:
        verdict = Text("DAMAGED: parameters are not what they should be", style="bold red")
        if result.damaged_resident:
            damage.append(("resident", _names(result.damaged_resident)))
        if result.damaged_base:
            damage.append(("base", _names(result.damaged_base)))
        if result.damaged_adapters:
            damage.append(("adapters", _names(result.damaged_adapters)))
    return Group(
        verdict,
        _fields(
            *damage,
            ("parameters", f"{result.dtype} on {result.device}"),
            ("hash", result.resident_hash),
            ("base digest", result.base_digest),
            *_mix_fields(result.mix),
            ("longest stall", f"{result.longest_stall_seconds * 1000:.1f} ms"),
        ),
    )


@screen.register
def _(result: Analysis) -> RenderableType:
    fields = _mix_fields(result.mix)
    if len(result.domains) > 1:
        fields.append(("interference", interference_words(result.interference_ratio)))
    if result.domains:
        how = "small enough to fold" if result.folded else "too large to fold, served by correction"
        fields.append(("fold error", f"{result.fold_error:.2g}: {how}"))
    fields.append(("longest stall", f"{result.longest_stall_seconds * 1000:.1f} ms"))
    parts: list[RenderableType] = [_fields(*fields)]
    if result.domains:
        domains = Rows("DOMAIN", ">WEIGHT", ">MODULES", ">DELTA NORM", ">OF THE BASE")
        for domain in result.domains:
            domains.add_row(
                domain.domain,
                format_weight(domain.weight),
                str(domain.modules),
                f"{domain.delta_norm:.4g}",
                f"{domain.relative_norm:.2%}",
            )
        parts += ["", domains]
    if result.pairs:
        parts += ["", _pairs(result.pairs)]
    if result.warnings:
        parts += ["", _fields(*_warnings(result.warnings))]
    return Group(*parts)


def name_lines(named: Sequence[NamedMix]) -> str:
    """Return named mixes, one a line."""
    if not named:
        return "no named mixes; name one with: adapterctl name NAME MIX"
    width = max(len(each.name) for each in named)
    return "\n".join(f"{each.name:{width}}  {format_mix(each.weights)}" for each in named)


def change_lines(changes: Sequence[Change]) -> str:
    """Return changes of operators, one a line."""
    if not changes:
        return "no changes yet"
    width = max(len(each.who) for each in changes)
    return "\n".join(
        f"{each.time}  {each.who:{width}}  {each.generation_before} -> {each.generation}  "
        f"{each.what}  ({each.peer})"
        for each in changes
    )


def watch_line(mix: MixState) -> str:
    """Return one change of the default mix as a line."""
    return f"generation {mix.generation}  {_short(mix.digest)}  {format_mix(mix.weights)}"


def generation_line(usage: Usage, finish: str, mix: MixState) -> Text:
    """Return what stands below a generated text: its length, its end and its mix."""
    reason = finish.removeprefix("FINISH_REASON_").lower()
    return Text(
        f"[{usage.prompt_tokens} + {usage.completion_tokens} tokens, {reason}, "
        f"mix {format_mix(mix.weights)}, generation {mix.generation}]",
        style="dim",
    )


def seed_line(seed: int) -> Text:
    """Return what stands below texts that were drawn: the seed that draws them again."""
    return Text(f"[seed {seed}]", style="dim")


def logprob_table(
    token_ids: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> Rows:
    """Return the log-probability of each new token, or the likeliest in its place, or both."""
    headings = [*([">LOGPROB"] if logprobs else []), *(["LIKELIEST"] if tops else [])]
    table = Rows(">TOKEN", *headings)
    for place, token in enumerate(token_ids):
        cells = [f"{logprob:.4f}" for logprob in logprobs[place : place + 1]]
        cells += [
            "  ".join(f"{i} {p:.4f}" for i, p in zip(top.token_ids, top.logprobs, strict=True))
            for top in tops[place : place + 1]
        ]
        table.add_row(str(token), *cells)
    return table


def interference_words(ratio: float) -> str:
    """Say what an interference ratio means: geometry, not quality. At 0 they are orthogonal."""
    if abs(ratio) < 0.05:
        return f"{ratio:+.3f}: the deltas hardly overlap"
    if ratio > 0:
        return f"{ratio:+.3f}: the deltas reinforce each other"
    return f"{ratio:+.3f}: the deltas partly cancel each other"


def _pairs(pairs: Sequence[PairAnalysis]) -> Rows:
    table = Rows("PAIR", "MODULES", ">COSINE", ">BY CHANCE")
    for pair in pairs:
        name = f"{pair.first}, {pair.second}"
        table.add_row(name, "all", f"{pair.cosine_rms:.4f}", f"{pair.random_floor:.4f}")
        for kind in pair.module_types:
            cosine, floor = f"{kind.cosine_rms:.4f}", f"{kind.random_floor:.4f}"
            table.add_row("", kind.module_type, cosine, floor)
    return table


def _mix_fields(mix: MixState) -> list[tuple[str, str | Text]]:
    return [
        ("mix", format_mix(mix.weights)),
        ("generation", str(mix.generation)),
        ("digest", mix.digest),
    ]


def _warnings(warnings: Iterable[str]) -> list[tuple[str, Text]]:
    return [("warning", Text(warning, style="yellow")) for warning in warnings]


def _merge_fields(provenance: Provenance | None) -> list[tuple[str, str]]:
    if provenance is None:
        return []
    options = "".join(f" {name}={value}" for name, value in provenance.options.items())
    return [("merged by", provenance.method + options)]


def _with_entries(mix: MixState, fields: Sequence[tuple[str, str | Text]]) -> RenderableType:
    return _above_entries(_fields(*fields), mix.entries)


def _above_entries(fields: RenderableType, entries: Sequence[BoundEntry]) -> RenderableType:
    if not entries:
        return fields
    table = Rows("DOMAIN", ">WEIGHT", "ADAPTER")
    for entry in entries:
        table.add_row(entry.domain, format_weight(entry.weight), _short(entry.adapter_digest))
    return Group(fields, "", table)


def _fields(*rows: tuple[str, str | Text]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=len("longest stall"))
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _names(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _source(adapter: AdapterInfo) -> str:
    return adapter.source.removeprefix("ADAPTER_SOURCE_").lower()


def _short(digest: str) -> str:
    return digest[:12]


def _by_layer(modules: Iterable[str]) -> str:
    """Return module names with their layer numbers counted instead of listed."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in modules)
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
