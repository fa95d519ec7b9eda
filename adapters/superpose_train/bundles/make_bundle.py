"""Make a bundle anew: three adapters, held-out rows, their figures, and the base of `mini`.

`python -m superpose_train.bundles.make_bundle NAME --data FOLDER --out DIR` fills DIR with what
`superpose_adapters/NAME` holds, except for card and licences. What DIR already has is kept, so a
run that was stopped goes on where it was; the figures are taken anew each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import BUNDLES, DOMAINS, MINI, SMOLLM2, Bundle
from superpose_adapters.durable import replacing
from superpose_adapters.qa import Row, read_rows, split_key, split_rows
from superpose_adapters.scoring import Scope
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.bundles.pretrain import Settings, pretrain
from superpose_train.loss import evaluate_loss
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
MAX_ROWS = 2000
HELD_OUT_ROWS = 48
# A held-out row fits whole into `mini`'s context of 256 tokens, where `Score` truncates by default.
HELD_OUT_TOKENS = 224


@dataclass(frozen=True)
class Recipe:
    """How the adapters of a bundle are made.

    Attributes:
        training: Fields of `Options`, where they are not the trainer's defaults.
        stored: What the factors are stored in; they are trained in float32.
    """

    training: Mapping[str, Any]
    stored: torch.dtype


# A precision by name, so that adapters come out alike whatever processor makes them again.
RECIPES = {
    MINI.name: Recipe({"epochs": 2, "max_eval_rows": 400, "precision": "float32"}, torch.float32),
    SMOLLM2.name: Recipe(
        {
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": 4e-4,
            "max_eval_rows": 64,
            "precision": "bfloat16",
        },
        torch.float16,
    ),
}


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


def store_as(dtype: torch.dtype, adapter: Path) -> None:
    """Write an adapter's factors again, in `dtype`."""
    file = adapter / "adapter_model.safetensors"
    factors = {name: factor.to(dtype) for name, factor in load_file(file).items()}
    with replacing(file) as fresh:
        save_file(factors, fresh, metadata={"format": "pt"})
        fresh.chmod(0o644)


def measure(base: Path, folder: Path, scope: Scope) -> dict[str, dict[str, float]]:
    """Return the held-out perplexity {domain: {"base" or adapter: perplexity}}, whole rows.

    Args:
        base: The base's folder.
        folder: Where the bundle's adapters and held-out rows are.
        scope: The tokens that count.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    encoder = TextEncoder(tokenizer, vocabulary_of(model))
    rows = {
        domain: [
            encoder.row(row.question, row.answer, HELD_OUT_TOKENS)
            for row in read_rows(folder / "held_out" / f"{domain}.jsonl")
        ]
        for domain in DOMAINS
    }
    pad = tokenizer.eos_token_id

    def perplexities() -> dict[str, float]:
        return {
            domain: evaluate_loss(model, rows[domain], pad, 16, scope).perplexity for domain in rows
        }

    columns = {"base": perplexities()}
    for name in DOMAINS:
        with library_warnings_ignored():
            adapted = PeftModel.from_pretrained(model, folder / "adapters" / name)
        columns[name] = perplexities()
        model = adapted.unload()
    return {domain: {name: columns[name][domain] for name in columns} for domain in rows}


def make_bundle(bundle: Bundle, data: Path, corpus: Path | None, out: Path) -> dict[str, Any]:
    """Fill `out` with what is missing there; return its figures, also written to figures.json.

    Args:
        bundle: Which one.
        data: Folder of DATA_FILES.
        corpus: Text for a base that is pretrained here, if `out` has none.
        out: The folder.

    Raises:
        ValueError: the base is missing and no corpus is given, or bad data.
    """
    base = _base(bundle, corpus, out)
    encoder = TextEncoder(
        AutoTokenizer.from_pretrained(base),
        vocabulary_of(AutoModelForCausalLM.from_pretrained(base)),
    )
    recipe = RECIPES[bundle.name]
    for domain in DOMAINS:
        file = data / DATA_FILES[domain]
        adapter = out / "adapters" / domain
        if not adapter.exists():
            train(
                Options(
                    base=str(base),
                    data=(file,),
                    name=domain,
                    out=adapter,
                    label=bundle.name,
                    max_length=MAX_LENGTH,
                    max_rows=MAX_ROWS,
                    **recipe.training,
                )
            )
        store_as(recipe.stored, adapter)
        rows = out / "held_out" / f"{domain}.jsonl"
        if not rows.exists():
            write_held_out(held_out_rows(file, encoder), rows)
    figures = {
        "held_out_perplexity": measure(base, out, "all"),
        "held_out_answer_perplexity": measure(base, out, "answer"),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return figures


def _base(bundle: Bundle, corpus: Path | None, out: Path) -> Path:
    if bundle.packaged is not None:
        return bundle.base()
    base = out / "base"
    if not base.exists():
        if corpus is None:
            raise ValueError(f"{base} is missing: name the pretraining text with --corpus")
        pretrain(corpus, base, Settings(), TOKENS)
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m superpose_train.bundles.make_bundle",
        description="Make a bundle's adapters and held-out rows, and the base of mini.",
    )
    parser.add_argument("bundle", choices=BUNDLES)
    folder = os.environ.get("SUPERPOSE_DATA")
    parser.add_argument(
        "--data",
        type=Path,
        default=folder,
        required=folder is None,
        help=f"folder with {', '.join(DATA_FILES.values())}; SUPERPOSE_DATA when absent",
    )
    parser.add_argument("--corpus", type=Path, help="text for the base of mini, if OUT has none")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        bundle = BUNDLES[options.bundle]
        figures = make_bundle(bundle, Path(options.data), options.corpus, options.out)
    except (ValueError, OSError) as error:
        print(f"make_bundle: {error}", file=sys.stderr)
        return 1
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
