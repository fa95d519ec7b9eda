"""How long a run is, when it is evaluated, and its learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from superpose_train.options import Options, Schedule

EVALUATIONS = 8
EVALUATION_BATCH = 32
# The learning rate rises in the first of so many parts of a run.
WARMUP_PARTS = 20


@dataclass(frozen=True)
class Plan:
    """Numbers of steps.

    Attributes:
        steps: In all.
        warmup: In which the learning rate rises.
        every: Between evaluations; there is one after the last step, too.
        logging: Between logged training losses.
    """

    steps: int
    warmup: int
    every: int
    logging: int

    @classmethod
    def of(cls, options: Options, rows: int) -> Plan:
        """Return the plan of a run over so many training rows."""
        steps = options.max_steps
        if steps is None:
            steps = math.ceil(math.ceil(rows / options.batch_size) * options.epochs)
        every = max(1, math.ceil(steps / EVALUATIONS))
        return cls(steps, steps // WARMUP_PARTS, every, max(1, every // 4))


def trainer_schedule(schedule: Schedule) -> str:
    """Return transformers' name of a schedule that begins with a warm-up."""
    return "constant_with_warmup" if schedule == "constant" else schedule


def learning_rates(options: Options, plan: Plan) -> Callable[[int], float]:
    """Return the learning rate of a step, counted from 0, as transformers.Trainer sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate)
    scheduler: Any = get_scheduler(
        trainer_schedule(options.schedule),
        optimizer,
        num_warmup_steps=plan.warmup,
        num_training_steps=plan.steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: options.learning_rate * factor(step)
