"""What one study is: a TOML file, read into frozen dataclasses; unknown keys are refused."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from benchmarks.study import checks
from superpose_adapters.mix_syntax import MAX_ABS_WEIGHT, check_name
from superpose_adapters.qa import TEMPLATE, check_template
from superpose_adapters.scoring import Scope
from superpose_train.options import Schedule
from superpose_train.precision import Decided
from superpose_train.stacked.stack import MAX_STACK

T = TypeVar("T")

_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Data:
    """Where the rows come from.

    Attributes:
        files: {domain: file in the data folder}.
        synthetic: Rows of each made-up domain; then `files` names topics in place of files.
    """

    files: Mapping[str, str]
    synthetic: int | None = None

    def __post_init__(self) -> None:
        """Refuse names that are none, and one file for two domains."""
        for domain in self.files:
            check_name(domain)
        checks.distinct("data.files", list(self.files.values()), least=3)
        checks.at_least(1, {"data.synthetic": self.synthetic})


@dataclass(frozen=True)
class Training:
    """Options of every adapter, as `superpose-train` has them, unless an experiment says otherwise.

    Attributes:
        rows: Training rows a domain; None: all.
        eval_rows: Validation and test rows that the trainer itself looks at.
        special_tokens: A row begins as the base's tokenizer begins a text, as it is served.
        precision: What the base computes in, whatever processor it is.
        stack: Adapters that are trained at a time. More are faster until a step has some 1,000
            tokens; beyond, what a large base makes of them leaves the processor's cache.
    """

    rank: int = 4
    alpha: float = 64
    target_modules: tuple[str, ...] = ()
    max_length: int = 64
    epochs: float = 1
    batch_size: int = 8
    learning_rate: float = 2e-3
    schedule: Schedule = "cosine"
    dropout: float = 0.0
    rows: int | None = None
    eval_rows: int | None = 32
    template: str = TEMPLATE
    special_tokens: bool = True
    loss_scope: Scope = "all"
    precision: Decided = "float32"
    stack: int = MAX_STACK

    def __post_init__(self) -> None:
        """Refuse what no adapter can be trained with."""
        checks.at_least(
            1,
            {
                "training.rank": self.rank,
                "training.batch_size": self.batch_size,
                "training.rows": self.rows,
                "training.eval_rows": self.eval_rows,
                "training.stack": self.stack,
            },
        )
        # The first token has no loss.
        checks.at_least(2, {"training.max_length": self.max_length})
        checks.positive(
            {
                "training.alpha": self.alpha,
                "training.epochs": self.epochs,
                "training.learning_rate": self.learning_rate,
            }
        )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"training.dropout is {self.dropout}; it must be at least 0 and below 1"
            )
        checks.distinct("training.target_modules", self.target_modules, least=0)
        _check_template("training.template", self.template)


Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Evaluation:
    """How models are measured.

    Attributes:
        dtype: Of the weights that are folded, as the server's `--dtype`.
        kernels: Use the server's CPU kernels, which need a C++ compiler.
        served: Score through a live `superpose-server`, as `--via-server`.
        test_rows: Test rows a domain; None: all.
        validation_rows: Validation rows a domain, on which weights are chosen.
        resamples: Of the bootstrap.
        slice_tokens: Tokens that run at once.
    """

    dtype: Dtype = "float32"
    kernels: bool = False
    served: bool = False
    test_rows: int | None = 200
    validation_rows: int | None = 100
    resamples: int = 2000
    slice_tokens: int = 2048

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        checks.at_least(
            1,
            {
                "evaluation.test_rows": self.test_rows,
                "evaluation.validation_rows": self.validation_rows,
                "evaluation.slice_tokens": self.slice_tokens,
            },
        )
        # Fewer have no 2.5 % ends.
        checks.at_least(100, {"evaluation.resamples": self.resamples})


@dataclass(frozen=True)
class Seeds:
    """Repetitions.

    Attributes:
        shared: Each trains all adapters from one A, rows and their order by the same seed.
        separate: Each trains the fundamental adapters again, each from an A of its own.
        twins: Seeds for which every fundamental adapter is trained once more from the same A on
            other rows, in another order: the ceiling of the cosine with a shared A.
    """

    shared: tuple[int, ...] = (0,)
    separate: tuple[int, ...] = ()
    twins: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would count one adapter as several."""
        checks.seeds("seeds.shared", self.shared)
        checks.seeds("seeds.separate", self.separate, least=0)
        checks.seeds("seeds.twins", self.twins, least=0)
        if again := set(self.separate) & set(self.shared):
            raise ValueError(
                f"seeds.separate and seeds.shared both name {min(again)}: the same rows in the "
                "same order; name others"
            )
        if len(self.separate) > len(self.shared) or (self.separate and len(self.shared) > 2):
            raise ValueError(
                f"seeds.separate has {len(self.separate)} seeds and seeds.shared "
                f"{len(self.shared)}: each separate one takes another shared one's joint adapters, "
                "and three shared seeds or more give arms of different A by themselves"
            )


