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
        ("seeds.twins = [3]", "seeds.twins has 3, which seeds.shared lacks"),
        ("blocks.order = ['a', 'd']", "blocks.order names d, which data.files lacks"),
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


_NO_TEMPLATE = "a template must hold"
_PREDICTION = "prediction.domains = ['a', 'b', 'c']\n"
_OVERLAP = "overlap.source = 'a'\noverlap.target = 'b'\n"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("training.rank = 0", "training.rank is 0; it must be at least 1"),
        ("training.batch_size = 0", "training.batch_size is 0"),
        ("training.rows = 0", "training.rows is 0"),
        ("training.eval_rows = 0", "training.eval_rows is 0"),
        ("training.stack = 0", "training.stack is 0"),
        ("training.max_length = 1", "training.max_length is 1; it must be at least 2"),
        ("training.alpha = 0", "training.alpha is 0"),
        ("training.epochs = -1", "training.epochs is -1"),
        ("training.learning_rate = nan", "training.learning_rate is nan"),
        ("training.learning_rate = inf", "training.learning_rate is inf"),
        ("training.dropout = 1", "training.dropout is 1"),
        ("training.template = '{q}'", f"training.template: {_NO_TEMPLATE}"),
        ("training.target_modules = ['c', 'c']", "training.target_modules names c twice"),
        ("data.synthetic = 0", "data.synthetic is 0"),
        ("evaluation.test_rows = 0", "evaluation.test_rows is 0"),
        ("evaluation.validation_rows = -5", "evaluation.validation_rows is -5"),
        ("evaluation.slice_tokens = 0", "evaluation.slice_tokens is 0"),
        ("evaluation.resamples = 10", "evaluation.resamples is 10; it must be at least 100"),
        ("seeds.shared = []", "seeds.shared has 0 entries; it needs at least 1"),
        ("seeds.shared = [0, 0, 0]", "seeds.shared names 0 twice"),
        ("seeds.shared = [-1]", "seeds.shared has -1; it must lie between 0 and"),
        ("seeds.separate = [2, 2]", "seeds.separate names 2 twice"),
        ("seeds.separate = [2, 3]", "seeds.separate has 2 seeds and seeds.shared 1"),
        ("seeds.separate = [0]", "seeds.separate and seeds.shared both name 0"),
        (
            "seeds.shared = [0, 1, 2]\nseeds.separate = [3]",
            "seeds.separate has 1 seeds and seeds.shared 3",
        ),
        ("seeds.twins = [0, 0]", "seeds.twins names 0 twice"),
        ("controls.ranks = [0]", "controls.ranks is 0"),
        ("controls.ranks = [8, 8]", "controls.ranks names 8 twice"),
        ("controls.budgets = []", "controls.budgets has 0 entries"),
        ("controls.seeds = []", "controls.seeds has 0 entries"),
        ("lambdas.grid = []", "lambdas.grid has 0 entries"),
        ("lambdas.grid = [nan]", "lambdas.grid has nan"),
        ("lambdas.pair_grid = [0.5, 0.5]", "lambdas.pair_grid names 0.5 twice"),
        ("lambdas.seeds = []", "lambdas.seeds has 0 entries"),
        ("templates.own = {}", "templates.own has 0 entries"),
        ("templates.own = { a = '{a} {q}' }", f"templates.own.a: {_NO_TEMPLATE}"),
        (_OVERLAP + "overlap.shares = [1.5]", "overlap.shares has 1.5; it must lie between 0"),
        (_OVERLAP + "overlap.shares = [-0.1]", "overlap.shares has -0.1"),
        (_OVERLAP + "overlap.shares = []", "overlap.shares has 0 entries"),
        (_OVERLAP.replace("'b'", "'a'"), "overlap.source and overlap.target are both a"),
        ("blocks.order = ['a']", "blocks.order has 1 entries; it needs at least 2"),
        ("blocks.order = ['a', 'b', 'a']", "blocks.order names a twice"),
        ("blocks.order = ['a', 'b']\nblocks.seeds = []", "blocks.seeds has 0 entries"),
        ("orthogonal.seeds = []", "orthogonal.seeds has 0 entries"),
        ("unlearning.cycles = 0", "unlearning.cycles is 0"),
        ("unlearning.dtypes = []", "unlearning.dtypes has 0 entries"),
        ("prediction.domains = ['a', 'b']", "prediction.domains has 2 entries"),
        (_PREDICTION + "prediction.seeds = []", "prediction.seeds has 0 entries"),
        (_PREDICTION + "prediction.seeds = [0, 1, 2]", "prediction.seeds has 3 entries"),
        ("tuning.trials = 0", "tuning.trials is 0"),
        ("tuning.trials = 1\ntuning.max_epochs = 0", "tuning.max_epochs is 0"),
        ("tuning.trials = 1\ntuning.domains = ['a', 'a']", "tuning.domains names a twice"),
    ],
)
def test_values_that_no_study_can_use_are_refused_by_name(
    tmp_path: Path, added: str, message: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(_SMALLEST + added)
    with pytest.raises(ValueError, match=r"bad\.toml: ") as caught:
        read_config(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("found", "put", "message"),
    [
        ('"small"', '""', "name is ''; it must be fit for a folder's name"),
        ('"small"', '"../small"', "name is '../small'"),
        ("b.jsonl", "a.jsonl", "data.files names a.jsonl twice"),
        ("a = ", '"A" = ', "'A' is not a valid name"),
    ],
)
def test_names_that_clash_or_lead_elsewhere_are_refused(
    tmp_path: Path, found: str, put: str, message: str
) -> None:
    path = tmp_path / "bad.toml"
    assert found in _SMALLEST
    path.write_text(_SMALLEST.replace(found, put))
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
