"""A whole study of seconds: what a server, another adapter or another config make of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from benchmarks.study.config import Config, read_config
from benchmarks.study.evaluator import Local
from benchmarks.study.inputs import Inputs, Sources, read_inputs
from benchmarks.study.plan import needed_keys, wanted
from benchmarks.study.records import Record
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace
from safetensors.torch import load_file, save_file
from tests.benchmarks.study.conftest import run_little

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture
def folder(little_run: Path, tmp_path: Path) -> Path:
    """A study that has run, in `out` and `cache` of this folder."""
    shutil.copytree(little_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _inputs(workspace: Workspace) -> Inputs:
    found = read_inputs(workspace.inputs_path)
    assert found is not None
    return found


def _by_model(records: list[Record], workspace: Workspace) -> dict[object, list[float]]:
    """Return {(mix, domain, part): nats}."""
    found: dict[object, list[float]] = {}
    for record in records:
        rows = workspace.rows.get(record["rows"])
        assert rows is not None
        found[str(sorted(record["mix"])), rows["domain"], rows["part"]] = record["nats"]
    return found


def test_a_server_scores_all_anew_and_agrees(little: Path, folder: Path) -> None:
    local = list(Workspace(folder / "out", folder / "cache").losses)
    workspace = run_little(little, folder, "--via-server")
    served = [record for record in workspace.losses if record not in local]
    assert len(served) == len(local) > 20
    expected, found = (_by_model(records, workspace) for records in (local, served))
    assert found.keys() == expected.keys()
    for model, nats in found.items():
        assert nats == pytest.approx(expected[model], rel=1e-4)
    inputs = _inputs(workspace)
    assert inputs.overrides == ("--via-server",)
    # What the first run left is not this study's: the table has what was served alone.
    table = pyarrow.parquet.read_table(folder / "out" / "losses.parquet")
    assert set(table.column("key").to_pylist()) == {record["key"] for record in served}
    config = read_config(str(little))
    assert not {record["key"] for record in served} & needed_keys(
        Study(config, inputs), wanted(config)
    )


def _evaluated(config: Config, workspace: Workspace, records: list[Record]) -> list[list[float]]:
    """Return the nats of records as the adapters that lie in the cache give them."""
    sources = Sources(config, config.base, None, workspace.cache / "synthetic")
    local = Local(sources.base, config.evaluation)
    found = []
    for record in records:
        rows = workspace.rows.get(record["rows"])
        assert rows is not None
        texts = sources.texts(rows["domain"], rows["part"], rows["template"])
        mix = [(workspace.adapter(key), weight) for key, weight in record["mix"]]
        found.append(local.row_nats(mix, texts, "all"))
    return found


def test_results_of_two_trainings_of_one_adapter_are_not_mixed(little: Path, folder: Path) -> None:
    before = Workspace(folder / "out", folder / "cache")
    path = folder / "out" / "losses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    alone = next(at for at, record in enumerate(before.losses) if len(record["mix"]) == 1)
    ((key, _),) = list(before.losses)[alone]["mix"]
    # A loss is missing, and the adapter that it needs is another one: as on another machine.
    path.write_bytes(b"".join(lines[:alone] + lines[alone + 1 :]))
    tensors = before.adapter(key) / "adapter_model.safetensors"
    changed = {name: 1.5 * tensor for name, tensor in load_file(tensors).items()}
    save_file(changed, tensors, metadata={"format": "pt"})

    after = run_little(little, folder)
    old, new = ({r["key"]: r for r in each.losses} for each in (before, after))
    assert new.keys() == old.keys()
    of_it = [each for each in old if key in dict(old[each]["mix"])]
    assert 1 < len(of_it) < len(old)
    expected = _evaluated(read_config(str(little)), after, [new[each] for each in of_it])
    for each, nats in zip(of_it, expected, strict=True):
        assert new[each]["nats"] == pytest.approx(nats, rel=1e-4)
        assert new[each]["nats"] != old[each]["nats"]
    assert all(new[each] == old[each] for each in old.keys() - set(of_it))
    geometry = {r["key"]: r for r in after.geometry}
    assert geometry.keys() == {r["key"] for r in before.geometry}
    for record in before.geometry:
        assert (geometry[record["key"]] == record) == (key not in record["pair"])


def test_the_base_of_the_command_line_is_recorded(little: Path, tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "tuned-elsewhere"
    shutil.copytree(tiny, base)
    workspace = run_little(little, tmp_path, f"--base={base}", "--all-rows", only="seeds")
    inputs = _inputs(workspace)
    assert inputs.base == "tuned-elsewhere"
    assert inputs.overrides == ("--base=tuned-elsewhere", "--all-rows")
    assert not inputs.is_papers_base
    adapter = next(iter(workspace.adapters))
    text = (workspace.adapter(adapter["key"]) / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "tuned-elsewhere"' in text
