"""A few kills of `kills`, whose long form is run by hand."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.kills import Storms
from tests.chaos.script import Record


def test_a_server_that_is_killed_comes_back_with_what_was_acknowledged_or_under_way(
    tmp_path: Path,
) -> None:
    record = Record("kills")
    Storms(tmp_path, record, seed=1).run(4)
    assert record.lost == []
    assert record.facts["kills_in_storm"] > 0
    assert record.facts["kills_in_start"] > 0
    assert record.facts["acknowledged"] > 5
