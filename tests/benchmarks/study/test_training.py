from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from benchmarks.study import training
from benchmarks.study import workspace as workspace_module
from benchmarks.study.study import AdapterSpec, Study
from benchmarks.study.training import note_adapter, train_missing
from benchmarks.study.workspace import Workspace
from tests.benchmarks.study.conftest import MakeStudy
from transformers import AutoModelForCausalLM

from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import read_adapter

# As the trainer told it before --precision; the cache may hold such adapters.
_TOLD = {
    "parameters": {},
    "trained_parameters": 1,
    "steps": 1,
    "wall_seconds": 1.0,
    "device": "cpu",
    "bf16_autocast": False,
    "versions": {},
}


def _put(source: Path, folder: Path) -> None:
    """Lay down an adapter as if it had been trained just now."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    (folder / "training.json").write_text(json.dumps(_TOLD))


@pytest.fixture
def study(make_study: MakeStudy) -> Study:
    return make_study()


@pytest.fixture
def spec(study: Study) -> AdapterSpec:
    return study.fundamental("a", 0)


@pytest.fixture
def workspace(study: Study, spec: AdapterSpec, adapters: Path, tmp_path: Path) -> Workspace:
    """One noted adapter, with a loss, a cosine and a finding of it, and a loss of another one."""
    found = Workspace(tmp_path / "out", tmp_path / "cache")
    key = study.adapter_key(spec)
    _put(adapters / "domain-000", found.adapter(key))
    assert note_adapter(study, spec, found) == 0
    found.losses.add({"key": "of it", "mix": [[key, 1.0]]})
    found.losses.add({"key": "of another", "mix": [["x", 1.0]]})
    found.geometry.add({"key": "pair", "pair": ["x", key]})
    found.findings.add({"key": "finding", "adapters": [key]})
    return found


def test_the_record_says_which_adapter_it_was_and_how_it_was_computed(
    study: Study, spec: AdapterSpec, workspace: Workspace, adapters: Path, tiny: Path
) -> None:
    record = workspace.adapters.get(study.adapter_key(spec))
    assert record is not None
    layout = read_layout(AutoModelForCausalLM.from_pretrained(tiny))
    assert record["digest"] == read_adapter(adapters / "domain-000", layout).digest
    assert record["parameters"] == {"precision": "float32"}
    assert record["device"] == "cpu"


def test_an_adapter_that_became_another_one_takes_its_results_with_it(
    study: Study, spec: AdapterSpec, workspace: Workspace, adapters: Path
) -> None:
    key = study.adapter_key(spec)
    before = workspace.adapters.get(key)
    _put(adapters / "domain-001", workspace.adapter(key))
    assert note_adapter(study, spec, workspace) == 3
    assert [record["key"] for record in workspace.losses] == ["of another"]
    assert not len(workspace.geometry)
    assert not len(workspace.findings)
    after = workspace.adapters.get(key)
    assert before is not None
    assert after is not None
    assert before["digest"] != after["digest"]
    assert note_adapter(study, spec, workspace) == 0


def test_the_same_adapter_trained_again_keeps_its_results(
    study: Study, spec: AdapterSpec, workspace: Workspace, adapters: Path
) -> None:
    folder = workspace.adapter(study.adapter_key(spec))
    _put(adapters / "domain-000", folder)
    # How the base is called is no part of what an adapter does.
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}
    path.write_text(json.dumps(fields))
    assert note_adapter(study, spec, workspace) == 0
    assert len(workspace.losses) == 2


def test_results_of_an_adapter_that_nobody_noted_are_not_trusted(
    study: Study, spec: AdapterSpec, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "out" / "adapters.jsonl").unlink()
    again = Workspace(tmp_path / "out", tmp_path / "cache")
    assert note_adapter(study, spec, again) == 3


def test_what_another_study_has_trained_meanwhile_is_taken(
    study: Study,
    adapters: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, other = (Workspace(tmp_path / name, tmp_path / "cache") for name in ("one", "two"))
    spec = study.fundamental("b", 0)
    waits = threading.Event()
    done: list[int] = []

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it is there")

    def train() -> None:
        sources: object = None  # not asked, as nothing is trained
        done.append(
            train_missing(study, [spec], sources, here, {"b": 1.0}, "seeds")  # type: ignore[arg-type]
        )

    monkeypatch.setattr(training, "train_many", never)
    monkeypatch.setattr(workspace_module, "_tell", lambda line: waits.set())
    thread = threading.Thread(target=train)
    with other.cache_locked():
        thread.start()
        assert waits.wait(60)
        _put(adapters / "domain-000", other.adapter(study.adapter_key(spec)))
    thread.join(60)
    assert done == [0]
    assert study.adapter_key(spec) in here.adapters
