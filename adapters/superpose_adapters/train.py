"""`superpose-train`: train one LoRA adapter on question-answer files, offline.

PEFT makes the adapter, transformers.Trainer runs it. The result is a PEFT folder with a record,
`training.json`, and appears under `--out` only when it is complete. Until then everything lies in
`OUT.work`; the same command takes an interrupted run up again and ends with the same adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from superpose_adapters.bundled import MINI, resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.mix import check_domain
from superpose_adapters.qa import Row, file_sha256, read_rows, split_rows
from superpose_adapters.scoring import (
    EncodedText,
    Loss,
    Scope,
    encode_qa,
    loss_of,
    token_log_probabilities,
)

_LLAMA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
DEFAULT_TARGETS = {
    "gpt2": ("c_attn", "c_proj"),
    "llama": _LLAMA_TARGETS,
    "mistral": _LLAMA_TARGETS,
    "qwen2": _LLAMA_TARGETS,
    "qwen3": _LLAMA_TARGETS,
}
EVALUATIONS = 8
_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Options:
    """One training run; `out`, `name` and `label` do not change its tensors."""

    base: str
    data: tuple[Path, ...]
    name: str
    out: Path
    rank: int = 4
    alpha: float = 64
    target_modules: tuple[str, ...] = ()
    max_length: int = 64
    epochs: float = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    dropout: float = 0.0
    seed: int = 0
    init_seed: int | None = None
    max_rows: int | None = None
    max_eval_rows: int | None = None
    device: str = "auto"
    label: str | None = None
    """What the adapter's config calls the base; `base_label(base)` when absent."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use, each by its flag."""
        check_domain(self.name)
        whole = ("rank", "max_length", "batch_size", "max_rows", "max_eval_rows")
        for field in whole:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(field)} must be at least 1, got {value}")
        for field in ("alpha", "epochs", "learning_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{_flag(field)} must be a finite number above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        for field in ("seed", "init_seed"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 2**32:
                raise ValueError(f"{_flag(field)} must lie between 0 and 2**32 - 1, got {value}")
        if self.max_length < 2:
            raise ValueError("--max-length must be at least 2: the first token has no loss")
        if not self.data:
            raise ValueError("--data names no file")
        if len(set(self.data)) != len(self.data):
            raise ValueError("--data names a file twice")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class Rows:
    """Encoded rows by part, of all data files together, with what the record says of them."""

    train: list[EncodedText]
    validation: list[EncodedText]
    test: list[EncodedText]
    files: list[dict[str, Any]]


def base_label(name: str) -> str:
    """Return how a base is called in what is shipped: `mini`, a Hub id, or a folder's own name.

    Never a path: it would say nothing on another machine.
    """
    if name == MINI or not Path(name).expanduser().is_dir():
        return name
    return Path(name).expanduser().resolve().name


def read_data(options: Options, tokenizer: Any) -> Rows:
    """Read, split and encode every data file; `max_rows` and `max_eval_rows` hold for each file.

    Raises:
        ValueError: a bad row, or a file of which a part is empty.
    """
    parts: dict[str, list[EncodedText]] = {"train": [], "validation": [], "test": []}
    files: list[dict[str, Any]] = []
    for path in options.data:
        split = split_rows(read_rows(path))
        counts = {}
        for part, encoded in parts.items():
            limit = options.max_rows if part == "train" else options.max_eval_rows
            rows = _sample(getattr(split, part), limit, options.seed)
            if not rows:
                raise ValueError(
                    f"{path}: no row falls into the {part} part of the 80:10:10 split; "
                    "give more rows"
                )
            encoded += [
                encode_qa(tokenizer, row.question, row.answer, options.max_length) for row in rows
            ]
            counts[part] = len(rows)
        files.append({"name": path.name, "sha256": file_sha256(path), "rows": counts})
    return Rows(**parts, files=files)


def _sample(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Return at most `limit` rows in the data's order: a prefix would favour the first topics."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in chosen]


def choose_targets(model: nn.Module, model_type: str, requested: Sequence[str]) -> list[str]:
    """Return the sorted target modules: the requested ones, else the architecture's own.

    Each name must match, as PEFT matches it (the module's full name or its end after a dot), at
    least one Linear or Conv1D, and nothing else.

    Raises:
        ValueError: a name that matches no module, another kind of module, or the output layer; or
            an architecture without a default.
    """
    layers = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    output = model.get_output_embeddings()  # type: ignore[operator]
    leaves = sorted(
        {name.rpartition(".")[2] for name in layers if model.get_submodule(name) is not output}
    )
    targets = tuple(requested) or DEFAULT_TARGETS.get(model_type, ())
    if not targets:
        raise ValueError(
            f"no default --target-modules for a base of type {model_type}; "
            f"choose from {', '.join(leaves)}"
        )
    for target in targets:
        matched = [
            name
            for name, _ in model.named_modules()
            if name == target or name.endswith(f".{target}")
        ]
        if not matched:
            raise ValueError(
                f"--target-modules {target} matches nothing in this base; "
                f"choose from {', '.join(leaves)}"
            )
        for name in matched:
            if name not in layers or model.get_submodule(name) is output:
                raise ValueError(
                    f"--target-modules {target} matches {name}, which cannot be adapted here; "
                    f"choose from {', '.join(leaves)}"
                )
    return sorted(set(targets))


@contextmanager
def library_warnings_ignored() -> Iterator[None]:
    """Hide what the libraries say of each other and the user can do nothing about."""
    with warnings.catch_warnings():
        # PEFT asks transformers 5.23 under a name that transformers has replaced.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # On resuming, Trainer loads the scheduler before the optimiser's first step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def attach_adapter(model: Any, options: Options, targets: list[str]) -> Any:
    """Return the PEFT model: a fresh LoRA whose A factors follow from `--init-seed`."""
    conv = [
        isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets or name in targets
    ]
    if any(conv) and not all(conv):
        raise ValueError("--target-modules mix Conv1D and Linear layers; train them apart")
    torch.manual_seed(options.seed if options.init_seed is None else options.init_seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        # PEFT writes alpha as it was given; a whole number belongs there as one.
        lora_alpha=int(options.alpha) if float(options.alpha).is_integer() else options.alpha,
        target_modules=targets,
        lora_dropout=options.dropout,
        fan_in_fan_out=all(conv),
    )
    with library_warnings_ignored():
        return get_peft_model(model, config)


def pad_right(rows: Sequence[EncodedText], pad: int) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (batch, longest); padding carries no label."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
    labels = ids.masked_fill(mask == 0, _IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def evaluate_loss(
    model: Any, rows: Sequence[EncodedText], pad: int, batch_size: int, scope: Scope = "all"
) -> Loss:
    """Return the token-weighted loss of rows, computed in the model's dtype without autocast."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = Loss()
    # Rows of like length share a batch, so little of it is padding.
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        inputs = {key: value.to(device) for key, value in pad_right(batch, pad).items()}
        ids = inputs["input_ids"]
        logits = model(
            input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
        for row, log_probabilities in zip(
            batch, token_log_probabilities(logits, ids).cpu(), strict=True
        ):
            total += loss_of(log_probabilities, row, scope)
    model.train(training)
    return total


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trainer whose validation loss is the project's own: a mean over tokens, not over batches."""

    def __init__(self, *, validation: list[EncodedText], pad: int, **options: Any) -> None:
        """Take the validation rows beside Trainer's own arguments; `pad` is any token id."""
        super().__init__(eval_dataset=validation, **options)
        self._validation = validation
        self._pad = pad

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log `eval_loss` and `eval_perplexity` of the validation rows."""
        loss = evaluate_loss(
            self.model, self._validation, self._pad, self.args.per_device_eval_batch_size
        )
        metrics = {"eval_loss": loss.mean, "eval_perplexity": loss.perplexity}
        _check_finite(loss.mean, "validation loss", self.state.global_step)
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
        """Raise ValueError on a training loss that is NaN or infinite."""
        if logs and "loss" in logs:
            _check_finite(float(logs["loss"]), "training loss", state.global_step)


def _check_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is not finite at step {step}; lower --learning-rate")


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bf16 autocast pays: a GPU from Ampere on, or a CPU with AVX512-BF16 or AMX.

    Any CPU computes bf16, most of them slower than float32.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    read = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, Any] = read()
    return any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16"))


def training_arguments(options: Options, work: Path, rows: int, device: str) -> TrainingArguments:
    """Return Trainer's settings: an evaluation and a checkpoint after each eighth of the run."""
    steps = math.ceil(math.ceil(rows / options.batch_size) * options.epochs)
    every = max(1, math.ceil(steps / EVALUATIONS))
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=32,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        optim="adamw_torch",
        seed=options.seed,
        data_seed=options.seed,
        bf16=has_fast_bfloat16(device),
        use_cpu=device == "cpu",
        # Trainer would replace a NaN by the loss before it, and train on.
        logging_nan_inf_filter=False,
        logging_steps=max(1, every // 4),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        report_to="none",
    )


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


def claim_work(work: Path, identity: dict[str, Any]) -> Path | None:
    """Make `work`, or take it up again if it is of the same run; return its last checkpoint.

    Raises:
        ValueError: it holds a run with other data, base or parameters.
    """
    record = work / "run.json"
    if record.exists():
        if json.loads(record.read_text("utf-8")) != identity:
            raise ValueError(
                f"{work} holds an interrupted run with other data, base or parameters; "
                "repeat that command, name another --out, or delete the folder"
            )
        return last_checkpoint(work)
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / "run.tmp"
    temporary.write_text(json.dumps(identity, indent=1), "utf-8")
    temporary.replace(record)
    return None


def write_adapter(model: Any, label: str, record: dict[str, Any], out: Path) -> None:
    """Write the PEFT folder and its record beside `out`, then rename it into place."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config = model.peft_config["default"]
        config.base_model_name_or_path = label
        config.inference_mode = True
        config.save_pretrained(temporary)
        path = temporary / "adapter_config.json"
        fields = json.loads(path.read_text("utf-8"))
        # PEFT keeps the names in a set, whose order changes from process to process.
        fields["target_modules"] = sorted(fields["target_modules"])
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")
        for file in temporary.iterdir():
            # safetensors makes its file readable to the owner alone.
            file.chmod(0o644)
        (temporary / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def train(options: Options) -> dict[str, Any]:
    """Train one adapter, write `options.out`, and return what `training.json` says.

    Raises:
        ValueError: any input that is at fault, a loss that is not finite, or an `out` that exists.
    """
    began = time.monotonic()
    if options.out.exists():
        raise ValueError(f"{options.out} exists; name another --out or delete it")
    for path in options.data:  # Before the base, whose loading may take minutes.
        if not path.is_file():
            raise ValueError(f"{path}: no such file; check the path")
    folder = resolve_base(options.base)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"base {options.base} cannot be loaded: {first_line}") from error
    rows = read_data(options, tokenizer)
    targets = choose_targets(model, model.config.model_type, options.target_modules)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and options.max_length > context:
        raise ValueError(f"--max-length {options.max_length} is above the base's {context} tokens")
    digest = checkpoint_digest(folder)
    parameters = _parameters(options, targets)
    identity = {"base_digest": digest, "data": rows.files, "parameters": parameters}
    work = options.out.with_name(options.out.name + ".work")
    resume = claim_work(work, identity)

    model.config.use_cache = False
    # GPT-2's class name does not tell transformers which loss is meant, and it says so each time.
    model.loss_type = "ForCausalLM"
    model = attach_adapter(model, options, targets)
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(options, work, len(rows.train), device),
        train_dataset=rows.train,
        validation=rows.validation,
        pad=tokenizer.eos_token_id,
        data_collator=lambda batch: pad_right(batch, tokenizer.eos_token_id),
        callbacks=[RefuseNaN()],
    )
    try:
        with library_warnings_ignored():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except BaseException:
        # Else the bar would be drawn over the line that says what happened.
        for callback in trainer.callback_handler.callbacks:
            if bar := getattr(callback, "training_bar", None):
                bar.close()
        raise

    def measure(part: list[EncodedText]) -> dict[str, float]:
        loss = evaluate_loss(model, part, tokenizer.eos_token_id, 32)
        _check_finite(loss.mean, "loss", trainer.state.global_step)
        return {"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens}

    adapter_figures = {"validation": measure(rows.validation), "test": measure(rows.test)}
    with model.disable_adapter():
        base_figures = {"validation": measure(rows.validation), "test": measure(rows.test)}
    label = options.label or base_label(options.base)
    record = {
        "name": options.name,
        "base": label,
        "base_digest": digest,
        "data": rows.files,
        "parameters": parameters,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "base_figures": base_figures,
        "adapter_figures": adapter_figures,
        "device": device,
        "bf16_autocast": bool(trainer.args.bf16),
        "resumed": resume is not None,
        "wall_seconds": round(time.monotonic() - began, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "numpy": np.__version__,
        },
    }
    if trainer.is_world_process_zero():
        write_adapter(model, label, record, options.out)
        shutil.rmtree(work)
    return record


def _parameters(options: Options, targets: list[str]) -> dict[str, Any]:
    """Return what, beside base and data, fixes the result."""
    parameters = asdict(options)
    for field in ("base", "data", "name", "out", "device", "label"):
        del parameters[field]
    parameters["target_modules"] = targets
    if parameters["init_seed"] is None:
        parameters["init_seed"] = options.seed
    return parameters


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="superpose-train",
        description="Train a LoRA adapter on question-answer files (JSONL or JSONL.gz).",
        epilog="Files are split 80:10:10 by a hash of the question with its numbers masked. "
        "An interrupted run goes on when the same command is repeated.",
    )
    add = parser.add_argument
    add("--base", required=True, help="mini, a transformers folder, or a Hub id")
    add("--data", required=True, nargs="+", type=Path, metavar="FILE", help="trained on jointly")
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
    add("--epochs", type=float, default=Options.epochs, help="default %(default)s")
    add("--batch-size", type=int, default=Options.batch_size, help="rows; default %(default)s")
    add("--learning-rate", type=float, default=Options.learning_rate, help="default %(default)s")
    add("--dropout", type=float, default=Options.dropout, help="default %(default)s")
    add(
        "--seed",
        type=int,
        default=Options.seed,
        help="order of the rows, dropout, samples; default %(default)s",
    )
    add("--init-seed", type=int, help="the adapter's first factors; default --seed")
    add("--max-rows", type=int, help="training rows a file, sampled; default all")
    add("--max-eval-rows", type=int, help="validation and test rows a file; default all")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=Options.device,
        help="default %(default)s",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr (argparse exits with 2)."""
    fields = vars(build_parser().parse_args(arguments))
    fields["data"] = tuple(fields["data"])
    fields["target_modules"] = tuple(
        name for part in fields["target_modules"].split(",") if (name := part.strip())
    )
    try:
        record = train(Options(**fields))
    except (ValueError, OSError) as error:
        print(f"superpose-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("superpose-train: interrupted; repeat the command to go on", file=sys.stderr)
        return 1
    before = record["base_figures"]["test"]["perplexity"]
    after = record["adapter_figures"]["test"]["perplexity"]
    print(
        f"wrote {fields['out']}: test perplexity {before:.2f} -> {after:.2f} "
        f"({100 * (after / before - 1):+.1f} %)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
