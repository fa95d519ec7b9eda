"""A stack at work: its steps, evaluations and checkpoint, and how finished runs leave it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from superpose_adapters.durable import replacing
from superpose_adapters.scoring import EncodedText, Loss, Scope
from superpose_train.loss import (
    Figures,
    NotFinite,
    evaluate_loss,
    figures_by_part,
    pad_right,
)
from superpose_train.peft_names import to_peft
from superpose_train.precision import Decided, autocast
from superpose_train.record import record_of, write_adapter, writing
from superpose_train.schedule import EVALUATION_BATCH
from superpose_train.stacked.factors import Corrector, Dropout, Shape, StackedAdamW
from superpose_train.stacked.loss import backward
from superpose_train.stacked.member import Member

_CHECKPOINT = "checkpoint.pt"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """The frozen base that all runs share.

    Attributes:
        model: On the device.
        pad: Any token id.
        device: cpu or cuda.
        precision: What it computes in while adapters are trained.
    """

    model: Any
    pad: int
    device: str
    precision: Decided


def held_keys(work: Path) -> set[str]:
    """Return the keys of the runs that the checkpoint in a work folder holds."""
    checkpoint = work / _CHECKPOINT
    if not checkpoint.exists():
        return set()
    return set(torch.load(checkpoint, map_location="cpu", weights_only=True)["members"])


class Stack:
    """The runs that are trained at one time."""

    def __init__(
        self, base: Base, members: list[Member], work: Path, max_stack: int, tell: Tell
    ) -> None:
        """Take the runs; `work` holds their checkpoint until all are done."""
        self._base = base
        self._members = members
        self._max_stack = max_stack
        self._tell = tell
        modules = tuple(
            (name, a.shape[1], b.shape[0]) for name, (a, b) in members[0].first_factors.items()
        )
        self._shape = Shape(modules, max(member.options.rank for member in members))
        self._work = work
        self._base_figures: dict[tuple[int, Scope], Figures] = {}
        self._steps = 0
        self._size = len(members)
        self._resumed = False

    def run(self) -> None:
        """Train the runs to their ends."""
        self._began = time.monotonic()
        self._start()
        every = max(member.plan.every for member in self._members)
        self._corrector = Corrector(self._base.model, self._shape)
        try:
            if not self._resumed:
                self._save()
            while True:
                self._release()
                if not self._members:
                    break
                self._step()
                self._evaluate()
                if self._steps % every == 0:
                    self._save()
        finally:
            self._corrector.remove()
        shutil.rmtree(self._work)

    def _start(self) -> None:
        device = self._base.device
        if (self._work / _CHECKPOINT).exists():
            state = torch.load(self._work / _CHECKPOINT, map_location="cpu", weights_only=True)
            self._steps, self._size, self._resumed = state["steps"], state["size"], True
            # The widest adapter may have left since.
            self._shape = replace(self._shape, rank=state["rank"])
            states, by_key = state["members"], {member.key: member for member in self._members}
            # Those that are missing here were written just before a kill, or are not asked for.
            kept = [row for row, key in enumerate(states) if key in by_key]
            adamw = StackedAdamW(*(tensor.to(device) for tensor in state["adamw"]))
            self._adamw = adamw.keep(kept)
            self._members = [by_key[key] for key in states if key in by_key]
            for member in self._members:
                member.restore(states[member.key], device)
            return
        parameters = torch.stack([self._shape.pack(m.first_factors) for m in self._members])
        mask = torch.stack(
            [
                self._shape.factor_mask(m.options.rank, train_a=m.options.frozen_a is None)
                for m in self._members
            ]
        )
        zeros = torch.zeros_like(parameters)
        self._adamw = StackedAdamW(
            *(tensor.to(device, copy=True) for tensor in (parameters, mask, zeros, zeros))
        )

    def _save(self) -> None:
        """Write the checkpoint, the old one staying until the new one is whole."""
        adamw = self._adamw
        state = {
            "steps": self._steps,
            "size": self._size,
            "rank": self._shape.rank,
            "members": {member.key: member.state() for member in self._members},
            "adamw": [adamw.parameters, adamw.mask, adamw.first, adamw.second],
        }
        checkpoint = self._work / _CHECKPOINT
        with replacing(checkpoint) as fresh, writing(checkpoint):
            torch.save(state, fresh)

    def _scaling(self, members: Sequence[Member]) -> torch.Tensor:
        values = [member.options.alpha / member.options.rank for member in members]
        return torch.tensor(values, device=self._base.device).view(-1, 1, 1)

    def _step(self) -> None:
        """Take one step with every active run."""
        members = self._members
        batches = [member.batch(self._steps) for member in members]
        inputs = self._inputs(members, batches)
        shares = [member.options.dropout for member in members]
        dropout = None
        if any(shares):
            shapes = [(len(batch), max(len(row.ids) for row in batch)) for batch in batches]
            dropout = Dropout(shares, [member.generator for member in members], shapes)
        parameters = self._adamw.parameters.detach().requires_grad_()
        factors = self._shape.factors(parameters)
        with (
            self._corrector.using(factors, self._scaling(members), dropout),
            autocast(self._base.precision, self._base.device),
        ):
            losses = backward(
                self._base.model,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["labels"],
                len(members),
            )
        assert parameters.grad is not None
        rates = [member.rate(self._steps) for member in members]
        self._adamw.step(parameters.grad, rates, self._steps + 1)
        self._steps += 1
        for member, loss in zip(members, losses.tolist(), strict=True):
            with _named(member):
                member.note_training_loss(loss, self._steps)

    def _inputs(
        self, members: Sequence[Member], batches: Sequence[list[EncodedText]]
    ) -> dict[str, torch.Tensor]:
        """Return the rows of all, each run's filled up to the batch size with rows of one token."""
        size = members[0].options.batch_size
        padded = []
        longest = max(len(row.ids) for batch in batches for row in batch)
        for member, batch in zip(members, batches, strict=True):
            filler = [EncodedText((self._base.pad,), 0)] * (size - len(batch))
            inputs = pad_right([*batch, *filler], self._base.pad, member.options.loss_scope)
            padded.append((inputs, longest - inputs["input_ids"].shape[1]))
        fill = {"input_ids": self._base.pad, "attention_mask": 0, "labels": -100}
        return {
            name: torch.cat(
                [
                    torch.nn.functional.pad(inputs[name], (0, missing), value=value)
                    for inputs, missing in padded
                ]
            ).to(self._base.device)
            for name, value in fill.items()
        }

    def _evaluate(self) -> None:
        """Measure the validation loss of the runs for which it is time."""
        losses = []
        for row, member in enumerate(self._members):
            if member.is_due(self._steps):
                parameters = self._adamw.parameters[row]
                loss = self._measure(member, parameters, member.rows.validation)
                with _named(member):
                    member.note_validation_loss(loss.mean, self._steps, parameters)
                losses.append(loss.mean)
        if losses:
            self._tell(
                f"step {self._steps}: validation loss {min(losses):.3f} to {max(losses):.3f} of "
                f"{len(losses)} of {len(self._members)} adapters"
            )

    def _measure(
        self, member: Member, parameters: torch.Tensor, rows: Sequence[EncodedText]
    ) -> Loss:
        factors = self._shape.factors(parameters.unsqueeze(0))
        with self._corrector.using(factors, self._scaling([member])):
            return self._evaluated(member, rows)

    def _evaluated(self, member: Member, rows: Sequence[EncodedText]) -> Loss:
        return evaluate_loss(
            self._base.model, rows, self._base.pad, EVALUATION_BATCH, member.options.loss_scope
        )

    def _release(self) -> None:
        """Write the runs that are done and take them off the stack."""
        done = [member for member in self._members if member.plan.steps == self._steps]
        if not done:
            return
        # A kill among the writes is taken up from here, where those already written only leave.
        self._save()
        for member in done:
            self._write(member)
        rows = [row for row, member in enumerate(self._members) if member not in done]
        self._members = [self._members[row] for row in rows]
        self._adamw = self._adamw.keep(rows)
        if self._members:
            self._save()

    def _write(self, member: Member) -> None:
        options, progress, best = member.options, member.progress, member.best
        assert best is not None
        key = (id(member.rows), options.loss_scope)
        if key not in self._base_figures:
            self._base_figures[key] = figures_by_part(
                lambda texts: self._evaluated(member, texts), member.rows, self._steps
            )
        with _named(member):
            adapter_figures = figures_by_part(
                lambda texts: self._measure(member, best, texts), member.rows, self._steps
            )
        trained = self._shape.factor_mask(
            options.rank, train_a=options.frozen_a is None
        ).count_nonzero()
        record = record_of(
            options,
            member.identity,
            trained_parameters=int(trained),
            steps=self._steps,
            best_step=progress.best_step,
            base_figures=self._base_figures[key],
            adapter_figures=adapter_figures,
            training=progress.training,
            validation=progress.validation,
            resumed=self._resumed,
            began=self._began,
            stack={"size": self._size, "max_stack": self._max_stack},
        )
        tensors = to_peft(self._shape.unpack(best, options.rank))
        write_adapter(tensors, member.config, record["base"], record, options.out)
        self._tell(
            f"wrote {options.out}: test perplexity {adapter_figures['test']['perplexity']:.2f}"
        )


@contextmanager
def _named(member: Member) -> Iterator[None]:
    """Put the run's name before what is said of a loss that is not finite."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{member.options.name} ({member.options.out}): {error}") from error
