"""Stage: train the adapters that something missing needs, many at once, into the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.study.inputs import Sources
from benchmarks.study.steps import Advance, steps
from benchmarks.study.study import AdapterSpec, Study
from benchmarks.study.workspace import Workspace
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, files_digest
from superpose_train.options import Options
from superpose_train.precision import trained_precision
from superpose_train.stacked.stack import train_many

# Of a tensor, as the paper's Table 1 shows them.
_SAMPLE_VALUES = 5
_SAMPLE_TENSORS = 3
_STEP = re.compile(r"step (\d+):")


def options_of(study: Study, spec: AdapterSpec, sources: Sources, out: Path) -> Options:
    """Return an adapter's training options."""
    training = study.config.training
    return Options(
        base=str(sources.base),
        label=study.inputs.base,
        data=tuple(sources.paths[domain] for domain in spec.domains),
        # What the trainer's messages name it by; joint adapters of many domains have long names.
        name=re.sub(r"[^a-z0-9._]+", "-", spec.name.lower())[:64],
        out=out,
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=training.target_modules,
        max_length=training.max_length,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        schedule=training.schedule,
        dropout=spec.dropout,
        seed=spec.seed,
        init_seed=spec.init_seed,
        frozen_a=spec.block,
        max_rows=tuple(rows for _, rows in spec.portions),
        max_eval_rows=training.eval_rows,
        template=spec.template,
        special_tokens=training.special_tokens,
        loss_scope=training.loss_scope,
        precision=training.precision,
    )


def train_missing(
    study: Study,
    specs: Iterable[AdapterSpec],
    sources: Sources,
    workspace: Workspace,
    tokens: Mapping[str, float],
    experiment: str,
) -> int:
    """Train those of `specs` that the cache lacks, and note what the trainer says of them.

    Args:
        study: Gives the keys.
        specs: What is needed now.
        sources: Base and data.
        workspace: Cache and records.
        tokens: {domain: mean tokens of a row}, for the time left.
        experiment: What they are for.

    Returns:
        How many results were dropped because they are of an adapter that the cache has no longer,
        see `note_adapter`.

    Raises:
        ValueError: What the trainer refuses, a loss that is not finite among it.
    """
    with workspace.cache_locked():
        _train(study, specs, sources, workspace, tokens, experiment)
    return sum(note_adapter(study, spec, workspace) for spec in dict.fromkeys(specs))


def _train(
    study: Study,
    specs: Iterable[AdapterSpec],
    sources: Sources,
    workspace: Workspace,
    tokens: Mapping[str, float],
    experiment: str,
) -> None:
    missing = [
        spec
        for spec in dict.fromkeys(specs)
        if not workspace.adapter(study.adapter_key(spec)).is_dir()
    ]
    work = {spec: training_tokens(spec, tokens) for spec in missing}
    # Those of a stack should end together.
    missing.sort(key=lambda spec: (spec.batch_size, spec.rank, work[spec]))
    size = study.config.training.stack
    with steps(f"train for {experiment}", sum(work.values())) as advance:
        for batch_size in dict.fromkeys(spec.batch_size for spec in missing):
            alike = [spec for spec in missing if spec.batch_size == batch_size]
            for start in range(0, len(alike), size):
                stack = {spec: work[spec] for spec in alike[start : start + size]}
                amount = sum(stack.values())
                keys = {spec: study.adapter_key(spec) for spec in stack}
                told = _Told(stack, advance)
                with workspace.stage(
                    "train", experiment, keys.values(), adapters=len(stack), tokens=amount
                ):
                    train_many(
                        [
                            options_of(study, spec, sources, workspace.adapter(key))
                            for spec, key in keys.items()
                        ],
                        max_stack=size,
                        tell=told,
                    )
                told.finish()


class _Told:
    """Turns what the trainer tells, which names the step, into tokens that are done."""

    def __init__(self, stack: Mapping[AdapterSpec, float], advance: Advance) -> None:
        """Take the tokens of each adapter of a stack."""
        self._stack = stack
        self._advance = advance
        self._done = 0.0
        first = next(iter(stack))
        advance(0, f"{len(stack)} adapters, {first.name} and more")

    def __call__(self, text: str) -> None:
        """Take a line such as `step 5: validation loss ...`; others name no step."""
        found = _STEP.match(text)
        done = self._done
        if found:
            # Adapters of a stack go step by step together, and each ends at its own last one.
            step = int(found[1])
            done = sum(
                tokens * min(1.0, step / max(1.0, spec.epochs * spec.rows / spec.batch_size))
                for spec, tokens in self._stack.items()
            )
        self._advance(max(0.0, done - self._done), text)
        self._done = max(self._done, done)

    def finish(self) -> None:
        """Count the whole stack as done."""
        whole = sum(self._stack.values())
        self._advance(whole - self._done, f"{len(self._stack)} adapters done")


def training_tokens(spec: AdapterSpec, tokens: Mapping[str, float]) -> float:
    """Return about how many tokens an adapter is trained on."""
    return spec.epochs * sum(rows * tokens[domain] for domain, rows in spec.portions)


def note_adapter(study: Study, spec: AdapterSpec, workspace: Workspace) -> int:
    """Keep what is small of an adapter, so that a report needs no weights.

    A key says how an adapter was trained, not which bits that gave: on another machine, or in
    another stack, they differ. So where an adapter had to be trained again and became another one,
    the results of the earlier one are dropped, lest one table mixes both.

    Returns:
        How many results were dropped.

    Raises:
        OSError: A result could not be written.
    """
    key = study.adapter_key(spec)
    folder = workspace.adapter(key)
    digest = files_digest((folder / CONFIG_NAME).read_bytes(), (folder / TENSORS_NAME).read_bytes())
    known = workspace.adapters.get(key)
    if known is not None and known["digest"] == digest:
        return 0
    # Dropped first: a kill in between leaves the old digest, and so drops again.
    dropped = workspace.forget(key)
    record: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))
    workspace.adapters.add(
        {
            "key": key,
            "name": spec.name,
            "digest": digest,
            "parameters": {**record["parameters"], "precision": trained_precision(record)},
            "trained_parameters": record["trained_parameters"],
            "steps": record["steps"],
            "best_step": record.get("best_step"),
            "wall_seconds": record["wall_seconds"],
            "stack": record.get("stack"),
            "device": record["device"],
            "versions": record["versions"],
            "tensors": sample_tensors(folder / TENSORS_NAME),
        }
    )
    return dropped


def sample_tensors(path: Path) -> list[dict[str, Any]]:
    """Return name, shape and first values of the first B and the tensors around it."""
    tensors = load_file(path)
    names = sorted(tensors)[:_SAMPLE_TENSORS]
    return [
        {
            "name": name,
            "shape": list(tensors[name].shape),
            "first": [
                round(value, 6) for value in tensors[name].flatten()[:_SAMPLE_VALUES].tolist()
            ],
        }
        for name in names
    ]
