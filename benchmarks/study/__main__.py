"""`python -m benchmarks.study run|report|status`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from benchmarks.serverprocess import ServerFailed
from benchmarks.study.config import Config, bundled_configs, read_config
from benchmarks.study.experiments.tuning import missing_searches, tuned_study
from benchmarks.study.inputs import Inputs, Sources, read_inputs
from benchmarks.study.plan import TUNING, wanted
from benchmarks.study.publish import publish
from benchmarks.study.run import Runner
from benchmarks.study.status import show_status
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace, default_cache
from superpose_client.errors import CallError
from superpose_train.options import base_label
from superpose_train.scratch_memory import keep_scratch

_RESULTS = Path(__file__).parent / "results"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Adapters summed against adapters trained jointly: every table and figure of "
        "arXiv 2508.11985, with its controls. What is finished is kept; a run goes on "
        "where an earlier one ended.",
    )
    parser.add_argument("command", choices=("run", "report", "status"))
    parser.add_argument(
        "--config",
        required=True,
        help=f"{', '.join(bundled_configs())}, or a .toml file",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the data files; SUPERPOSE_DATA when absent"
    )
    parser.add_argument(
        "--base", help="in place of the config's, such as a folder of the same model"
    )
    parser.add_argument(
        "--out", type=Path, help="where results are; default benchmarks/study/results/NAME"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="where adapters are; default %(default)s",
    )
    parser.add_argument(
        "--all-rows", action="store_true", help="train on every row, whatever the config says"
    )
    parser.add_argument(
        "--via-server",
        action="store_true",
        help="score through a live superpose-server; results then go to NAME-served",
    )
    parser.add_argument(
        "--only", metavar="EXPERIMENT,...", help="run these experiments only, in the config's order"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr (argparse exits with 2)."""
    options = build_parser().parse_args(arguments)
    try:
        return _main(options)
    except (ValueError, OSError, ServerFailed, CallError) as error:
        print(f"study: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("study: interrupted; repeat the command to go on", file=sys.stderr)
    return 1


def _main(options: argparse.Namespace) -> int:
    keep_scratch()
    # Its bars, one a load, would tear ours.
    disable_progress_bar()
    config = read_config(options.config)
    if options.all_rows:
        config = replace(config, training=replace(config.training, rows=None))
    if options.via_server:
        config = replace(config, evaluation=replace(config.evaluation, served=True))
    suffix = ("-all" if options.all_rows else "") + ("-served" if options.via_server else "")
    out = options.out or _RESULTS / (config.name + suffix)
    workspace = Workspace(out, options.cache)
    if options.command == "report":
        return _report(config, workspace)
    environment = os.environ.get("SUPERPOSE_DATA")
    data = options.data or (Path(environment) if environment else None)
    sources = Sources(config, options.base or config.base, data, options.cache / "synthetic")
    if options.command == "status":
        show_status(config, sources.inputs(), sources, workspace)
        return 0
    with workspace.locked():
        _run(options, config, sources, workspace)
    return _report(config, workspace)


def _run(
    options: argparse.Namespace, config: Config, sources: Sources, workspace: Workspace
) -> None:
    inputs = replace(sources.inputs(), overrides=_overrides(options))
    inputs.write(workspace.inputs_path)
    names = [experiment.name for experiment in wanted(config)]
    only = options.only.split(",") if options.only else names
    if unknown := set(only) - set(names):
        raise ValueError(f"--only {min(unknown)}: config {config.name} has {', '.join(names)}")
    show_status(config, inputs, sources, workspace)
    study = Study(config, inputs)
    dropped = True
    # An adapter that had to be trained again may take results of earlier experiments with it.
    while dropped:
        dropped = False
        for experiment in wanted(config):
            if experiment.name not in only:
                continue
            chosen = study if experiment is TUNING else tuned_study(study, workspace)
            runner = Runner(chosen, sources, workspace, say=_say)
            try:
                dropped |= runner.run(experiment) > 0
            finally:
                runner.close()


def _overrides(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags that took the place of what the config says; no path, for the record."""
    flags = [] if options.base is None else [f"--base={base_label(options.base)}"]
    flags += ["--all-rows"] if options.all_rows else []
    flags += ["--via-server"] if options.via_server else []
    return tuple(flags)


def _report(config: Config, workspace: Workspace) -> int:
    inputs: Inputs | None = read_inputs(workspace.inputs_path)
    if inputs is None:
        raise ValueError(f"{workspace.out}: nothing was run; use `run` first")
    study = Study(config, inputs)
    if not missing_searches(study, workspace):
        study = tuned_study(study, workspace)
    # Else the report tells of the searches alone.
    print(publish(study, workspace))
    return 0


def _say(line: str) -> None:
    print(f"study: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
