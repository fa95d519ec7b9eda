from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.study.config import bundled_configs, read_config

_SMALLEST = """
name = "small"
base = "mini"
domains = ["a", "b", "c"]
data.files = { a = "a.jsonl", b = "b.jsonl", c = "c.jsonl" }
"""


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled_configs_can_be_read(name: str) -> None:
    assert read_config(name).name == name


def test_a_config_needs_little(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(_SMALLEST)
    config = read_config(str(path))
    assert config.domains == ("a", "b", "c")
    assert config.training.rank == 4
    assert config.lambdas is None


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("colour = 1", "unknown key colour; there are name, base"),
        ("training.ranks = 4", "unknown key training.ranks; there are rank"),
        ("training.rank = 'four'", "training.rank is 'four', which is no int"),
        ("training.rank = true", "training.rank is True, which is no int"),
        ("evaluation.dtype = 'float16'", "evaluation.dtype is 'float16'; choose from float32"),
        ("seeds.shared = []", "seeds.shared names no seed"),
        ("seeds.twins = [3]", "seeds.twins has 3, which seeds.shared lacks"),
        ("blocks.order = ['d']", "blocks.order names d, which data.files lacks"),
        ("blocks.grid = [0.5]", "blocks.order is missing"),
        ("= 1", "not TOML"),
    ],
)
def test_bad_configs_are_refused_by_name(tmp_path: Path, added: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(_SMALLEST + added)
    with pytest.raises(ValueError, match=r"bad\.toml: ") as caught:
        read_config(str(path))
    assert message in str(caught.value)


def test_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config large: choose from mini, paper, smoke, smollm2"):
        read_config("large")
    with pytest.raises(ValueError, match="no such file"):
        read_config(str(tmp_path / "absent.toml"))


def test_two_domains_are_too_few(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(_SMALLEST.replace('"a", "b", "c"', '"a", "b"'))
    with pytest.raises(ValueError, match="domains must be three different ones"):
        read_config(str(path))
