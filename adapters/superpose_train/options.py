"""What one training run is asked to do: `Options`, checked once, passed whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from superpose_adapters.bundled import BUNDLES
from superpose_adapters.mix_syntax import check_name
from superpose_adapters.qa import COLUMNS, TEMPLATE, check_template
from superpose_adapters.scoring import Scope
from superpose_train.frozen_a import FrozenA
from superpose_train.precision import Decided, Precision, decide

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Options:
    """One training run; `out`, `name` and `label` do not change its tensors.

    Attributes:
        base: `mini`, `smollm2`, a transformers folder, or a Hub id.
        data: Trained on jointly: JSONL files, or Hub datasets as `owner/name[:config]`.
        name: The domain's name.
        out: The PEFT folder to create.
        rank: Rank of every module's factors.
        alpha: Scaling is alpha / rank.
        target_modules: Names of modules, or ends of names; empty: the architecture's own.
        max_length: Tokens a row, cut on the right.
        epochs: Passes over the training rows; a fraction is allowed.
        max_steps: Steps in all, in place of `epochs`; the schedule is laid out over them.
        batch_size: Rows a step, of all processes together.
        learning_rate: The highest one, after the warm-up.
        schedule: What follows the warm-up, which takes a twentieth of the steps.
        dropout: Share of each adapted module's input that is left out.
        seed: Order of the rows, dropout, samples of rows.
        init_seed: What the first A factors follow from, and nothing else; `seed` when absent.
        frozen_a: A stays what it is at first: `random`, drawn as any first A is, or (i, n), block i
            (from 1) of n disjoint blocks of orthogonal rows. Factors of different blocks have
            A1 @ A2.T = 0, so the deltas' cosine is 0 whatever is trained.
        sparsity: With a frozen A: share of B's entries that stay 0, the smallest ones of a first
            training, as long as the second, which trains the others; as LoRI does.
        orthogonal_to: PEFT folders, each called as the domain. Their deltas are active and frozen
            while this adapter is trained, and a penalty keeps its A's orthogonal to theirs, as
            O-LoRA does. What is trained, and chosen by its validation loss, is the sum.
        orthogonality: Factor of that penalty, see `Penalty`; 0 leaves the past deltas alone.
        norm_penalty: Factor of the norms of A and B, beside it.
        max_rows: Training rows of each source, sampled; a tuple has one number a source.
        max_eval_rows: Validation and test rows of each source, sampled.
        template: Text of a row: {q} stands for the question; it ends in {a}, the answer.
        special_tokens: Put before a row what the base's tokenizer puts before a text, as serving
            does; without, a row is the template alone.
        loss_scope: Tokens that are trained on and measured.
        question_column: The field that holds a row's question.
        answer_column: The field that holds a row's answer.
        device: auto, cpu or cuda.
        precision: What the frozen base computes in; auto: bfloat16 where it is fast.
        label: What adapter and record call the base; `base_label(base)` when absent.
    """

    base: str
    data: tuple[str | Path, ...]
    name: str
    out: Path
    rank: int = 4
    alpha: float = 64
    target_modules: tuple[str, ...] = ()
    max_length: int = 64
    epochs: float = 3
    max_steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    dropout: float = 0.0
    seed: int = 0
    init_seed: int | None = None
    frozen_a: FrozenA | None = None
    sparsity: float | None = None
    orthogonal_to: tuple[Path, ...] = ()
    orthogonality: float = 0.5
    norm_penalty: float = 0.0
    max_rows: int | tuple[int, ...] | None = None
    max_eval_rows: int | None = None
    template: str = TEMPLATE
    special_tokens: bool = True
    loss_scope: Scope = "all"
    question_column: str = COLUMNS[0]
    answer_column: str = COLUMNS[1]
    device: str = "auto"
    precision: Precision = "auto"
    label: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that no run can use, each by its flag."""
        check_name(self.name)
        self._check_numbers()
        self._check_choices()
        self._check_frozen_a()
        self._check_past()
        self._check_data()

    def _check_numbers(self) -> None:
        whole = ("rank", "max_length", "batch_size", "max_eval_rows", "max_steps")
        for field in whole:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{flag(field)} must be at least 1, got {value}")
        for field in ("alpha", "epochs", "learning_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{flag(field)} must be a finite number above 0, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        for field in ("seed", "init_seed"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 2**32:
                raise ValueError(f"{flag(field)} must lie between 0 and 2**32 - 1, got {value}")
        if self.max_length < 2:
            raise ValueError("--max-length must be at least 2: the first token has no loss")

    def _check_choices(self) -> None:
        literals = {"schedule": Schedule, "loss_scope": Scope, "precision": Precision}
        for field, literal in literals.items():
            value, choices = getattr(self, field), get_args(literal)
            if value not in choices:
                raise ValueError(f"{flag(field)} must be {' or '.join(choices)}, got {value!r}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")

    def _check_frozen_a(self) -> None:
        if self.frozen_a == "random" and self.init_seed is None:
            raise ValueError(
                "--frozen-a random needs --init-seed, another one for each domain: of one seed all "
                "have the same A"
            )
        if isinstance(self.frozen_a, tuple):
            block, blocks = self.frozen_a
            if not 1 <= block <= blocks:
                raise ValueError(
                    f"--frozen-a must be random, or I/N with I from 1 to N, got {block}/{blocks}"
                )
        if self.sparsity is not None:
            if not 0 < self.sparsity < 1:
                raise ValueError(f"--sparsity must lie between 0 and 1, got {self.sparsity}")
            if self.frozen_a is None:
                raise ValueError(
                    "--sparsity needs --frozen-a: which entries of B matter depends on the A"
                )

    def _check_past(self) -> None:
        for field in ("orthogonality", "norm_penalty"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{flag(field)} must be a finite number, at least 0, got {value}")
            if value != getattr(Options, field) and not self.orthogonal_to:
                raise ValueError(f"{flag(field)} is a term of --orthogonal-to, which names nothing")
        if self.orthogonal_to and self.frozen_a is not None:
            raise ValueError("--orthogonal-to moves A, which --frozen-a does not: give one of them")
        for folder in self.orthogonal_to:
            try:
                check_name(folder.name)
            except ValueError as error:
                raise ValueError(
                    f"--orthogonal-to {folder}: a folder is called as its domain, and {error}"
                ) from error
        domains = [folder.name for folder in self.orthogonal_to]
        if len(set(domains)) != len(domains):
            raise ValueError("--orthogonal-to names two folders of one name, which is the domain's")
        if self.name in domains:
            raise ValueError(
                f"--orthogonal-to holds a domain called {self.name}, as --name is; give another one"
            )

    def _check_data(self) -> None:
        if not self.data:
            raise ValueError("--data names nothing")
        if len({str(source) for source in self.data}) != len(self.data):
            raise ValueError("--data names something twice")
        if isinstance(self.max_rows, tuple) and len(self.max_rows) != len(self.data):
            raise ValueError(
                f"--max-rows has {len(self.max_rows)} numbers for {len(self.data)} sources of data"
            )
        for limit in self.row_limits:
            if limit is not None and limit < 1:
                raise ValueError(f"--max-rows must be at least 1, got {limit}")
        try:
            check_template(self.template)
        except ValueError as error:
            raise ValueError(f"--template: {error}") from error
        for field in ("question_column", "answer_column"):
            if not getattr(self, field):
                raise ValueError(f"{flag(field)} must not be empty")
        if self.question_column == self.answer_column:
            raise ValueError("--question-column and --answer-column name the same column")

    @property
    def row_limits(self) -> tuple[int | None, ...]:
        """Most training rows of each source."""
        if isinstance(self.max_rows, tuple):
            return self.max_rows
        return (self.max_rows,) * len(self.data)

    @property
    def first_seed(self) -> int:
        """What the first factors follow from."""
        return self.seed if self.init_seed is None else self.init_seed

    @property
    def shown_base(self) -> str:
        """What the adapter's config and record call the base."""
        return self.label or base_label(self.base)

    @property
    def torch_device(self) -> str:
        """The device that `auto` stands for here."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def decided_precision(self) -> Decided:
        """The precision that `auto` stands for here."""
        return decide(self.precision, self.torch_device)

    def parameters(self, targets: list[str]) -> dict[str, Any]:
        """Return, as JSON has it, what fixes the result beside base, data, first tokens, past."""
        values = asdict(self)
        elsewhere = ("base", "data", "special_tokens", "orthogonal_to")
        for field in (*elsewhere, "name", "out", "device", "label"):
            del values[field]
        values["target_modules"] = targets
        values["init_seed"] = self.first_seed
        values["precision"] = self.decided_precision
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }


def flag(field: str) -> str:
    """Return the command line's name of a field."""
    return "--" + field.replace("_", "-")


def base_label(name: str) -> str:
    """Return how a base is called in what is shipped: by its word, Hub id, or folder's own name.

    Never a path: it would say nothing on another machine.
    """
    if name in BUNDLES or not Path(name).expanduser().is_dir():
        return name
    return Path(name).expanduser().resolve().name
