"""`superpose-train --tune N`: Optuna's TPE over dropout, batch size, epochs and learning rate.

The objective is the validation loss. Trials lie in `.OUT.tune`: their study in SQLite, and the
adapter of the best so far. Every setting follows from the seed and the trials before it, so a
command that was killed goes on, repeated, as if it had not been: the interrupted trial is tried
again with the same setting and takes up its own checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import canonical_digest, checkpoint_digest
from superpose_adapters.durable import new_folder, write_file
from superpose_adapters.qa import file_sha256
from superpose_train.data import check_sources, is_hub_id
from superpose_train.loss import NotFinite
from superpose_train.options import Options
from superpose_train.past import check_past, named
from superpose_train.processes import process_count
from superpose_train.record import read_record
from superpose_train.train import train
from superpose_train.tuning.plots import draw_history, draw_importances
from superpose_train.work_folder import work_folder

# Settings at random before TPE has something to go by; Optuna's own 10 suit longer searches.
RANDOM_TRIALS = 5

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Space:
    """What is searched: bounds, both included, or choices.

    Attributes:
        dropout: Bounds.
        batch_size: Choices.
        epochs: Bounds of a whole number.
        learning_rate: Bounds; searched on a logarithmic scale.
    """

    dropout: tuple[float, float] = (0.0, 0.3)
    batch_size: tuple[int, ...] = (8, 16, 32)
    epochs: tuple[int, int] = (1, 5)
    learning_rate: tuple[float, float] = (1e-4, 1e-2)

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Return a trial's setting: fields of Options."""
        return {
            "dropout": trial.suggest_float("dropout", *self.dropout),
            "batch_size": trial.suggest_categorical("batch_size", list(self.batch_size)),
            "epochs": trial.suggest_int("epochs", *self.epochs),
            "learning_rate": trial.suggest_float("learning_rate", *self.learning_rate, log=True),
        }


