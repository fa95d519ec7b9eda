"""`superpose-train`: the command, which trains once or tunes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from superpose_adapters.scoring import Scope
from superpose_train.frozen_a import FrozenA
from superpose_train.options import Options, Schedule
from superpose_train.precision import Precision
from superpose_train.processes import is_main_process, part
from superpose_train.scratch_memory import keep_scratch
from superpose_train.train import train
from superpose_train.tuning.tune import tune


def _numbers(text: str) -> int | tuple[int, ...]:
    """Read "500" as a number and "500,1500" as a tuple."""
    numbers = tuple(int(part) for part in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def _frozen_a(text: str) -> FrozenA:
    if text == "random":
        return "random"
    block, blocks = text.split("/")
    return int(block), int(blocks)


def _template(text: str) -> str:
    # A shell makes it hard to type a line break.
    return text.replace("\\n", "\n")


_numbers.__name__ = "number or numbers"  # argparse: "invalid number or numbers value"
_frozen_a.__name__ = "random or I/N"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="superpose-train",
        description="Train a LoRA adapter on question-answer rows.",
        epilog="Rows are split 80:10:10 by a hash of the question with its numbers masked. "
        "An interrupted run goes on when the same command is repeated. docs/training.md has more.",
    )
    add = parser.add_argument
    add("--base", required=True, help="mini, smollm2, a transformers folder, or a Hub id")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="trained on jointly: JSONL or JSONL.gz files, or Hub datasets as owner/name[:config]",
    )
    add("--question-column", default=Options.question_column, help="default %(default)s")
    add("--answer-column", default=Options.answer_column, help="default %(default)s")
    add("--name", required=True, help="the domain's name")
    add("--out", required=True, type=Path, help="PEFT folder to create")
    add("--rank", type=int, default=Options.rank, help="default %(default)s")
    add("--alpha", type=float, default=Options.alpha, help="default %(default)s")
    add(
        "--target-modules",
        default="",
        metavar="NAME,...",
        help="default by architecture: GPT-2 c_attn,c_proj; Llama all its projections",
    )
    add(
        "--max-length",
        type=int,
        default=Options.max_length,
        help="tokens a row, cut on the right; default %(default)s",
    )
    add(
        "--template",
        type=_template,
        default=Options.template,
        help=r"text of a row, ends in {a}; \n is a line break; default Question: {q}\nAnswer: {a}",
    )
    add(
        "--no-special-tokens",
        dest="special_tokens",
        action="store_false",
        help="train on the template alone, without what the base's tokenizer puts before a text "
        "(BOS of Llama and Gemma) and serving shows",
    )
    add(
        "--loss-scope",
        choices=get_args(Scope),
        default=Options.loss_scope,
        help="tokens that are trained on and measured; default %(default)s",
    )
    add("--epochs", type=float, default=Options.epochs, help="default %(default)s")
    add("--max-steps", type=int, help="steps in all, in place of --epochs")
    add(
        "--batch-size",
        type=int,
        default=Options.batch_size,
        help="rows a step, of all processes together; default %(default)s",
    )
    add("--learning-rate", type=float, default=Options.learning_rate, help="default %(default)s")
    add(
        "--schedule",
        choices=get_args(Schedule),
        default=Options.schedule,
        help="of the learning rate, after a warm-up of 5 %% of the steps; default %(default)s",
    )
    add("--dropout", type=float, default=Options.dropout, help="default %(default)s")
    add(
        "--seed",
        type=int,
        default=Options.seed,
        help="order of the rows, dropout, samples; default %(default)s",
    )
    add("--init-seed", type=int, help="the adapter's first factors; default --seed")
    add(
        "--frozen-a",
        type=_frozen_a,
        metavar="random|I/N",
        help="train B alone; A is random, by --init-seed, or block I of N disjoint blocks of "
        "orthogonal rows",
    )
    add(
        "--sparsity",
        type=float,
        metavar="SHARE",
        help="with --frozen-a: train twice, the second time all of B but this share of it, which "
        "were its smallest entries after the first (LoRI: 0.9)",
    )
    add(
        "--orthogonal-to",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="PEFT folders of domains whose deltas are active, and frozen, in training, while a "
        "penalty keeps the A's orthogonal to theirs (O-LoRA); what is trained is the sum",
    )
    add(
        "--orthogonality",
        type=float,
        default=Options.orthogonality,
        metavar="LAMBDA",
        help="factor of that penalty; default %(default)s",
    )
    add(
        "--norm-penalty",
        type=float,
        default=Options.norm_penalty,
        metavar="LAMBDA",
        help="factor of the norms of A and B, beside it; default %(default)s",
    )
    add(
        "--max-rows",
        type=_numbers,
        metavar="N[,N...]",
        help="training rows, sampled: one number for each source or one for all; default all",
    )
    add("--max-eval-rows", type=int, help="validation and test rows a source; default all")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=Options.device,
        help="default %(default)s",
    )
    add(
        "--precision",
        choices=get_args(Precision),
        default=Options.precision,
        help="what the frozen base computes in: auto is bfloat16 where the processor or GPU is "
        "fast at it, else float32; default %(default)s",
    )
    add(
        "--tune",
        type=int,
        metavar="N",
        help="search dropout, batch size, epochs and learning rate with N trials in all; "
        "their own flags are then not used",
    )
    return parser


def read_command(arguments: Sequence[str] | None) -> tuple[Options, int | None]:
    """Return the options and the number of tuning trials, None to train once.

    Raises:
        ValueError: values that no run can use.
        SystemExit: a command line that argparse refuses.
    """
    fields = vars(build_parser().parse_args(arguments))
    trials: int | None = fields.pop("tune")
    if trials is not None and trials < 1:
        raise ValueError(f"--tune must be at least 1, got {trials}")
    fields["data"] = tuple(fields["data"])
    fields["orthogonal_to"] = tuple(fields["orthogonal_to"])
    fields["target_modules"] = tuple(
        name for part in fields["target_modules"].split(",") if (name := part.strip())
    )
    return Options(**fields), trials


def _beside(record: dict[str, Any]) -> str:
    domains = [past["domain"] for past in record["orthogonal_to"]]
    return f", in a sum with {', '.join(domains)}" if domains else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr (argparse exits with 2)."""
    keep_scratch()
    # What is wrong for one process is wrong for all; one line says it.
    complain = sys.stderr if is_main_process() else None
    try:
        options, trials = read_command(arguments)
        record = train(options) if trials is None else tune(options, trials)["record"]
    except (ValueError, OSError) as error:
        if complain:
            print(f"superpose-train: {' '.join(str(error).split())}", file=complain)
        return 1
    except KeyboardInterrupt:
        if complain:
            print("superpose-train: interrupted; repeat the command to go on", file=complain)
        return 1
    finally:
        part()
    before = record["base_figures"]["test"]["perplexity"]
    after = record["adapter_figures"]["test"]["perplexity"]
    if is_main_process():
        print(
            f"wrote {options.out}: test perplexity {before:.2f} -> {after:.2f} "
            f"({100 * (after / before - 1):+.1f} %){_beside(record)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
