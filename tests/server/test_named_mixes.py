from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters.mix import Mix
from superpose_adapters.mix_syntax import MAX_ABS_WEIGHT, NAME_PATTERN, RESERVED_NAMES
from superpose_server.control.checked_file import CheckedFile, FileDamaged
from superpose_server.control.named_mixes import NamedMix, NamedMixes
from superpose_server.errors import FailedPrecondition, NotFound

QA = NamedMix("qa", Mix.of({"math": 1, "medicine": 0.5}))
names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: name not in RESERVED_NAMES)
mixes = st.dictionaries(names, st.floats(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT), max_size=4).map(Mix.of)


@given(st.dictionaries(names, mixes, max_size=4), st.data())
def test_what_is_read_is_what_was_put_and_not_removed(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, Mix], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("state")
    named = NamedMixes(folder)
    for name, mix in content.items():
        named.put(NamedMix(name, mix))
    kept = dict(content)
    for name in data.draw(st.sets(st.sampled_from(sorted(content)))) if content else ():
        named.remove(name)
        del kept[name]
    for read in (named, NamedMixes(folder)):
        assert [(each.name, each.mix) for each in read.all()] == sorted(kept.items())
        assert all(read.find(name) == mix for name, mix in kept.items())
        assert read.find("never.put") is None


def test_a_name_that_is_put_again_stands_for_the_new_mix(tmp_path: Path) -> None:
    named = NamedMixes(tmp_path)
    named.put(QA)
    listed = named.all()
    named.put(NamedMix("qa", Mix()))
    assert listed == [QA]
    assert NamedMixes(tmp_path).all() == [NamedMix("qa", Mix())]


def test_a_name_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    named = NamedMixes(tmp_path)
    with pytest.raises(NotFound, match=r"no mix is named 'law' \(named: none\)") as caught:
        named.remove("law")
    assert caught.value.reason == "NAMED_MIX_NOT_FOUND"
    named.put(QA)
    with pytest.raises(NotFound, match=r"'xxx.*\(named: qa\)") as caught:
        named.remove("x" * 10_000)
    assert len(caught.value.message) < 200


def test_there_are_so_many_names_and_no_more(tmp_path: Path) -> None:
    named = NamedMixes(tmp_path, most=2)
    for name in ("a", "b", "a"):
        named.put(NamedMix(name, Mix()))
    named.put(NamedMix("b", QA.mix))
    with pytest.raises(FailedPrecondition, match="2 mixes have names already"):
        named.put(QA)
    named.remove("a")
    named.put(QA)
    assert [each.name for each in NamedMixes(tmp_path).all()] == ["b", "qa"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    named = NamedMixes(tmp_path)
    named.put(QA)
    with monkeypatch.context() as patch:
        patch.setattr(Path if where == "replace" else os, where, full)
        with pytest.raises(
            FailedPrecondition, match=r"names of mixes cannot be written \(No space"
        ):
            named.put(NamedMix("other", Mix()))
        with pytest.raises(FailedPrecondition, match="nothing has changed"):
            named.remove("qa")
    assert named.all() == NamedMixes(tmp_path).all() == [QA]


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    NamedMixes(tmp_path).put(QA)
    path = tmp_path / "named_mixes.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(FileDamaged, match="checksum does not match") as caught:
        NamedMixes(tmp_path)
    assert str(path) in str(caught.value)
    assert "or delete it to start without named mixes" in str(caught.value)
    path.unlink()
    assert NamedMixes(tmp_path).all() == []


@pytest.mark.parametrize(
    "body", [[], "qa", {"qa": []}, {"QA": {}}, {"base": {}}, {"qa": {"math": "1"}}, {"qa": None}]
)
def test_what_holds_no_named_mixes_is_damaged(tmp_path: Path, body: object) -> None:
    CheckedFile(tmp_path / "named_mixes.json", "file", "start anew").write(body)
    with pytest.raises(FileDamaged, match="is damaged: it is not a whole file of named mixes"):
        NamedMixes(tmp_path)


def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    NamedMixes(tmp_path).put(QA)
    path = tmp_path / "named_mixes.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FileDamaged, match="it has format 2, not 1"):
        NamedMixes(tmp_path)
