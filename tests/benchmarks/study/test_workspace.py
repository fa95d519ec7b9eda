from __future__ import annotations

import threading
from pathlib import Path

import pytest
from benchmarks.study import workspace as workspace_module
from benchmarks.study.status import speed
from benchmarks.study.workspace import Workspace


def test_a_stage_that_fails_is_noted_without_what_it_was_to_do(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    with workspace.stage("train", "seeds", ["a"], tokens=1000):
        pass
    with (
        pytest.raises(KeyboardInterrupt),
        workspace.stage("train", "seeds", ["b"], tokens=5000),
    ):
        raise KeyboardInterrupt
    done, broken = workspace.stages()
    assert done["complete"] is True
    assert done["tokens"] == 1000
    assert broken["complete"] is False
    assert "tokens" not in broken
    assert {"seconds", "peak_rss_mib", "machine"} <= set(broken)
    seconds = float(str(done["seconds"]))
    assert speed(workspace, "train") == (1000 / seconds if seconds else None)


def test_stages_of_what_is_not_needed_are_left_out(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    for keys in (["a", "b"], ["c"]):
        with workspace.stage("score", "seeds", keys):
            pass
    assert [each["keys"] for each in workspace.stages()] == [["a", "b"], ["c"]]
    assert [each["keys"] for each in workspace.stages({"b", "d"})] == [["a", "b"]]


def test_results_of_an_adapter_are_forgotten_and_no_others(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, tmp_path)
    workspace.losses.add({"key": "1", "mix": [["a", 1.0], ["b", 0.5]]})
    workspace.losses.add({"key": "2", "mix": [["b", 1.0]]})
    workspace.losses.add({"key": "3", "mix": []})
    workspace.geometry.add({"key": "4", "pair": ["a", "b"]})
    workspace.geometry.add({"key": "5", "pair": ["b", "c"]})
    workspace.findings.add({"key": "6", "adapters": ["c", "a"]})
    workspace.findings.add({"key": "7"})
    assert workspace.forget("a") == 3
    again = Workspace(tmp_path, tmp_path)
    kept = [record["key"] for records in (again.losses, again.geometry) for record in records]
    assert kept == ["2", "3", "5"]
    assert [record["key"] for record in again.findings] == ["7"]


def test_two_studies_take_turns_in_one_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Workspace(tmp_path / name, tmp_path / "cache") for name in ("one", "two"))
    waits = threading.Event()
    told: list[str] = []
    order: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        waits.set()

    def train() -> None:
        with second.cache_locked():
            order.append("second")

    monkeypatch.setattr(workspace_module, "_tell", tell)
    thread = threading.Thread(target=train)
    with first.cache_locked():
        thread.start()
        assert waits.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert "another study trains into this cache" in told[0]
