from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest

from superpose_adapters.mix import BoundMix
from superpose_server.caller import Caller, set_caller
from superpose_server.control.audit import Audit, Change
from superpose_server.control.default_mix import MixState

MIX = BoundMix("base")


def note(audit: Audit, number: int) -> None:
    audit.note(f"set a={number}", MixState(number, MIX), MixState(number + 1, MIX))


def noted(changes: list[Change]) -> list[int]:
    return [change.generation_before for change in changes]


@pytest.fixture(autouse=True)
def calling() -> None:
    set_caller(Caller("ops", "ipv4:10.0.0.1:5"))


def test_a_change_says_who_what_and_from_where_to_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    audit = Audit(tmp_path)
    note(audit, 7)
    [change] = audit.newest(10)
    assert (change.who, change.peer, change.what) == ("ops", "ipv4:10.0.0.1:5", "set a=7")
    assert (change.generation_before, change.generation) == (7, 8)
    assert change.digest == MIX.digest
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", change.time)
    assert "change who=ops peer=ipv4:10.0.0.1:5 what='set a=7' generation=7->8" in caplog.text
    line = json.loads((tmp_path / "audit.jsonl").read_text())
    assert line["what"] == "set a=7"
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_newest_come_last_and_outlast_the_server(tmp_path: Path) -> None:
    for number in range(5):
        note(Audit(tmp_path), number)
    assert noted(Audit(tmp_path).newest(3)) == [2, 3, 4]
    assert noted(Audit(tmp_path).newest(10)) == [0, 1, 2, 3, 4]
    assert Audit(tmp_path / "none").newest(3) == []


def test_files_are_bounded_and_what_is_left_is_the_newest(tmp_path: Path) -> None:
    audit = Audit(tmp_path, most_bytes=1000)
    for number in range(100):
        note(audit, number)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert set(sizes) == {"audit.jsonl", "audit.jsonl.1"}
    assert max(sizes.values()) <= 1000
    found = noted(audit.newest(1000))
    assert found == list(range(100 - len(found), 100))
    assert len(found) >= 3


@pytest.mark.parametrize("cut", [1, 10])
def test_a_line_that_was_cut_off_hides_no_other(tmp_path: Path, cut: int) -> None:
    audit = Audit(tmp_path)
    for number in range(2):
        note(audit, number)
    os.truncate(audit.path, audit.path.stat().st_size - cut)
    note(audit, 2)
    assert noted(audit.newest(10)) == ([0, 1, 2] if cut == 1 else [0, 2])


def test_a_record_that_cannot_be_written_is_told_and_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = Audit(tmp_path)
    audit.path.mkdir()
    note(audit, 1)
    assert f"the record of changes {audit.path} cannot be written" in caplog.text
    audit.path.rmdir()
    note(audit, 2)
    assert noted(audit.newest(10)) == [2]
