"""Every family of the zoo, served or refused: what `docs/families.md` says, measured.

    python -m tests.families [NAME ...]      # measure, and without names write docs/families.md

A row of the table is one model of `tests/zoo.py`, saved, loaded as the server loads a base, and run
in batches against transformers and PEFT in float64.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.makers import make_adapter, peft_model, save_base
from tests.server.helpers import Bench
from tests.server.kinds import in_float64
from tests.zoo import ZOO, build
from torch import Tensor

from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.base.folder import CheckpointError
from superpose_adapters.mix import BoundMix
from superpose_adapters.peft.folder import read_adapter
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.twin_check import check_meaning
from superpose_server.errors import SelfCheckError
from superpose_server.model.batch import Span
from superpose_server.model.passes import Way

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
README = TABLE.parent.parent / "README.md"
BEGIN, END = "<!-- written by python -m tests.families -->\n", "<!-- families end -->"
_FIGURES = ("base", "corrected", "folded", "texts")
# Reasons that several share.
_REASONS = (
    "keeps a state that is no key-value cache",
    "tokens see later ones",
    "takes more than text",
    "encoder-decoder",
    "logits are off by",
)
_PIECE = 16
_TEXTS = (40, 25)
_END = 128
_PROMPTS = (21, 9, 13)
_NEW_TOKENS = 10
_WAYS = {Way.SHARED: "shared passes", Way.ROWS: "rows alone", Way.WHOLE: "whole rows"}


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        verdict: How it is served, or why it is not.
        worst: {what: largest distance of logits from the exact ones, as a share of their spread}.
    """

    verdict: str
    worst: dict[str, float]


def measure(
    name: str, folder: Path, *, kernels: bool, graphs: bool = False, device: str = "cpu"
) -> Outcome:
    """Serve a model of the zoo from `folder`, which is empty, and compare it."""
    specimen = ZOO[name]
    base = build(name)
    try:
        save_base(base, folder / "base")
        module: Any = load_checkpoint(folder / "base", torch.float32)
        check_meaning(type(module), module.config, torch.device(device), kernels=kernels)
    except (CheckpointError, SelfCheckError) as refusal:
        reason = str(refusal).removeprefix(f"base {folder / 'base'} ")
        return Outcome(reason.replace("|", "/"), {})
    bench = Bench(
        folder / "base", device=device, kernels=kernels, graphs=graphs, prefill_tokens=_PIECE
    )
    model = bench.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora: dict[str, Any] = {
            "target_modules": list(specimen.targets),
            "size": 0.3,
            "fan_in_fan_out": False,
        }
        adapted = make_adapter(base, folder / "adapter", **lora)
        # As it was trained: PEFT loses Laguna's shared experts when it reads its own file.
        merged = peft_model(base, **lora).merge_and_unload()  # type: ignore[operator]
    adapter = read_adapter(adapted, model.layout)
    mix, empty = bench.mix((adapter, 1.0)), bench.mix()
    exact = _Exact({empty.digest: base, mix.digest: merged})
    room = model.context_length
    texts = [_ids(min(length, room), seed) for seed, length in enumerate(_TEXTS)]
    # To where rows end, but for bases that have no end.
    longest = [_ids(min(room, _END) - back, 9 + back) for back in (0, 1)]
    worst = {"base": max(_compare(bench, t, (empty, empty), exact) for t in (texts, longest))}
    worst["corrected"] = _compare(bench, texts, (empty, mix), exact)
    bench.fold(mix)
    worst["folded"] = _compare(bench, texts, (mix, mix), exact)
    worst["corrected"] = max(worst["corrected"], _compare(bench, texts, (mix, empty), exact))
    worst["texts"] = _compare_texts(bench, (empty, mix, empty), exact)
    return Outcome(_WAYS[model.way], worst)


class _Exact:
    """transformers' and PEFT's own models in float64, uncached."""

    def __init__(self, models: dict[str, Any]) -> None:
        self._models = {digest: copy.deepcopy(model) for digest, model in models.items()}

    @torch.no_grad()
    def logits(self, mix: BoundMix, ids: Sequence[int]) -> Tensor:
        with in_float64():
            model = self._models[mix.digest].double()
            logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
        return logits


def _ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    # 0 is a padding token in some families.
    ids: list[int] = torch.randint(1, 256, (count,), generator=generator).tolist()
    return ids


def _distance(found: Tensor, exact: Tensor) -> float:
    spread = exact - exact.mean(-1, keepdim=True)
    return float(((found - exact).norm(dim=-1) / spread.norm(dim=-1)).max())