@dataclass(frozen=True)
class Controls:
    """Joint models to compare with: of these ranks, alpha / rank kept.

    Attributes:
        ranks: Beside the study's own rank.
        budgets: tokens: as many visits to rows as the fundamental adapters pay together; steps: as
            many steps as one of them takes; see `Study.joint`.
        seeds: For which of the shared seeds.
    """

    ranks: tuple[int, ...] = (8, 12)
    budgets: tuple[Literal["tokens", "steps"], ...] = ("tokens", "steps")
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse controls that are none."""
        checks.distinct("controls.ranks", self.ranks, least=0)
        checks.at_least(1, {"controls.ranks": min(self.ranks, default=None)})
        checks.distinct("controls.budgets", self.budgets)
        checks.seeds("controls.seeds", self.seeds)


@dataclass(frozen=True)
class Lambdas:
    """Weights of the summed adapters.

    Attributes:
        grid: One weight for all.
        pair_grid: A weight for each adapter of a pair, every combination; of the first seed.
        seeds: For which of the shared seeds `grid` is swept.
        rotated: Sweep the first arm whose adapters have different A too.
    """

    grid: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    pair_grid: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    rotated: bool = False

    def __post_init__(self) -> None:
        """Refuse weights that no mix may have."""
        checks.distinct("lambdas.grid", self.grid)
        checks.distinct("lambdas.pair_grid", self.pair_grid, least=0)
        checks.within(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT, "lambdas.grid", self.grid)
        checks.within(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT, "lambdas.pair_grid", self.pair_grid)
        checks.seeds("lambdas.seeds", self.seeds)


@dataclass(frozen=True)
class Templates:
    """A template of its own for each domain, to take the shared format away."""

    own: Mapping[str, str]
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse templates that are none."""
        checks.distinct("templates.own", list(self.own))
        for domain, template in self.own.items():
            _check_template(f"templates.own.{domain}", template)
        checks.seeds("templates.seeds", self.seeds)


@dataclass(frozen=True)
class Overlap:
    """A share of one domain's rows in place of rows of another."""

    source: str
    target: str
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if self.source == self.target:
            raise ValueError(f"overlap.source and overlap.target are both {self.source}")
        checks.distinct("overlap.shares", self.shares)
        checks.within(0, 1, "overlap.shares", self.shares)
        checks.seeds("overlap.seeds", self.seeds)


@dataclass(frozen=True)
class Blocks:
    """One block after the other, in this order of domains.

    Attributes:
        order: Domains.
        grid: Weights from which the best is chosen; 1 and 1/j are always among them.
        seeds: Of the adapters, which share A.
    """

    order: tuple[str, ...]
    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse a sum of one, or of a block with itself."""
        checks.distinct("blocks.order", self.order, least=2)
        checks.distinct("blocks.grid", self.grid, least=0)
        checks.within(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT, "blocks.grid", self.grid)
        checks.seeds("blocks.seeds", self.seeds)


@dataclass(frozen=True)
class Orthogonal:
    """Adapters with a frozen A from disjoint blocks: their cosine is 0 by construction."""

    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Refuse seeds that are no replicates."""
        checks.seeds("orthogonal.seeds", self.seeds)


@dataclass(frozen=True)
class Unlearning:
    """Removal of a block by a fold of what is left, and by subtraction."""

    cycles: int = 10
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")

    def __post_init__(self) -> None:
        """Refuse a measurement of nothing."""
        checks.at_least(1, {"unlearning.cycles": self.cycles})
        checks.distinct("unlearning.dtypes", self.dtypes)


