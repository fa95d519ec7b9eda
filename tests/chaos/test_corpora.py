"""What the fuzzers once found, read again: each gets its value or its error, and no other end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.chaos.fuzz_parsers import CORPORA, Outcomes, corpus_of, try_input
from tests.chaos.targets import Target, Workspace, make_targets


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    return make_targets(Workspace(tmp_path_factory.mktemp("corpora")))


def test_every_corpus_is_that_of_a_parser(targets: list[Target]) -> None:
    assert {path.name for path in CORPORA.iterdir()} <= {corpus_of(each).name for each in targets}


@pytest.mark.parametrize(
    "path", sorted(CORPORA.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_was_found_is_refused(targets: list[Target], path: Path, tmp_path: Path) -> None:
    (target,) = (each for each in targets if corpus_of(each) == path.parent)
    outcomes = Outcomes()
    read = try_input(target, path.read_bytes(), outcomes, secrets=(str(tmp_path.parent),))
    assert (read, outcomes.found) == (False, {})
