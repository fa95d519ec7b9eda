"""Train one LoRA adapter on question-answer rows, offline.

PEFT makes the adapter, transformers.Trainer runs it, twice where B is to be sparse. The result is a
PEFT folder with a record, `training.json`, and appears under `--out` only when it is complete.
Until then everything lies in `.OUT.work`; the same command takes an interrupted run up again and
ends with the same adapter.

Under `accelerate launch` or torchrun every process trains on its share of each batch; the first
one alone claims the work folder, writes and prints.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from superpose_adapters.base.facts import read_facts
from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.durable import write_file
from superpose_adapters.scoring import EncodedText, Loss, Scope
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.data import Rows, check_sources, read_data
from superpose_train.loss import Figures, check_finite, evaluate_loss, figures_by_part, pad_right
from superpose_train.model import (
    attach_adapter,
    check_context,
    choose_targets,
    detach_adapter,
    library_warnings_ignored,
    load_base,
)
from superpose_train.options import Options
from superpose_train.orthogonal import Penalty
from superpose_train.past import check_past, read_past
from superpose_train.peft_names import factors_of
from superpose_train.precision import Decided, autocast
from superpose_train.processes import is_main_process, process_count, wait_for_all
from superpose_train.record import identity_of, record_of, write_adapter, writing
from superpose_train.schedule import EVALUATION_BATCH, Plan, trainer_schedule
from superpose_train.sparse_b import largest_entries, train_entries
from superpose_train.work_folder import work_folder


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trainer whose validation loss is the project's own: a mean over tokens, not over batches.

    Autocast is its own too, around training steps alone: Trainer's stays with the model, so that
    losses would be measured under it as well.
    """

    def __init__(
        self,
        *,
        validation: list[EncodedText],
        pad: int,
        precision: Decided,
        scope: Scope = "all",
        penalty: Penalty | None = None,
        **options: Any,
    ) -> None:
        """Take the validation rows and what is added to a step's loss beside Trainer's arguments.

        `pad` is any token id.
        """
        super().__init__(eval_dataset=validation, **options)
        self._validation = validation
        self._pad = pad
        self._precision: Decided = precision
        self._scope: Scope = scope
        self._penalty = penalty

    def compute_loss_context_manager(self) -> torch.autocast:
        """Return the context of a training step."""
        return autocast(self._precision, self.args.device.type)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss of a training step, with the penalty if there is one."""
        loss = super().compute_loss(*arguments, **options)
        return loss if self._penalty is None else loss + self._penalty()

    def go_on(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if there is one, and load the best factors."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                # Trainer would take one step more where the last one does not end an epoch.
                self.state = state
                self._load_best_model()
                return
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with writing(Path(self.args.output_dir)):
            super()._save_checkpoint(*arguments, **options)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log `eval_loss` and `eval_perplexity` of the validation rows."""
        # Every process measures all rows: they are few, and all must choose the same checkpoint.
        loss = evaluate_loss(self.model, self._validation, self._pad, EVALUATION_BATCH, self._scope)
        metrics = {"eval_loss": loss.mean, "eval_perplexity": loss.perplexity}
        check_finite(loss.mean, "validation loss", self.state.global_step)
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class RefuseNaN(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Ends a run at the first logged loss that is not finite, before it is saved as a best one."""

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise NotFinite on a training loss that is NaN or infinite."""
        if logs and "loss" in logs:
            check_finite(float(logs["loss"]), "training loss", state.global_step)


def training_arguments(options: Options, work: Path, plan: Plan) -> TrainingArguments:
    """Return Trainer's settings: an evaluation and a checkpoint after each eighth of the run.

    Raises:
        ValueError: --batch-size cannot be shared out evenly among the processes.
    """
    processes = process_count()
    if options.batch_size % processes:
        raise ValueError(
            f"--batch-size {options.batch_size} cannot be shared out among {processes} processes"
        )
    device = options.torch_device
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=options.batch_size // processes,
        per_device_eval_batch_size=EVALUATION_BATCH,
        max_steps=plan.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=trainer_schedule(options.schedule),
        warmup_steps=plan.warmup,
        optim="adamw_torch",
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=device == "cpu",
        # Trainer would replace a NaN by the loss before it, and train on.
        logging_nan_inf_filter=False,
        logging_steps=plan.logging,
        eval_strategy="steps",
        eval_steps=plan.every,
        save_strategy="steps",
        save_steps=plan.every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
        report_to="none",
    )
    # Of a launcher or its configuration: see AdapterTrainer.
    arguments.mixed_precision = "no"
    if arguments.n_gpu > 1:
        # One process uses one GPU: torch's DataParallel would multiply the batch.
        arguments._n_gpu = 1
    return arguments


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint in `work`; one that a kill cut short is passed over."""
    found: list[tuple[int, Path]] = []
    for state in work.glob("checkpoint-*/trainer_state.json"):
        # Trainer writes the state last, so a state that can be read means a whole checkpoint.
        try:
            found.append((json.loads(state.read_text("utf-8"))["global_step"], state.parent))
        except (ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def claim_work(work: Path, identity: dict[str, Any]) -> None:
    """Make `work`, or take it up again if it is of the same run.

    Raises:
        ValueError: it holds a run with other data, base or parameters.
    """
    record = work / "run.json"
    if record.exists():
        if json.loads(record.read_text("utf-8")) != identity:
            raise ValueError(
                f"{work} holds an interrupted run with other data, base, past or parameters; "
                "repeat that command, name another --out, or delete the folder"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    write_file(record, json.dumps(identity, indent=1).encode())


@dataclass(frozen=True)
class _Run:
    """What one run trains and measures with.

    Attributes:
        options: What was asked for.
        rows: Encoded.
        pad: Any token id.
    """

    options: Options
    rows: Rows
    pad: int

    def fit(self, model: Any, arguments: TrainingArguments, penalty: Penalty | None = None) -> Any:
        """Train a PEFT model's adapter, from the last checkpoint if there is one.

        The model is left with the factors of the lowest validation loss.

        Returns:
            Trainer's state: steps, best step and losses.
        """
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=self.rows.train,
            validation=self.rows.validation,
            pad=self.pad,
            precision=self.options.decided_precision,
            scope=self.options.loss_scope,
            penalty=penalty,
            data_collator=lambda batch: pad_right(batch, self.pad, self.options.loss_scope),
            callbacks=[RefuseNaN()],
        )
        try:
            with library_warnings_ignored():
                trainer.go_on(last_checkpoint(Path(arguments.output_dir)))
        except BaseException:
            # Else the bar would be drawn over the line that says what happened.
            for callback in trainer.callback_handler.callbacks:
                if bar := getattr(callback, "training_bar", None):
                    bar.close()
            raise
        return trainer.state

    def figures(self, model: Any, step: int) -> Figures:
        """Return the losses of the validation and the test rows."""

        def measure(texts: Sequence[EncodedText]) -> Loss:
            return evaluate_loss(model, texts, self.pad, EVALUATION_BATCH, self.options.loss_scope)

        return figures_by_part(measure, self.rows, step)


def history_of(state: Any) -> dict[str, list[list[float]]]:
    """Return the losses in Trainer's state as the record has them, penalties included."""
    logs = state.log_history
    return {
        "training": [[log["step"], log["loss"]] for log in logs if "loss" in log],
        "validation": [[log["step"], log["eval_loss"]] for log in logs if "eval_loss" in log],
    }


