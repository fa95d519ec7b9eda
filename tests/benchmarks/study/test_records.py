from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from benchmarks.study.records import Records
from tests.full_disk import files_of_at_most


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "some" / "records.jsonl"
    Records(path).add({"key": "a", "value": 1.5})
    records = Records(path)
    records.add({"key": "b", "value": 2})
    again = Records(path)
    assert len(again) == 2
    assert "a" in again
    assert "c" not in again
    assert again.get("a") == {"key": "a", "value": 1.5}
    assert [record["key"] for record in again] == ["a", "b"]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_no_record_and_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add({"key": "a"})
    whole = path.read_bytes()
    records.add({"key": "b"})
    path.write_bytes(path.read_bytes()[:-cut])
    torn = Records(path)
    assert "b" not in torn
    torn.add({"key": "c"})
    assert path.read_bytes() == whole + b'{"key":"c"}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"key":"a"}\n{"key":\n{"key":"c"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:2: not a record; delete the line"):
        Records(path)


def test_a_full_disk_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    records.add({"key": "a"})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            records.add({"key": "b"})
    assert "b" not in records
    records.add({"key": "c"})
    assert [record["key"] for record in Records(path)] == ["a", "c"]


def test_what_is_dropped_is_gone_from_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    for key in "abc":
        records.add({"key": key, "of": ["x"] if key == "b" else []})
    assert records.drop(lambda record: "x" in record["of"]) == 1
    assert records.drop(lambda record: "x" in record["of"]) == 0
    assert "b" not in records
    records.add({"key": "d", "of": []})
    assert [record["key"] for record in Records(path)] == ["a", "c", "d"]


def test_a_full_disk_drops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    records = Records(path)
    for key in "abc":
        records.add({"key": key})
    with files_of_at_most(20), pytest.raises(OSError, match=r"records.jsonl: cannot be written: F"):
        records.drop(lambda record: record["key"] == "a")
    assert "a" in records
    assert len(Records(path)) == 3
    assert list(tmp_path.iterdir()) == [path]
