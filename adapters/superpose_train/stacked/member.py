"""One run of a stack: its rows and their order, its plan, and what it has come to so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from superpose_adapters.scoring import EncodedText
from superpose_train.data import Rows
from superpose_train.loss import check_finite
from superpose_train.options import Options
from superpose_train.peft_names import Factors
from superpose_train.schedule import Plan, learning_rates


@dataclass
class Progress:
    """What a run has come to; plain values, so that a checkpoint can hold them.

    Attributes:
        loss_sum: Of the training losses since the last that was logged.
        training: (step, mean training loss since the entry before).
        validation: (step, validation loss).
        best_step: Of the lowest validation loss, the first of several.
        best_loss: That loss.
    """

    loss_sum: float = 0.0
    training: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = float("inf")


@dataclass(eq=False)
class Member:
    """One run of a stack.

    Attributes:
        options: What was asked for.
        rows: Encoded.
        identity: Base, data and parameters, see `identity_of`.
        key: What the run is known by in a checkpoint.
        config: PEFT's.
        first_factors: A and B before the first step.
        plan: Its steps.
        rate: Learning rate of a step, from 0.
        generator: Of its dropout.
        progress: So far.
        best: (total,), the parameters of `progress.best_step`.
    """

    options: Options
    rows: Rows
    identity: dict[str, Any]
    key: str
    config: LoraConfig
    first_factors: Factors
    plan: Plan = field(init=False)
    rate: Callable[[int], float] = field(init=False)
    generator: torch.Generator = field(init=False)
    progress: Progress = field(default_factory=Progress)
    best: Tensor | None = None
    _order: tuple[int, list[int]] = (-1, [])

    def __post_init__(self) -> None:
        """Lay out the run."""
        self.plan = Plan.of(self.options, len(self.rows.train))
        self.rate = learning_rates(self.options, self.plan)
        self.generator = torch.Generator(self.options.torch_device)
        self.generator.manual_seed(self.options.seed)

    def batch(self, step: int) -> list[EncodedText]:
        """Return the rows of a step, from 0, in the order in which Trainer takes them."""
        rows, size = self.rows.train, self.options.batch_size
        epoch, at = divmod(step, -(-len(rows) // size))
        if self._order[0] != epoch:
            # Trainer's sampler begins each epoch at the seed plus the epoch's number.
            generator = torch.Generator().manual_seed(self.options.seed + epoch)
            self._order = (epoch, torch.randperm(len(rows), generator=generator).tolist())
        return [rows[index] for index in self._order[1][at * size : (at + 1) * size]]

    def note_training_loss(self, loss: float, steps: int) -> None:
        """Take the loss of step number `steps`, from 1.

        Raises:
            NotFinite: the mean that is to be logged is not finite.
        """
        progress = self.progress
        progress.loss_sum += loss
        if steps % self.plan.logging == 0:
            mean = progress.loss_sum / self.plan.logging
            check_finite(mean, "training loss", steps)
            progress.training.append([steps, mean])
            progress.loss_sum = 0.0

    def is_due(self, steps: int) -> bool:
        """Return whether the run is evaluated after so many steps."""
        return steps % self.plan.every == 0 or steps == self.plan.steps

    def note_validation_loss(self, loss: float, steps: int, parameters: Tensor) -> None:
        """Take the validation loss of `parameters` (total,).

        Raises:
            NotFinite: it is not.
        """
        check_finite(loss, "validation loss", steps)
        self.progress.validation.append([steps, loss])
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, steps
            self.best = parameters.detach().clone()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "progress": asdict(self.progress),
            "best": self.best,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any], device: str) -> None:
        """Go on from a checkpoint."""
        self.progress = Progress(**state["progress"])
        self.best = None if state["best"] is None else state["best"].to(device)
        self.generator.set_state(state["generator"])