def train(options: Options) -> dict[str, Any]:
    """Train one adapter, write `options.out`, and return what `training.json` says.

    Raises:
        ValueError: any input that is at fault, or an `out` that exists.
        NotFinite: a loss is not.
        OSError: the disk is full or cannot be written.
    """
    began = time.monotonic()
    if options.out.exists():
        raise ValueError(f"{options.out} exists; name another --out or delete it")
    check_sources(options)
    check_past(options.orthogonal_to)
    folder = resolve_base(options.base)
    model, tokenizer = load_base(options.base, folder)
    targets = choose_targets(model, model.config.model_type, options.target_modules)
    check_context(model, options.max_length)
    encoder = TextEncoder(tokenizer, vocabulary_of(model), special_tokens=options.special_tokens)
    digest = checkpoint_digest(folder)
    facts = read_facts(options.base, folder, model, encoder.tokens_before)
    past = read_past(options.orthogonal_to, model, facts, digest)
    rows = read_data(options, encoder)
    identity = identity_of(options, digest, rows, targets, past.named)
    run = _Run(options, rows, tokenizer.eos_token_id)
    past.fold()
    model = attach_adapter(model, options, targets)

    work = work_folder(options.out)
    plan = Plan.of(options, len(rows.train))
    # Of several processes, this joins them.
    arguments = training_arguments(options, work, plan)
    if is_main_process():
        claim_work(work, identity)
    wait_for_all()
    calibration = work / "calibration"
    resumed = last_checkpoint(work) is not None or last_checkpoint(calibration) is not None
    # Counted now: PEFT sets every factor trainable again when its adapter is switched.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    more: dict[str, Any] = {}
    if options.sparsity is not None:
        state = run.fit(model, training_arguments(options, calibration, plan))
        b_factors = {module: b for module, (_, b) in factors_of(model).items()}
        mask = largest_entries(b_factors, options.sparsity)
        more["calibration"] = {
            "steps": state.global_step,
            "best_step": state.best_global_step,
            "history": history_of(state),
        }
        # The same A again, and B = 0.
        model = attach_adapter(detach_adapter(model), options, targets)
        train_entries(factors_of(model), mask)
        trained = sum(int(kept.sum()) for kept in mask.values())
    penalty = None
    if past:
        penalty = Penalty(
            past.a_factors(), factors_of(model), options.orthogonality, options.norm_penalty
        )
        more["a_overlap"] = {"first": penalty.overlap().item()}
    state = run.fit(model, arguments, penalty)
    if penalty:
        more["a_overlap"]["result"] = penalty.overlap().item()

    adapter_figures = run.figures(model, state.global_step)
    with model.disable_adapter():
        if past:
            more["past_figures"] = run.figures(model, state.global_step)
        with past.absent():
            base_figures = run.figures(model, state.global_step)
    record = record_of(
        options,
        identity,
        trained_parameters=trained,
        steps=state.global_step,
        best_step=state.best_global_step,
        base_figures=base_figures,
        adapter_figures=adapter_figures,
        **history_of(state),
        resumed=resumed,
        began=began,
        **more,
    )
    if is_main_process():
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        write_adapter(tensors, model.peft_config["default"], record["base"], record, options.out)
        shutil.rmtree(work)
    wait_for_all()
    return record
