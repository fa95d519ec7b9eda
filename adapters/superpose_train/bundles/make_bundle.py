"""Make the bundled `mini` anew: base, three adapters, held-out rows and their figures.

`python -m superpose_train.mini.make_mini --data FOLDER --corpus FILE --out DIR` fills DIR with what
`superpose_adapters/mini` holds, except for the card. What DIR already has is kept, so a run that
was stopped goes on where it was; the figures are taken anew each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import MINI, MINI_DOMAINS
from superpose_adapters.qa import Row, read_rows, split_key, split_rows
from superpose_adapters.scoring import Scope
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.loss import evaluate_loss
from superpose_train.mini.pretrain import Settings, pretrain
from superpose_train.model import library_warnings_ignored
from superpose_train.options import Options
from superpose_train.train import train

DATA_FILES = {
    "math": "math.jsonl.gz",
    "medicine": "medicine.jsonl.gz",
    "finance": "finance_stock_trading.jsonl.gz",
}
TOKENS = 4_505_600
MAX_LENGTH = 128
HELD_OUT_ROWS = 48
# A held-out row fits the context of 256 tokens whole, in which `Score` truncates by default.
HELD_OUT_TOKENS = 224


def held_out_rows(path: Path, encoder: TextEncoder) -> list[Row]:
    """Return 48 rows of the test part, no two of them twins, in the order of their hashes."""
    chosen: dict[str, Row] = {}
    for row in split_rows(read_rows(path)).test:
        ids = encoder.row(row.question, row.answer, HELD_OUT_TOKENS + 1).ids
        if len(ids) <= HELD_OUT_TOKENS:
            chosen.setdefault(split_key(row.question), row)
    ordered = sorted(chosen, key=lambda key: hashlib.sha256(key.encode()).digest())
    return [chosen[key] for key in ordered[:HELD_OUT_ROWS]]


def write_held_out(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSONL with question and answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps({"question": row.question, "answer": row.answer}, ensure_ascii=False)
        for row in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def measure(folder: Path, scope: Scope) -> dict[str, dict[str, float]]:
    """Return the held-out perplexity {domain: {"base" or adapter: perplexity}}, whole rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    encoder = TextEncoder(tokenizer, vocabulary_of(model))
    rows = {
        domain: [
            encoder.row(row.question, row.answer, tokenizer.model_max_length)
            for row in read_rows(folder / "held_out" / f"{domain}.jsonl")
        ]
        for domain in MINI_DOMAINS
    }
    pad = tokenizer.eos_token_id

    def perplexities() -> dict[str, float]:
        return {
            domain: evaluate_loss(model, rows[domain], pad, 16, scope).perplexity for domain in rows
        }

    columns = {"base": perplexities()}
    for name in MINI_DOMAINS:
        with library_warnings_ignored():
            adapted = PeftModel.from_pretrained(model, folder / "adapters" / name)
        columns[name] = perplexities()
        model = adapted.unload()
    return {domain: {name: columns[name][domain] for name in columns} for domain in rows}


def make_mini(data: Path, corpus: Path | None, out: Path) -> dict[str, Any]:
    """Fill `out` with what is missing there; return its figures, also written to figures.json.

    Raises:
        ValueError: the base is missing and no corpus is given, or bad data.
    """
    base = out / "base"
    if not base.exists():
        if corpus is None:
            raise ValueError(f"{base} is missing: name the pretraining text with --corpus")
        pretrain(corpus, base, Settings(), TOKENS)
    encoder = TextEncoder(
        AutoTokenizer.from_pretrained(base),
        vocabulary_of(AutoModelForCausalLM.from_pretrained(base)),
    )
    for domain in MINI_DOMAINS:
        file = data / DATA_FILES[domain]
        adapter = out / "adapters" / domain
        if not adapter.exists():
            train(
                Options(
                    base=str(base),
                    data=(file,),
                    name=domain,
                    out=adapter,
                    label=MINI,
                    max_length=MAX_LENGTH,
                    epochs=2,
                    max_rows=2000,
                    max_eval_rows=400,
                    precision="float32",
                )
            )
        rows = out / "held_out" / f"{domain}.jsonl"
        if not rows.exists():
            write_held_out(held_out_rows(file, encoder), rows)
    figures = {
        "held_out_perplexity": measure(out, "all"),
        "held_out_answer_perplexity": measure(out, "answer"),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m superpose_train.mini.make_mini",
        description="Make the bundled base, its adapters and held-out rows.",
    )
    folder = os.environ.get("SUPERPOSE_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=folder,
        required=folder is None,
        help=f"folder with {', '.join(DATA_FILES.values())}; SUPERPOSE_DATA when absent",
    )
    parser.add_argument("--corpus", type=Path, help="text for the base, if OUT has none")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        figures = make_mini(Path(options.data), options.corpus, options.out)
    except (ValueError, OSError) as error:
        print(f"make_mini: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