def _compare(
    bench: Bench, texts: list[list[int]], mixes: tuple[BoundMix, BoundMix], exact: _Exact
) -> float:
    """Run texts in pieces that share passes, but for their last tokens, which come one by one."""
    found: list[list[Tensor]] = [[] for _ in texts]
    done = [0 for _ in texts]
    while any(at < len(ids) for at, ids in zip(done, texts, strict=True)):
        spans = []
        for row, (at, ids) in enumerate(zip(done, texts, strict=True)):
            left = len(ids) - at
            piece = ids[at : at + (min(_PIECE, left - 2) if left > 2 else 1)]
            if piece:
                spans.append(Span(row, piece, at, whole=len(ids)))
                done[row] += len(piece)
        count = sum(len(span.ids) for span in spans)
        logits = bench.engine.runner.run(spans, range(count), [mixes[s.slot] for s in spans])
        for span, part in zip(spans, _split(logits, [len(s.ids) for s in spans]), strict=True):
            found[span.slot].append(part.cpu())
    return max(
        _distance(torch.cat(parts).double(), exact.logits(mix, ids))
        for parts, mix, ids in zip(found, mixes, texts, strict=True)
    )


def _split(logits: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = logits.clone().split(counts)  # type: ignore[no-untyped-call]
    return parts


def _compare_texts(bench: Bench, mixes: Sequence[BoundMix], exact: _Exact) -> float:
    """Let rows of a batch choose greedily; how far each choice is from the best, at most."""
    params = SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    room = bench.model.context_length - _NEW_TOKENS
    rows = [
        (mix, prompt := _ids(min(count, room), 7 + seed), bench.submit(prompt, mix, params)[1])
        for seed, (mix, count) in enumerate(zip(mixes, _PROMPTS, strict=True))
    ]
    bench.run()
    worst = 0.0
    for mix, prompt, client in rows:
        assert client.error is None, client.error
        assert len(client.tokens) == _NEW_TOKENS
        for at, token in enumerate(client.tokens):
            logits = exact.logits(mix, [*prompt, *client.tokens[:at]])[-1]
            worst = max(worst, float((logits.max() - logits[token]) / logits.std()))
    return worst


def table() -> dict[str, Outcome]:
    """Return what docs/families.md says of each model."""
    found = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `"):
            name, verdict, *figures = (cell.strip() for cell in line.strip("|").split("|"))
            worst = zip(_FIGURES, figures, strict=True) if figures[0] else ()
            found[name.strip("`")] = Outcome(verdict, {what: float(v) for what, v in worst})
    return found


def summary(outcomes: dict[str, Outcome]) -> str:
    """Return the README's table: model types by what becomes of them."""
    types: dict[str, dict[str, None]] = {}
    worst: dict[str, list[float]] = {}
    for name, outcome in outcomes.items():
        group = _group(outcome.verdict)
        types.setdefault(group, {})[name.partition("/")[0]] = None
        for what, value in outcome.worst.items():
            worst.setdefault(group, [0.0] * len(_FIGURES))
            at = _FIGURES.index(what)
            worst[group][at] = max(worst[group][at], value)
    lines = ["| | model types | " + " | ".join(_FIGURES) + " |", "|---|---|---:|---:|---:|---:|"]
    for group in sorted(types, key=lambda group: (group not in worst, -len(types[group]))):
        figures = [f"{value:.0e}" for value in worst.get(group, [])] or [""] * len(_FIGURES)
        lines.append(" | ".join([f"| {group}", ", ".join(types[group]), *figures]) + " |")
    return "\n".join(lines) + "\n"


def _group(verdict: str) -> str:
    if verdict in _WAYS.values():
        return f"**served**, {verdict}"
    return "refused: " + next(
        (words for words in _REASONS if words in verdict), "as it says itself"
    )


def _line(name: str, outcome: Outcome) -> str:
    figures = [f"{value:.0e}" for value in outcome.worst.values()] or [""] * len(_FIGURES)
    return " | ".join([f"| `{name}`", outcome.verdict, *figures]) + " |"


def main() -> None:
    """Measure some models, or all of them into the table."""
    names = sys.argv[1:] or list(ZOO)
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = measure(name, Path(folder), kernels=True)
            except Exception as error:  # The others are measured all the same.
                traceback.print_exc()
                outcome = Outcome(f"FAILED: {type(error).__name__}: {error}", {})
            lines.append(_line(name, outcome))
        print(lines[-1], flush=True)
    if not sys.argv[1:]:
        text = TABLE.read_text()
        TABLE.write_text(text[: text.index("| `")] + "\n".join(lines) + "\n")
        before, middle, after = README.read_text().partition(BEGIN)
        README.write_text(before + middle + summary(table()) + END + after.partition(END)[2])


if __name__ == "__main__":
    main()
