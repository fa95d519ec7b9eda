"""What the paper leaves open, and what was done here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.study import Study
from superpose_train.precision import trained_precision
from superpose_train.schedule import EVALUATIONS, WARMUP_PARTS
from superpose_train.stacked.factors import BETAS, EPSILON, MAX_GRADIENT_NORM


def choices(study: Study, trained: Mapping[str, Any] | None) -> list[str]:
    """Return one line for each choice.

    Args:
        study: Says what was asked for.
        trained: What the trainer said of the first adapter, if it was trained.
    """
    training, evaluation, tuning = (
        study.config.training,
        study.config.evaluation,
        study.config.tuning,
    )
    searched = tuning is not None and tuning.apply
    sizes = ", ".join(
        f"{domain} all {study.rows(domain):,}"
        if study.rows(domain) == each.rows["train"]
        else f"{domain} {study.rows(domain):,} of {each.rows['train']:,}, drawn by the seed"
        for domain, each in study.inputs.files.items()
    )
    found = "as the search found (see Tuning)"
    before = "".join(f"{token}, " for token in study.inputs.special_tokens)
    lines = [
        f"Training rows: {sizes}. A joint adapter is trained on the rows that its seed draws from "
        "each of its domains. Epochs and rows a batch: "
        + (found if searched else f"{training.epochs:g} and {training.batch_size}")
        + ".",
        f"A row is {before}the template {training.template!r} and the end-of-text token, cut on "
        f"the right at {training.max_length} tokens; one row an example, pads masked. The loss is "
        + ("on all tokens but the first" if training.loss_scope == "all" else "on the answer only")
        + ", its mean is over tokens and not over rows.",
        f"AdamW (betas {BETAS[0]:g} and {BETAS[1]:g}, epsilon {EPSILON:g}, no weight decay), "
        "learning rate "
        + (found if searched else f"{training.learning_rate:g}")
        + f" after {100 / WARMUP_PARTS:g} % of the steps, then {training.schedule}; gradients cut "
        f"at norm {MAX_GRADIENT_NORM:g}; dropout "
        + (found if searched else f"{training.dropout:g}")
        + f". Of {EVALUATIONS} looks at {training.eval_rows or 'all'} validation rows a domain the "
        "best is the adapter.",
        f"Scored: {evaluation.test_rows or 'all'} test rows a domain, the same for every model; "
        f"weights are chosen on {evaluation.validation_rows or 'all'} validation rows. A pair or "
        "triple is scored on the rows of its domains together, and each domain apart.",
    ]
    if trained:
        targets = ", ".join(trained["parameters"]["target_modules"])
        lines.append(
            f"Adapted: {targets}; {trained['trained_parameters']:,} parameters an adapter of rank "
            f"{training.rank}. Trained on {trained['device']}, the frozen base in "
            + ("bfloat16 by autocast" if trained_precision(trained) == "bfloat16" else "float32")
            + "."
        )
    return lines