@dataclass(frozen=True)
class Prediction:
    """Interference foretold from geometry, over all pairs of these domains.

    Attributes:
        domains: At least three.
        seeds: One or two: adapters of one share A, a pair across both does not.
        activations: Weigh by the covariance of the modules' inputs too.
    """

    domains: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1)
    activations: bool = True

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to foretell."""
        checks.distinct("prediction.domains", self.domains, least=3)
        checks.seeds("prediction.seeds", self.seeds)
        if len(self.seeds) > 2:
            raise ValueError(f"prediction.seeds has {len(self.seeds)} entries; it takes one or two")


@dataclass(frozen=True)
class Tuning:
    """Search of dropout, batch size, epochs and learning rate before anything is trained.

    Attributes:
        trials: Of each search.
        domains: Whose adapters; all three if empty.
        joint: Tune the joint adapters too.
        apply: Train with what was found.
        max_epochs: Upper bound of the search.
    """

    trials: int
    domains: tuple[str, ...] = ()
    joint: bool = False
    apply: bool = False
    max_epochs: int = 5

    def __post_init__(self) -> None:
        """Refuse a search of nothing."""
        checks.at_least(1, {"tuning.trials": self.trials, "tuning.max_epochs": self.max_epochs})
        checks.distinct("tuning.domains", self.domains, least=0)


@dataclass(frozen=True)
class Config:
    """One study.

    Attributes:
        name: Of the results.
        base: As `superpose-server --base`.
        domains: The three whose adapters are the fundamental blocks.
    """

    name: str
    base: str
    domains: tuple[str, ...]
    data: Data
    description: str = ""
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seeds: Seeds = field(default_factory=Seeds)
    controls: Controls | None = None
    lambdas: Lambdas | None = None
    templates: Templates | None = None
    overlap: Overlap | None = None
    blocks: Blocks | None = None
    orthogonal: Orthogonal | None = None
    unlearning: Unlearning | None = None
    prediction: Prediction | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without data.

        Raises:
            ValueError: Naming the field.
        """
        # Results lie in a folder of this name.
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name is {self.name!r}; it must be fit for a folder's name")
        if len(set(self.domains)) != 3 or len(self.domains) != 3:
            raise ValueError(f"domains must be three different ones, got {list(self.domains)}")
        for where, seeds in (
            ("seeds.twins", self.seeds.twins),
            ("controls.seeds", self.controls.seeds if self.controls else ()),
            ("lambdas.seeds", self.lambdas.seeds if self.lambdas else ()),
        ):
            if unknown := set(seeds) - set(self.seeds.shared):
                raise ValueError(f"{where} has {min(unknown)}, which seeds.shared lacks")
        for where, named in self._named_domains().items():
            for domain in named:
                if domain not in self.data.files:
                    raise ValueError(f"{where} names {domain}, which data.files lacks")

    def _named_domains(self) -> dict[str, tuple[str, ...]]:
        named = {"domains": self.domains}
        if self.templates:
            named["templates.own"] = tuple(self.templates.own)
        if self.overlap:
            named["overlap"] = (self.overlap.source, self.overlap.target)
        if self.blocks:
            named["blocks.order"] = self.blocks.order
        if self.tuning:
            named["tuning.domains"] = self.tuning.domains
        if self.prediction:
            named["prediction.domains"] = self.prediction.domains
        return named


def _check_template(key: str, template: str) -> None:
    try:
        check_template(template)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def bundled_configs() -> list[str]:
    """Return the names that `--config` takes beside files."""
    return sorted(path.stem for path in _CONFIGS.glob("*.toml"))


def read_config(name: str) -> Config:
    """Read a bundled config by its name, or a TOML file.

    Raises:
        ValueError: No such config, no TOML, or a key that is unknown, missing or of another type.
    """
    path = Path(name)
    if name in bundled_configs():
        path = _CONFIGS / f"{name}.toml"
    elif path.suffix != ".toml":
        raise ValueError(
            f"config {name}: choose from {', '.join(bundled_configs())}, or name a .toml file"
        )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    try:
        return _read(Config, table, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a TOML table."""
    hints = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise ValueError(f"unknown key {where}{key}; there are {', '.join(fields)}")
    for name, each in fields.items():
        required = (
            each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        )
        if required and name not in table:
            raise ValueError(f"{where}{name} is missing")
    return kind(**{key: _value(hints[key], value, f"{where}{key}") for key, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as its field's type has it.

    Raises:
        ValueError: It is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (each for each in arguments if each is not types.NoneType)
        return _value(hint, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where} is {value!r}; choose from {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], each, where) for each in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _value(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _read(typing.cast(type, hint), value, f"{where}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    ):
        return value
    raise ValueError(f"{where} is {value!r}, which is no {getattr(hint, '__name__', hint)}")
