from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters.qa import (
    Row,
    file_sha256,
    part_of,
    prompt_text,
    read_rows,
    row_text,
    split_key,
    split_rows,
)

ROW = '{"question": "How many?", "answer": "Two.", "source": "x"}\n'


def test_template() -> None:
    assert row_text("How many?", "Two.") == "Question: How many?\nAnswer: Two."
    assert prompt_text("How many?") == "Question: How many?\nAnswer:"


def test_reads_plain_and_gzipped_rows(tmp_path: Path) -> None:
    plain = tmp_path / "rows.jsonl"
    plain.write_text(ROW + "\n  \n" + ROW, "utf-8")
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(plain) == read_rows(packed) == [Row("How many?", "Two.")] * 2


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (ROW + "{", 2, "not JSON"),
        (ROW + "[1]", 2, "not a JSON object"),
        ('{"answer": "a"}', 1, '"question" is missing'),
        ('{"question": "q"}', 1, '"answer" is missing'),
        ('{"question": "q", "answer": "  "}', 1, '"answer" is empty or no string'),
        ('{"question": "q", "answer": "\\ud83d"}', 1, '"answer" holds half a character'),
        ('{"question": 3, "answer": "a"}', 1, '"question" is empty or no string'),
        ("\n\n" + '{"question": null, "answer": "a"}', 3, '"question"'),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="rows") as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"\n", "no rows"),
        ("marked.jsonl", b"\xef\xbb\xbf\n", "no rows"),
        ("latin.jsonl", ROW.encode() + b'{"question": "\xe9"}', ":2: not UTF-8"),
        ("plain.jsonl.gz", ROW.encode(), "cannot be read"),
        ("short.jsonl.gz", gzip.compress(ROW.encode(), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_rows(path)
    assert message in str(caught.value)


@given(st.text(), st.lists(st.integers(0, 10**12), min_size=2, max_size=2))
def test_questions_that_differ_in_numbers_fall_together(words: str, numbers: list[int]) -> None:
    one, two = (f"If {number} trains {words} leave at {number}.5" for number in numbers)
    assert part_of(one) == part_of(two)


@given(st.text(st.characters(codec="ascii"), min_size=1))
def test_questions_that_differ_in_case_or_white_space_fall_together(question: str) -> None:
    assert part_of(question.upper()) == part_of(question.lower())
    assert part_of(f"  {question}\t") == part_of(question.replace(" ", "   "))


@pytest.mark.parametrize("number", ["7", "70", "1,200", "3.25", "1,234.50"])
def test_a_number_is_one_mask(number: str) -> None:
    assert split_key(f"What is  {number} PLUS {number}?") == "what is # plus #?"


def test_words_are_not_masked() -> None:
    assert split_key("gain or loss") != split_key("gain or gain")


def test_split_is_about_80_10_10_and_loses_nothing() -> None:
    alphabet = "abcdefghij"
    rows = [
        Row(f"question {''.join(alphabet[int(d)] for d in str(i))}", "a") for i in range(20_000)
    ]
    split = split_rows(rows)
    parts = (split.train, split.validation, split.test)
    assert sorted(row.question for part in parts for row in part) == sorted(
        row.question for row in rows
    )
    # Five standard deviations of a binomial share.
    for part, share in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert abs(len(part) - share * len(rows)) < 5 * (len(rows) * share * (1 - share)) ** 0.5


def test_split_is_the_same_in_every_process() -> None:
    questions = [f"what is the {word}?" for word in ("price", "cause", "ratio", "dose", "yield")]
    code = (
        "import json, sys; from superpose_adapters.qa import part_of;"
        "print(json.dumps([part_of(q) for q in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(questions)]
    package = Path(sys.modules["superpose_adapters.qa"].__file__ or "").parents[1]
    outputs = {
        subprocess.run(
            command,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(package)},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {json.dumps([part_of(q) for q in questions]).encode() + b"\n"}


def test_split_follows_its_published_definition() -> None:
    number = int(hashlib.sha256(b"how many in #?").hexdigest()[:16], 16) % 10
    expected = "train" if number < 8 else {8: "validation", 9: "test"}[number]
    assert part_of("How many in 12?") == expected


def test_file_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"abc")
    assert file_sha256(path) == hashlib.sha256(b"abc").hexdigest()