def tune(
    options: Options, trials: int, space: Space | None = None, *, tell: Tell | None = None
) -> dict[str, Any]:
    """Search until `trials` settings are measured; leave the best one's adapter at `options.out`.

    Beside its training.json lie tuning.json, history.png and importance.png. A search that is
    done can be carried on with more trials.

    Args:
        options: What all trials have in common; what is searched is not read from it.
        trials: Measured settings in all, those of earlier calls included. A setting whose loss is
            not finite counts as measured.
        space: What is searched.
        tell: Is told of each trial, in a line.

    Returns:
        What tuning.json says: "trials" (each with "number", "state", "parameters",
        "validation_loss", "test_perplexity", "wall_seconds"), "best" (one of them),
        "importances" {parameter: share}, "space", "seed", and "record", the best training.json.

    Raises:
        ValueError: bad input, another search's folder, or no setting with a finite loss.
        OSError: the disk is full or cannot be written.
    """
    if trials < 1:
        raise ValueError(f"--tune must be at least 1, got {trials}")
    if process_count() > 1:
        raise ValueError("--tune runs in one process; start it without a launcher")
    if options.max_steps is not None:
        raise ValueError("--tune searches the number of epochs: leave --max-steps away")
    if not all(importlib.util.find_spec(name) for name in ("optuna", "matplotlib")):
        raise ValueError("--tune needs optuna and matplotlib: pip install 'superpose[train]'")
    check_sources(options)
    check_past(options.orthogonal_to)
    search = _Search(options, space or Space(), tell or _to_stderr)
    # Optuna takes a second to import.
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        search.claim()
        while len(search.measured()) < trials:
            search.try_next()
        return search.finish()
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise OSError(f"{search.storage}: cannot be read or written: {cause}") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class _Search:
    """One search, in its folder."""

    def __init__(self, options: Options, space: Space, tell: Tell) -> None:
        self._options = options
        self._space = space
        self._tell = tell
        self._folder = work_folder(options.out, "tune")

    @property
    def storage(self) -> Path:
        """Where the study lies."""
        return self._folder / "study.sqlite3"

    def _identity(self) -> dict[str, Any]:
        """Return what all trials have in common, as JSON has it."""
        fields = asdict(self._options)
        for searched in asdict(self._space):
            del fields[searched]
        fields["data"] = [str(source) for source in self._options.data]
        fields["orthogonal_to"] = named(self._options.orthogonal_to)
        del fields["out"]
        fields["precision"] = self._options.decided_precision
        identity = {
            "options": fields,
            "space": asdict(self._space),
            "base_digest": checkpoint_digest(resolve_base(self._options.base)),
            "files": [
                None if is_hub_id(source) else file_sha256(Path(source))
                for source in self._options.data
            ],
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def claim(self) -> None:
        """Make the folder, or take it up again.

        Raises:
            ValueError: it holds another search, or `out` something else.
        """
        import optuna

        record = self._folder / "search.json"
        if record.exists():
            if json.loads(record.read_text("utf-8")) != self._identity():
                raise ValueError(
                    f"{self._folder} holds a search with other options, data or base; repeat that "
                    "command, name another --out, or delete the folder"
                )
        elif self._options.out.exists():
            raise ValueError(f"{self._options.out} exists; name another --out or delete it")
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(record, json.dumps(self._identity(), indent=1).encode())
        # Optuna tells of every trial at length.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{self.storage}",
            direction="minimize",
            load_if_exists=True,
        )
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            # Of a process that was killed. It is asked for again, and does not count.
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def measured(self) -> list[Any]:
        """Return the trials that count, in their order."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        trials: list[Any] = self._study.get_trials(deepcopy=False, states=states)
        return trials

    def try_next(self) -> None:
        """Measure one more setting."""
        import optuna

        index = len(self.measured())
        # A sampler of its own for each setting: it depends on the measured trials alone, not on
        # how many processes it took to measure them.
        seed = int(canonical_digest([self._options.seed, index])[:8], 16)
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
        trial = self._study.ask()
        setting = self._space.suggest(trial)
        trial.set_user_attr("index", index)
        began = time.monotonic()
        out = self._trial_folder(index)
        try:
            record = self._train(setting, out)
        except NotFinite as error:
            self._tell(f"trial {index + 1}: {_setting(setting)}: {error}")
            shutil.rmtree(work_folder(out), ignore_errors=True)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return
        loss = record["adapter_figures"]["validation"]["loss"]
        trial.set_user_attr("test_perplexity", record["adapter_figures"]["test"]["perplexity"])
        trial.set_user_attr("wall_seconds", round(time.monotonic() - began, 1))
        self._study.tell(trial, loss)
        best = self._study.best_trial
        self._tell(
            f"trial {index + 1}: {_setting(setting)}: validation loss {loss:.4f} "
            f"(best: {best.value:.4f}, trial {best.user_attrs['index'] + 1})"
        )
        for folder in self._folder.glob("trial-*"):
            if folder != self._trial_folder(best.user_attrs["index"]):
                shutil.rmtree(folder, ignore_errors=True)

    def _trial_folder(self, index: int) -> Path:
        return self._folder / f"trial-{index + 1}"

    def _train(self, setting: dict[str, Any], out: Path) -> dict[str, Any]:
        if out.exists():
            # Trained, but killed before the study knew: the setting is the same, see `try_next`.
            return read_record(out)
        return train(replace(self._options, out=out, **setting))

    def finish(self) -> dict[str, Any]:
        """Put the best adapter at `out`, with what the search found; return that.

        Raises:
            ValueError: no trial had a finite loss.
        """
        import optuna

        if not self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            raise ValueError("no trial had a finite loss; lower the learning rates of the search")
        best = self._study.best_trial
        source = self._trial_folder(best.user_attrs["index"])
        if not source.exists():
            train(replace(self._options, out=source, **best.params))
        trials = [_described(trial) for trial in self.measured()]
        tuning = {
            "trials": trials,
            "best": _described(best),
            "importances": self._importances(),
            "space": asdict(self._space),
            "seed": self._options.seed,
            "optuna": optuna.__version__,
            "record": read_record(source),
        }
        out = self._options.out
        # A result of fewer trials stays until the new one is whole.
        whole = self._folder / "result" if out.exists() else out
        if whole != out:
            shutil.rmtree(whole, ignore_errors=True)
        with new_folder(whole) as folder:
            for file in source.iterdir():
                shutil.copy2(file, folder / file.name)
            (folder / "tuning.json").write_text(json.dumps(tuning, indent=2) + "\n", "utf-8")
            draw_history(trials, folder / "history.png")
            draw_importances(tuning["importances"], folder / "importance.png")
        if whole != out:
            shutil.rmtree(out)
            whole.rename(out)
        plain: dict[str, Any] = json.loads(json.dumps(tuning))
        return plain

    def _importances(self) -> dict[str, float]:
        """Return how much each parameter matters for a low loss, 1 in all; {} if nothing varies."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        losses = {trial.value for trial in self.measured() if trial.value is not None}
        if len(losses) < 2:
            return {}
        # It draws no random numbers and needs no scikit-learn.
        found = get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator())
        return {name: float(share) for name, share in found.items()}


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in setting.items())


def _described(trial: Any) -> dict[str, Any]:
    """Return a trial as tuning.json has it, numbered from 1."""
    return {
        "number": trial.user_attrs["index"] + 1,
        "state": "complete" if trial.value is not None else "not finite",
        "parameters": dict(trial.params),
        "validation_loss": trial.value,
        "test_perplexity": trial.user_attrs.get("test_perplexity"),
        "wall_seconds": trial.user_attrs.get("wall_seconds"),
    }
