"""What the paper leaves open, and what was done here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.study import Study
from superpose_adapters.stacked_factors import BETAS, EPSILON, MAX_GRADIENT_NORM
from superpose_adapters.training_schedule import EVALUATIONS, WARMUP_PARTS


def choices(study: Study, trained: Mapping[str, Any] | None) -> list[str]:
    """Return one line for each choice.

    Args:
        study: Says what was asked for.
        trained: What the trainer said of the first adapter, if it was trained.
    """
    training, evaluation = study.config.training, study.config.evaluation
    sizes = [
        f"{domain} {study.rows(domain):,} of {each.rows['train']:,} rows"
        for domain, each in study.inputs.files.items()
    ]
    lines = [
        f"Training rows, drawn anew for every seed: {', '.join(sizes)}; epochs "
        f"{training.epochs:g}, batches of {training.batch_size}. A joint adapter sees all rows of "
        "its domains.",
        f"A row is the template {training.template!r} and the end-of-text token, cut on the right "
        f"at {training.max_length} tokens; one row an example, pads masked. The loss is "
        + ("on all tokens but the first" if training.loss_scope == "all" else "on the answer only")
        + ", its mean is over tokens and not over rows.",
        f"AdamW (betas {BETAS[0]:g} and {BETAS[1]:g}, epsilon {EPSILON:g}, no weight decay), "
        f"learning rate {training.learning_rate:g} after {100 / WARMUP_PARTS:g} % of the steps, "
        f"then {training.schedule}; gradients cut at norm {MAX_GRADIENT_NORM:g}; dropout "
        f"{training.dropout:g}. Of {EVALUATIONS} looks at "
        f"{training.eval_rows or 'all'} validation rows a domain the best is the adapter.",
        f"Scored: {evaluation.test_rows or 'all'} test rows a domain, the same for every model; "
        f"weights are chosen on {evaluation.validation_rows or 'all'} validation rows. A pair or "
        "triple is scored on the rows of its domains together, and each domain apart.",
    ]
    if trained:
        targets = ", ".join(trained["parameters"]["target_modules"])
        lines.append(
            f"Adapted: {targets}; {trained['trained_parameters']:,} parameters an adapter of rank "
            f"{training.rank}. Trained on {trained['device']}, the frozen base in "
            + ("bfloat16 by autocast" if trained["bf16_autocast"] else "float32")
            + "."
        )
    return lines
