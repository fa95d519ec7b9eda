"""Adapters in a folder by digest, for several processes at a time; test_store has the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny_adapters import DIGESTS, files

from superpose_adapters.objects import Objects

ACTOR = """
import sys
from pathlib import Path
from tests.tiny_adapters import DIGESTS, files
from superpose_adapters.objects import Objects

print(flush=True)
sys.stdin.readline()
for number in range(20):
    folder = Path(sys.argv[1]) / str(number)
    for seed in range(4):
        assert Objects(folder).put(*files(seed)) == DIGESTS[seed]
        assert Objects(folder).files(DIGESTS[seed]) == files(seed)
"""


def test_several_processes_put_and_read_one_object_at_a_time(tmp_path: Path) -> None:
    actors = [
        subprocess.Popen(
            [sys.executable, "-c", ACTOR, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for actor in actors:  # All have imported what they need, and begin together.
        assert actor.stdout is not None
        actor.stdout.readline()
    for actor in actors:
        assert actor.stdin is not None
        actor.stdin.write("\n")
        actor.stdin.flush()
    assert [actor.communicate()[1] for actor in actors] == [""] * 3
    for number in range(20):
        folder = tmp_path / str(number)
        assert {path.name for path in (folder / "objects").iterdir()} == set(DIGESTS)
        assert list((folder / "temporary").iterdir()) == []
        assert [Objects(folder).files(digest) for digest in DIGESTS] == list(map(files, range(4)))


def test_nothing_is_made_before_the_first_put(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "state" / "adapters")
    assert DIGESTS[0] not in objects
    with pytest.raises(KeyError):
        objects.files(DIGESTS[0])
    assert objects.collect(()) == []
    objects.clean()
    assert list(tmp_path.iterdir()) == []
    objects.put(*files(0))
    assert DIGESTS[0] in objects


def test_leftovers_of_a_kill_are_cleaned(tmp_path: Path) -> None:
    objects = Objects(tmp_path)
    objects.put(*files(0))
    (tmp_path / "temporary" / "half").mkdir()
    objects.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["objects"]
    assert objects.collect({DIGESTS[0]}) == []
    assert objects.collect(()) == [DIGESTS[0]]
    objects.put(*files(1))
    assert objects.files(DIGESTS[1]) == files(1)


def test_what_could_not_be_removed_is_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects(tmp_path)
    for _ in range(2):
        objects.put(*files(0))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
            assert objects.collect(()) == [DIGESTS[0]]
    assert len(list((tmp_path / "temporary").iterdir())) == 2
