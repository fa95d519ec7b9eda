"""A frozen A, and LoRI's sparse B on it, whose calibration is an ordinary training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tests.makers import save_base, tiny_gpt2
from torch import Tensor

from superpose_train import train as trainer_module
from superpose_train.cli import main, read_command
from superpose_train.model import attach_adapter
from superpose_train.options import Options
from superpose_train.sparse_b import largest_entries
from superpose_train.stacked.stack import train_many
from superpose_train.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_gpt2(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"question": f"aaaa {chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": "aaaa" * 3}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def options(base: Path, data: Path, out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "base": str(base),
        "data": (data,),
        "name": "letters",
        "out": out,
        "max_length": 40,
        "batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "dropout": 0.1,
        "frozen_a": "random",
        "init_seed": 3,
        "device": "cpu",
        "precision": "float32",
    }
    return Options(**(values | changes))


Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def dense(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("dense") / "letters"
    return out, train(options(base, data, out))


@pytest.fixture(scope="module")
def sparse(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("sparse") / "letters"
    return out, train(options(base, data, out, sparsity=0.9))


def tensors(folder: Path, factor: str) -> dict[str, Tensor]:
    found = load_file(folder / "adapter_model.safetensors")
    return {name: found[name] for name in sorted(found) if f".lora_{factor}." in name}


def all_b(folder: Path) -> NDArray[np.float32]:
    return np.concatenate([b.numpy().ravel() for b in tensors(folder, "B").values()])


def test_a_random_a_stays_what_peft_drew(
    dense: Trained, base: Path, data: Path, tmp_path: Path
) -> None:
    out, record = dense
    model = attach_adapter(
        tiny_gpt2(), options(base, data, tmp_path, frozen_a=None), ["c_attn", "c_proj"]
    )
    fresh = dict(model.named_parameters())
    for name, a in tensors(out, "A").items():
        assert torch.equal(a, fresh[name.replace(".weight", ".default.weight")])
    assert (all_b(out) != 0).all()
    assert record["trained_parameters"] == all_b(out).size
    assert record["parameters"]["frozen_a"] == "random"


def test_of_b_the_largest_entries_of_the_calibration_are_trained_alone(
    dense: Trained, sparse: Trained
) -> None:
    """Kept entries by a sort of numpy's over all modules, of a run that is what the first is."""
    calibrated, result = all_b(dense[0]), all_b(sparse[0])
    kept = calibrated.size - int(0.9 * calibrated.size)
    chosen = np.zeros(calibrated.size, bool)
    chosen[np.argsort(-np.abs(calibrated), kind="stable")[:kept]] = True
    assert (result[~chosen] == 0).all()
    assert (result[chosen] != 0).all()
    assert sparse[1]["trained_parameters"] == kept
    for name, a in tensors(sparse[0], "A").items():
        assert torch.equal(a, tensors(dense[0], "A")[name])
    # A threshold a module would have kept a tenth of each.
    shares = [float((b != 0).float().mean()) for b in tensors(sparse[0], "B").values()]
    assert max(shares) > 0.2


def test_the_second_training_begins_anew(dense: Trained, sparse: Trained) -> None:
    record = sparse[1]
    assert record["calibration"]["history"] == dense[1]["history"]
    assert record["calibration"]["best_step"] == dense[1]["best_step"]
    # At B = 0, with the same rows: the same loss before the first step, another one after it.
    first, second = record["history"]["training"][:2]
    assert first == dense[1]["history"]["training"][0]
    assert second != dense[1]["history"]["training"][1]
    after, before = (record[name]["test"]["loss"] for name in ("adapter_figures", "base_figures"))
    assert after < before - 0.2
    assert record["parameters"]["sparsity"] == 0.9


@pytest.mark.parametrize("evaluation", [4, 13], ids=["calibration", "second"])
def test_a_sparse_run_goes_on_in_either_training(
    evaluation: int,
    sparse: Trained,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = trainer_module.AdapterTrainer.evaluate
    calls = 0

    def interrupted(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == evaluation:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **named)

    out = tmp_path / "letters"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options(base, data, out, sparsity=0.9))
    record = train(options(base, data, out, sparsity=0.9))
    assert record["resumed"]
    assert record["calibration"] == sparse[1]["calibration"]
    assert record["history"] == sparse[1]["history"]
    for factor in "AB":
        expected, result = tensors(sparse[0], factor), tensors(out, factor)
        assert all(torch.equal(expected[name], result[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_a_sparse_b_may_have_a_disjoint_a(base: Path, data: Path, tmp_path: Path) -> None:
    for block in (1, 2):
        changes: dict[str, Any] = {"frozen_a": (block, 2), "sparsity": 0.5, "max_steps": 2}
        train(options(base, data, tmp_path / str(block), **changes))
        record = json.loads((tmp_path / str(block) / "training.json").read_text("utf-8"))
        assert record["parameters"]["frozen_a"] == [block, 2]
        b = all_b(tmp_path / str(block))
        assert (b == 0).sum() >= b.size // 2
    one, two = (tensors(tmp_path / name, "A") for name in "12")
    assert all((one[name] @ two[name].T).abs().max() < 1e-6 for name in one)


def test_the_largest_entries_are_counted_in_decimals_and_ties_go_to_the_first() -> None:
    b_factors = {"one": torch.ones(10, 4), "two": -torch.ones(30, 2)}
    mask = largest_entries(b_factors, 0.29)
    kept = torch.cat([mask["one"].flatten(), mask["two"].flatten()])
    assert kept.tolist() == [True] * 71 + [False] * 29
    b_factors["two"][-1, -1] = -2
    assert largest_entries(b_factors, 0.999999)["two"].nonzero().tolist() == [[29, 1]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--frozen-a", "random"], "--frozen-a random needs --init-seed, another one for each"),
        (["--sparsity", "0.9"], "--sparsity needs --frozen-a"),
        (["--frozen-a", "1/2", "--sparsity", "1"], "--sparsity must lie between 0 and 1, got 1.0"),
        (["--frozen-a", "1/2", "--sparsity", "nan"], "--sparsity must lie between 0 and 1, got"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--base", "mini", "--data", str(data), "--name", "letters", "--out", "none"]
    assert main([*command, *more]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("form", "frozen"), [(["random", "--init-seed", "4"], "random"), (["2/3"], (2, 3))]
)
def test_the_command_takes_either_form(form: list[str], frozen: object) -> None:
    command = ["--base", "mini", "--data", "rows.jsonl", "--name", "letters", "--out", "none"]
    chosen, _ = read_command([*command, "--sparsity", "0.5", "--frozen-a", *form])
    assert (chosen.frozen_a, chosen.sparsity) == (frozen, 0.5)


def test_a_stack_trains_no_sparse_b(base: Path, data: Path, tmp_path: Path) -> None:
    chosen = options(base, data, tmp_path / "out", sparsity=0.9)
    with pytest.raises(ValueError, match="letters has --sparsity, which stacked training does"):
        train_many([replace(chosen, sparsity=None), chosen])
