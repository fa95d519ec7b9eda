"""The search for dropout, batch size, epochs and learning rate, on validation rows."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Cell, Table
from benchmarks.study.document import Picture, Section
from benchmarks.study.inputs import Sources
from benchmarks.study.palette import SERIES
from benchmarks.study.results import Results
from benchmarks.study.study import AdapterSpec, Needs, Study
from benchmarks.study.ticks import legend, whole_numbers
from benchmarks.study.training import options_of
from benchmarks.study.workspace import Workspace
from superpose_train.tuning.tune import RANDOM_TRIALS, Space, tune

_APPLIED = ("epochs", "batch_size", "learning_rate", "dropout")


def searches(study: Study) -> dict[str, AdapterSpec]:
    """Return {key: adapter whose options are searched}; `study` must be the one before tuning."""
    config = study.config.tuning
    if config is None:
        return {}
    seed = study.config.seeds.shared[0]
    domains = config.domains or study.config.domains
    specs = [study.fundamental(domain, seed) for domain in domains]
    if config.joint:
        specs += [study.joint(union, seed) for union in study.unions]
    return {
        study.finding_key("tuning", [spec], config.trials, config.max_epochs): spec
        for spec in specs
    }


def needs(study: Study) -> Needs:
    """Ask for one finding a search; they train their own adapters."""
    wanted = Needs()
    for key in searches(study):
        wanted.findings[key] = ()
    return wanted


def measure(study: Study, key: str, sources: Sources, workspace: Workspace) -> None:
    """Search, and keep what was tried."""
    config = study.config.tuning
    assert config is not None
    spec = searches(study)[key]
    folder = workspace.cache / "tuning" / key
    space = Space(epochs=(1, config.max_epochs))
    with workspace.cache_locked():
        found = tune(options_of(study, spec, sources, folder), config.trials, space)
    workspace.findings.add(
        {
            "key": key,
            "domains": list(spec.domains),
            "trials": found["trials"],
            "best": found["best"],
            "importances": found["importances"],
            "space": found["space"],
        }
    )


def missing_searches(study: Study, workspace: Workspace) -> list[str]:
    """Return the searches that are to be applied and are not done, by their domains."""
    config = study.config.tuning
    if config is None or not config.apply:
        return []
    return [_name(spec) for key, spec in searches(study).items() if key not in workspace.findings]


def tuned_study(study: Study, workspace: Workspace) -> Study:
    """Return the study with what was found applied, if its config says so.

    Raises:
        ValueError: It says so, and a search is not done.
    """
    config = study.config.tuning
    if config is None or not config.apply:
        return study
    if missing := missing_searches(study, workspace):
        raise ValueError(
            f"{workspace.out}: tuning.apply is set and the search of {missing[0]} is not done; "
            "finish it by `run --only tuning`"
        )
    tuned: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, spec in searches(study).items():
        record = workspace.findings.get(key)
        assert record is not None
        best = record["best"]["parameters"]
        tuned[spec.domains] = {name: best[name] for name in _APPLIED}
    return Study(study.config, study.inputs, tuned)


def _name(spec: AdapterSpec) -> str:
    return "+".join(spec.domains)


def section(study: Study, results: Results) -> Section:
    """Tell what the searches found."""
    found = Section("tuning", "Tuning")
    config = study.config.tuning
    if config is None:
        return found
    untuned = Study(study.config, study.inputs)
    records = {
        _name(spec): record
        for key, spec in searches(untuned).items()
        if (record := results.finding(key))
    }
    found.text = [
        f"Optuna's TPE, {config.trials} trials a search, the first "
        f"{min(RANDOM_TRIALS, config.trials)} of them at random, by the loss on "
        f"{study.config.training.eval_rows or 'all'} validation rows. "
        f"{len(records)} of {len(searches(untuned))} searches are done. "
        + (
            f"The adapters trained on {', '.join(map(_name, searches(untuned).values()))} are "
            "trained with what is found, all others with the config's options; nothing is trained "
            "before every search is done."
            if config.apply
            else "It is reported only: the adapters of this study are trained with the config's "
            "options, the same for all, so that they can be compared."
        ),
    ]
    rows: list[list[Cell]] = []
    for name, record in records.items():
        best = record["best"]
        complete = [t for t in record["trials"] if t["validation_loss"] is not None]
        rows.append(
            [
                name,
                len(complete),
                *(best["parameters"][parameter] for parameter in _APPLIED),
                best["validation_loss"],
                best["test_perplexity"],
                ", ".join(f"{n} {100 * v:.0f} %" for n, v in record["importances"].items()),
            ]
        )
    found.tables = [
        Table(
            "Best trials",
            ["search", "trials", *_APPLIED, "validation loss", "test perplexity", "importances"],
            rows,
        )
    ]
    if records:
        found.pictures = [
            Picture(
                "tuning",
                "Validation loss of every trial, and the best so far.",
                lambda figure: _draw(figure, records),
                (7.0, 3.2),
            )
        ]
    return found


def _draw(figure: Any, records: dict[str, dict[str, Any]]) -> None:
    axes = figure.subplots()
    for color, (name, record) in zip(SERIES, records.items(), strict=False):
        done = [t for t in record["trials"] if t["validation_loss"] is not None]
        numbers = [trial["number"] for trial in done]
        losses = [trial["validation_loss"] for trial in done]
        axes.scatter(numbers, losses, color=color, s=16)
        best = [min(losses[: at + 1]) for at in range(len(losses))]
        axes.step(numbers, best, where="post", color=color, lw=1, label=name)
    axes.set(xlabel="trial", ylabel="validation loss")
    whole_numbers(axes.xaxis)
    legend(axes)
