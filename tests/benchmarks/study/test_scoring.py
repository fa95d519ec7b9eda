from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.study.config import Config, Evaluation, read_config
from benchmarks.study.evaluator import NotFinite, Weighted
from benchmarks.study.inputs import Sources
from benchmarks.study.scoring_stage import check_agreement, note_rows
from benchmarks.study.study import Scoring, Study
from benchmarks.study.workspace import Workspace

from superpose_adapters.scoring import EncodedText, Scope
from superpose_adapters.text_encoder import TextEncoder


class _Given:
    """An evaluator that says what it was told to say; None: nothing finite."""

    def __init__(self, nats: list[float] | None) -> None:
        self._nats = nats

    def row_nats(self, mix: Weighted, rows: Sequence[EncodedText], scope: Scope) -> list[float]:
        if self._nats is None:
            raise NotFinite("nothing finite")
        return self._nats

    def close(self) -> None:
        pass


def _sources(config: Config, folder: Path) -> Sources:
    return Sources(config, config.base, None, folder)


@pytest.fixture
def config(little: Path) -> Config:
    return read_config(str(little))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "out", tmp_path / "cache")


def _study(config: Config, sources: Sources) -> tuple[Study, list[Scoring]]:
    study = Study(config, sources.inputs())
    return study, [Scoring((), "birds", study.template)]


@pytest.mark.parametrize(
    ("dtype", "served", "local", "agree"),
    [
        ("float32", [100.0, 10.0], [100.0, 10.0005], True),
        ("float32", [100.0, 10.0], [100.0, 10.005], False),
        # Rows of float32 may not make up for one another.
        ("float32", [100.0, 10.0], [99.9, 10.1], False),
        ("bfloat16", [100.0, 10.0], [99.0, 10.5], True),
        ("bfloat16", [100.0, 10.0], [97.0, 10.0], False),
        ("float32", [100.0, float("nan")], [100.0, 10.0], False),
        ("float32", None, None, True),
        ("float32", None, [100.0, 10.0], False),
        ("float32", [100.0, 10.0], None, False),
    ],
)
def test_a_server_must_agree(
    config: Config,
    workspace: Workspace,
    tmp_path: Path,
    dtype: Any,
    served: list[float] | None,
    local: list[float] | None,
    agree: bool,
) -> None:
    config = replace(config, evaluation=Evaluation(dtype=dtype, test_rows=2, served=True))
    sources = _sources(config, tmp_path)
    study, (scoring,) = _study(config, sources)
    missing = {"key": scoring}
    arguments = (study, missing, _Given(served), _Given(local), sources, workspace)
    if agree:
        check_agreement(*arguments)
    else:
        with pytest.raises(ValueError, match="not the same through the server and in this process"):
            check_agreement(*arguments)


def test_rows_are_noted_with_tokens_and_groups(
    config: Config, workspace: Workspace, tmp_path: Path
) -> None:
    sources = _sources(config, tmp_path)
    study, scorings = _study(config, sources)
    note_rows(study, scorings, sources, workspace, check=True)
    (record,) = workspace.rows
    assert record["groups"] == sources.groups("birds", "test")
    lengths = [len(row.ids) for row in sources.texts("birds", "test", study.template)]
    assert record["tokens"] == [length - 1 for length in lengths]


def test_a_record_of_rows_without_groups_is_made_anew(
    config: Config, workspace: Workspace, tmp_path: Path
) -> None:
    sources = _sources(config, tmp_path)
    study, scorings = _study(config, sources)
    note_rows(study, scorings, sources, workspace, check=True)
    (whole,) = workspace.rows
    workspace.rows.add({n: v for n, v in whole.items() if n not in ("groups", "digest")})
    note_rows(study, scorings, sources, workspace, check=False)
    assert list(workspace.rows) == [whole]


def test_rows_that_are_encoded_otherwise_than_before_are_refused(
    config: Config, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = _sources(config, tmp_path)
    study, scorings = _study(config, sources)
    note_rows(study, scorings, sources, workspace, check=True)

    encode = TextEncoder.row

    def other(*arguments: Any) -> EncodedText:
        found = encode(*arguments)
        # As many tokens, one of them another.
        return EncodedText((found.ids[0] + 1, *found.ids[1:]), found.answer_start)

    monkeypatch.setattr(TextEncoder, "row", other)
    changed = _sources(config, tmp_path)
    # Who has nothing more to score needs no rows.
    note_rows(study, scorings, changed, workspace, check=False)
    with pytest.raises(ValueError, match="test rows of birds are encoded otherwise"):
        note_rows(study, scorings, changed, workspace, check=True)
