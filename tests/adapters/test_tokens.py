from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from superpose_adapters.tokens import (
    MOST_TOKENS,
    Scope,
    Token,
    TokenFileError,
    editing,
    find_token,
    new_secret,
    read_tokens,
    sha256_of,
)

HASH = hashlib.sha256(b"secret").hexdigest()
ADMIN = {"sha256": HASH, "scope": "admin"}


def written(folder: Path, tokens: Any, **body: Any) -> Path:
    path = folder / "tokens.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"format": 1, "tokens": tokens, **body}))
    return path


def test_a_file_says_what_each_token_is(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {
            "ops": ADMIN,
            "ci": {
                "sha256": "0" * 64,
                "scope": "inference",
                "expires": "2030-01-31T12:00:00+02:00",
                "rate": 60,
                "concurrency": 2,
                "domains": ["math", "law"],
            },
        },
    )
    assert read_tokens(path) == (
        Token(
            "ci",
            "0" * 64,
            Scope.INFERENCE,
            datetime(2030, 1, 31, 10, tzinfo=UTC),
            60,
            2,
            frozenset({"law", "math"}),
        ),
        Token("ops", HASH, Scope.ADMIN),
    )


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "no object of"),
        ({"X": ADMIN}, "not a valid name"),
        ({"anonymous": ADMIN}, "choose another name"),
        ({"a": "secret"}, "it is no object"),
        ({"a": {"scope": "admin"}}, "sha256 is missing"),
        ({"a": {"sha256": "secret", "scope": "admin"}}, "sha256 is not 64 digits"),
        ({"a": {"sha256": HASH.upper(), "scope": "admin"}}, "sha256 is not 64 digits"),
        ({"a": {"sha256": HASH}}, "scope is missing"),
        ({"a": {**ADMIN, "scope": "root"}}, "use inference or admin"),
        ({"a": {**ADMIN, "expires": "soon"}}, "use a time such as"),
        ({"a": {**ADMIN, "expires": 1}}, "use a time such as"),
        ({"a": {**ADMIN, "expires": "2030-01-31T12:00:00"}}, "without a time zone"),
        ({"a": {**ADMIN, "rate": 0}}, "rate is 0: use a whole number"),
        ({"a": {**ADMIN, "rate": True}}, "rate is true"),
        ({"a": {**ADMIN, "concurrency": 1.5}}, "concurrency is 1.5"),
        ({"a": {**ADMIN, "domains": ["math"]}}, "domains bind no admin"),
        ({"a": {**ADMIN, "scope": "inference", "domains": "math"}}, "use a list of names"),
        ({"a": {**ADMIN, "scope": "inference", "domains": ["../x"]}}, "not a valid name"),
        ({"a": {**ADMIN, "burst": 3}}, '"burst" is not known'),
        ({f"t{number}": ADMIN for number in range(MOST_TOKENS + 1)}, "keep at most 1000"),
    ],
)
def test_what_is_not_understood_is_refused_whole(tmp_path: Path, tokens: Any, words: str) -> None:
    path = written(tmp_path, tokens)
    with pytest.raises(TokenFileError) as caught:
        read_tokens(path)
    message = str(caught.value)
    assert message.startswith(f"token file {path}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": 2, "tokens": {}}', '{"tokens": {}}', "[" * 9999]
)
def test_what_is_no_file_of_tokens_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(TokenFileError, match=re.escape(f"token file {path}")):
        read_tokens(path)


def test_a_token_twice_is_refused_and_not_the_last_of_both(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = json.dumps(ADMIN)
    path.write_text(f'{{"format": 1, "tokens": {{"a": {token}, "a": {token}}}}}')
    path.chmod(0o600)
    with pytest.raises(TokenFileError, match="twice"):
        read_tokens(path)


def test_a_file_that_is_not_there_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="adapterctl token new NAME --tokens"):
        read_tokens(tmp_path / "none.json")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path, {"ops": ADMIN})
    path.chmod(mode)
    with pytest.raises(TokenFileError, match="chmod go-w"):
        read_tokens(path)
    path.chmod(mode & ~0o022)
    assert len(read_tokens(path)) == 1


def test_tokens_are_random_and_long_and_only_their_hash_is_kept(tmp_path: Path) -> None:
    one, other = new_secret(), new_secret()
    assert one != other
    assert re.fullmatch(r"superpose_[A-Za-z0-9_-]{43}", one)  # 43 of 64 characters: 256 bits
    path = tmp_path / "tokens.json"
    with editing(path) as tokens:
        tokens["a"] = Token("a", sha256_of(one), Scope.INFERENCE)
        tokens["b"] = Token("b", sha256_of(other), Scope.ADMIN)
    text = path.read_text()
    assert one not in text
    assert hashlib.sha256(one.encode()).hexdigest() in text
    held = read_tokens(path)
    assert [token.name for token in held] == ["a", "b"]
    assert find_token(held, other) == held[1]
    for wrong in ("", one[:-1], one + "x", one.upper(), sha256_of(one)):
        assert find_token(held, wrong) is None


def test_what_is_edited_reads_back_and_times_keep_their_moment(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    moment = datetime(2030, 1, 31, 12, tzinfo=timezone(timedelta(hours=2)))
    token = Token("a", HASH, Scope.INFERENCE, moment, 5, 6, frozenset())
    with editing(path) as tokens:
        tokens["a"] = token
    assert read_tokens(path) == (token,)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.json"]


def test_an_edit_keeps_permissions_and_links(tmp_path: Path) -> None:
    path = written(tmp_path, {"ops": ADMIN})
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    with editing(link) as tokens:
        tokens["ci"] = Token("ci", "0" * 64, Scope.INFERENCE)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(read_tokens(path)) == 2


def test_an_edit_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, {"ops": ADMIN})
    before = path.read_bytes()
    with pytest.raises(KeyError), editing(path) as tokens:
        del tokens["none"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), editing(path) as tokens:
        del tokens["ops"]
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.json"]


def test_two_edits_at_once_lose_nothing_as_the_second_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    with editing(path) as tokens:
        tokens["a"] = Token("a", HASH, Scope.ADMIN)
        with pytest.raises(TokenFileError, match="is being edited"), editing(path):
            pytest.fail("both edit")
    assert len(read_tokens(path)) == 1
