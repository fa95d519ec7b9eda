"""Train many adapters at once over one frozen base, each as `train` would alone.

The base runs once over the rows of all adapters; every adapted module corrects them with one
batched product. Data, row order, seeds, rank, learning rate, schedule and number of steps belong
to each adapter; a finished one leaves the stack. The whole stack lies in a checkpoint beside the
first adapter until all are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import canonical_digest, checkpoint_digest
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.data import Rows, check_sources, read_data
from superpose_train.model import (
    attach_adapter,
    check_context,
    choose_targets,
    detach_adapter,
    library_warnings_ignored,
    load_base,
)
from superpose_train.options import Options, flag
from superpose_train.peft_names import from_peft
from superpose_train.processes import process_count
from superpose_train.record import finished_record, identity_of, read_record
from superpose_train.stacked.loss import check_output_layer
from superpose_train.stacked.member import Member
from superpose_train.stacked.run import Base, Stack, Tell, held_keys

MAX_STACK = 16
# What all runs of a stack have in common.
_SHARED = ("base", "target_modules", "max_length", "batch_size", "device", "precision")
# What a stack does not do.
_ALONE = ("sparsity", "orthogonal_to")


def train_many(
    runs: Sequence[Options], *, max_stack: int = MAX_STACK, tell: Tell | None = None
) -> list[dict[str, Any]]:
    """Train every run, write its PEFT folder, and return the records in the order of the runs.

    Each record is that of `train`, with "stack": {"size", "max_stack"}; "wall_seconds" counts from
    the start of its stack. A run whose folder is there already, of the same base, data and
    parameters, is not trained again: its record is returned. After a kill the same call, or one
    without the finished runs, goes on and ends with the same adapters.

    Args:
        runs: At most `max_stack` of them are trained at a time, in this order.
        max_stack: Memory grows with it.
        tell: Is told of the progress, a line at a time.

    Raises:
        ValueError: bad input; or runs of different bases, target modules, lengths, batch sizes,
            devices or precisions; or one that is sparse or has past adapters.
        NotFinite: a loss is not; it names the run.
        OSError: the disk is full or cannot be written.
    """
    if not runs:
        return []
    _check_together(runs, max_stack)
    for options in runs:
        check_sources(options)
    folder = resolve_base(runs[0].base)
    model, tokenizer = load_base(runs[0].base, folder)
    model.requires_grad_(False).eval()
    targets = choose_targets(model, model.config.model_type, runs[0].target_modules)
    check_context(model, runs[0].max_length)
    device, precision = runs[0].torch_device, runs[0].decided_precision
    model.to(device)
    check_output_layer(model)
    digest = checkpoint_digest(folder)
    base = Base(model, tokenizer.eos_token_id, device, precision)
    rows = _RowsOnce(tokenizer, vocabulary_of(model))
    # Every run's data is read before the first is trained: what is wrong is said at once.
    identities = [identity_of(options, digest, rows.of(options), targets) for options in runs]
    pending = [
        at
        for at, options in enumerate(runs)
        if finished_record(options.out, identities[at]) is None
    ]
    keys = {at: _key(runs[at], identities[at]) for at in pending}
    while pending:
        work = _unfinished_work([runs[at] for at in pending], set(keys.values()))
        # A stack that was killed goes on first and in its own company: the same bits.
        chosen = pending[:max_stack]
        if work is not None:
            chosen = [at for at in pending if keys[at] in held_keys(work)]
        members = [
            _member(base, targets, runs[at], rows.of(runs[at]), identities[at], keys[at])
            for at in chosen
        ]
        if work is None:
            name = canonical_digest([keys[at] for at in chosen])[:16]
            work = runs[chosen[0]].out.with_name(f".stack-{name}")
        Stack(base, members, work, max_stack, tell or _silent).run()
        pending = [at for at in pending if at not in chosen]
    return [read_record(options.out) for options in runs]


def _silent(_: str) -> None:
    pass


def _key(options: Options, identity: dict[str, Any]) -> str:
    """Return what a run is known by in a checkpoint; its path belongs to it."""
    return canonical_digest([str(options.out.absolute()), identity])


def _unfinished_work(runs: Sequence[Options], keys: set[str]) -> Path | None:
    """Return the work folder of a stack that holds some of the runs, if there is one."""
    for parent in sorted({options.out.absolute().parent for options in runs}):
        for work in sorted(parent.glob(".stack-*")):
            if keys & held_keys(work):
                return work
    return None


def _check_together(runs: Sequence[Options], max_stack: int) -> None:
    if max_stack < 1:
        raise ValueError(f"max_stack must be at least 1, got {max_stack}")
    if process_count() > 1:
        raise ValueError("stacked training runs in one process; start it without a launcher")
    first = runs[0]
    for options in runs:
        for field in _ALONE:
            if getattr(options, field):
                raise ValueError(
                    f"{options.name} has {flag(field)}, which stacked training does not know; "
                    "train it by itself"
                )
    for options in runs[1:]:
        for field in _SHARED:
            one, other = getattr(first, field), getattr(options, field)
            if one != other:
                raise ValueError(
                    f"runs that are trained together must have the same {flag(field)}: "
                    f"{first.name} has {one}, {options.name} has {other}"
                )
    if len({options.out.absolute() for options in runs}) != len(runs):
        raise ValueError("two runs have the same --out")


class _RowsOnce:
    """Reads and encodes what several runs have in common only once."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._read: dict[tuple[Any, ...], Rows] = {}

    def of(self, options: Options) -> Rows:
        """Return the rows of a run."""
        sampled = options.max_eval_rows is not None or any(options.row_limits)
        key = (
            options.data,
            options.row_limits,
            options.max_eval_rows,
            options.seed if sampled else None,
            options.template,
            options.special_tokens,
            options.loss_scope,
            options.question_column,
            options.answer_column,
        )
        if key not in self._read:
            encoder = TextEncoder(
                self._tokenizer, self._vocabulary, special_tokens=options.special_tokens
            )
            self._read[key] = read_data(options, encoder)
        return self._read[key]


def _member(
    base: Base,
    targets: list[str],
    options: Options,
    rows: Rows,
    identity: dict[str, Any],
    key: str,
) -> Member:
    """Return a run whose first factors are PEFT's own, as they are in `train`."""
    adapted = attach_adapter(base.model, options, targets)
    with library_warnings_ignored():
        tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        config = adapted.peft_config["default"]
    detach_adapter(adapted)
    factors = from_peft({name: tensor.cpu().clone() for name, tensor in tensors.items()})
    return Member(options, rows, identity, key, config, factors)
