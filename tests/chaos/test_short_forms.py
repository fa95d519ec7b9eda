"""The short form of every chaos script: what the long ones repeat a thousand times holds once."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tests.chaos import fuzz_doors, fuzz_parsers, overload, soak


@pytest.mark.parametrize(
    ("main", "form"),
    [
        (fuzz_parsers.main, "--short"),
        (fuzz_doors.main, "--short"),
        (overload.main, "--short"),
        (soak.main, "--minutes=0.05"),
    ],
    ids=["fuzz_parsers", "fuzz_doors", "overload", "soak"],
)
def test_nothing_is_lost(
    main: Callable[[list[str]], int], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([form])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (status, told["lost"]) == (0, [])
