"""Adapters of MLX, by mlx-lm's own formula: y + scale * (x @ lora_a) @ lora_b."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.makers import load_peft, tiny_llama
from torch import Tensor

from superpose_adapters.convert import main
from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import read_adapter

IDS = torch.tensor([[5, 17, 200, 3, 99, 42]])
CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "model": "mlx-community/tiny-4bit",
    "num_layers": 2,
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "iters": 600,
}


def write(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    config = {name: value for name, value in (CONFIG | fields).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def llama_tensors(rank: int = 3) -> dict[str, Tensor]:
    """Two modules of the second layer, one of them wider than it is high."""
    torch.manual_seed(0)
    return {
        "model.layers.1.self_attn.q_proj.lora_a": torch.randn(32, rank) / 8,
        "model.layers.1.self_attn.q_proj.lora_b": torch.randn(rank, 32) / 8,
        "model.layers.1.mlp.down_proj.lora_a": torch.randn(48, rank) / 8,
        "model.layers.1.mlp.down_proj.lora_b": torch.randn(rank, 32) / 8,
    }


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.splitlines()
    assert line.startswith("superpose-convert: ")
    return line


def test_a_worked_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # x = (1, 2); x @ a = (1*1 + 2*0, 1*0 + 2*3) = (1, 6); that @ b = (1*1 + 6*0, 1*2 + 6*1, 1*0 +
    # 6*-1) = (1, 8, -6); times the scale, 0.5: (0.5, 4, -3).
    a = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    b = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    folder = write(
        tmp_path / "mlx",
        {"q.lora_a": a, "q.lora_b": b},
        lora_parameters={"rank": 2, "scale": 0.5, "dropout": 0.1},
    )
    assert main([str(folder), str(tmp_path / "peft")]) == 0
    assert "rank 2, scale 0.5, 1 modules of mlx-community/tiny-4bit" in capsys.readouterr().out
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    lora_a = tensors["base_model.model.q.lora_A.weight"]
    lora_b = tensors["base_model.model.q.lora_B.weight"]
    assert lora_a.shape == (2, 2)
    assert lora_b.shape == (3, 2)
    delta = config["lora_alpha"] / config["r"] * lora_b @ lora_a
    assert (delta @ torch.tensor([1.0, 2.0])).tolist() == [0.5, 4.0, -3.0]
    assert config["base_model_name_or_path"] == "mlx-community/tiny-4bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_peft_and_we_read_what_mlx_means(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in llama_tensors().items()}
    folder = write(tmp_path / "mlx", tensors)
    assert main([str(folder), str(tmp_path / "peft"), "--base", "tiny"]) == 0
    base = tiny_llama()

    expected_model: Any = copy.deepcopy(base).double()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (tensors[f"model.layers.1.{name}.lora_{f}"].double() for f in "ab")

        def add(_: Any, inputs: Any, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            corrected: Tensor = y + 20.0 * (inputs[0] @ a) @ b
            return corrected

        expected_model.get_submodule(f"model.layers.1.{name}").register_forward_hook(add)
    adapter = read_adapter(tmp_path / "peft", read_layout(base))
    ours: Any = copy.deepcopy(base).double()
    theirs: Any = load_peft(base, tmp_path / "peft").double()
    with torch.no_grad():
        expected = expected_model(IDS).logits
        for name, f in adapter.modules.items():
            ours.get_submodule(name).weight += f.scaling * (f.b.double() @ f.a.double())
        assert (expected - copy.deepcopy(base).double()(IDS).logits).abs().max() > 1e-2
        assert (theirs(IDS).logits - expected).abs().max() < 1e-6
        assert (ours(IDS).logits - expected).abs().max() < 1e-6


def test_old_names_of_fields(tmp_path: Path) -> None:
    parameters = {"rank": 3, "alpha": 3, "scale": 10.0, "dropout": 0.0}
    folder = write(
        tmp_path / "mlx", llama_tensors(), fine_tune_type=None, num_layers=None, lora_layers=2,
        lora_parameters=parameters,
    )  # fmt: skip
    assert main([str(folder), str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 30


def test_an_alpha_has_two_meanings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {"rank": 3, "alpha": 16, "scale": 10.0}
    folder = write(tmp_path / "mlx", llama_tensors(), lora_parameters=parameters)
    line = fails(capsys, folder, tmp_path / "peft")
    assert "alpha, 16" in line
    assert "10.0 * 16 / 3" in line
    assert "--scale" in line
    assert main([str(folder), str(tmp_path / "peft"), "--scale", "2.5"]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 7.5


ONE = "model.layers.1.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DoRA": ({"fine_tune_type": "dora"}, {}, "fine_tune_type is 'dora'"),
    "DoRA of old": ({"use_dora": True}, {}, "fine_tune_type is 'dora'"),
    "full": ({"fine_tune_type": "full"}, {}, "fine_tune_type is 'full'"),
    "no parameters": ({"lora_parameters": None}, {}, "has no lora_parameters"),
    "no scale": ({"lora_parameters": {"rank": 3}}, {}, "no scale .*--scale"),
    "another rank": ({"lora_parameters": {"rank": 8, "scale": 1.0}}, {}, "rank 8, .* rank 3"),
    "a magnitude": ({}, {f"{ONE}.m": torch.ones(32)}, r"q_proj\.m is no factor"),
    "a whole parameter": ({}, {f"{ONE}.weight": torch.ones(32, 32)}, r"weight is no factor"),
    "one factor": ({}, {f"{ONE}2.lora_a": torch.ones(32, 3)}, r"q_proj2\.lora_b is missing"),
    "experts": ({}, {f"{ONE}.lora_a": torch.ones(4, 3, 32)}, "3 dimensions: adapters of experts"),
    "embedding": ({}, {"model.embed_tokens.lora_a": torch.ones(257, 3)}, "adapts an embedding"),
    "quantised": ({}, {f"{ONE}.lora_a": torch.ones(32, 3).int()}, "dtype I32: it is quantised"),
    "PEFT's shapes": ({}, {f"{ONE}.lora_a": torch.ones(3, 32)}, r"lora_a is \(3, 32\)"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    tensors: dict[str, Tensor],
    message: str,
) -> None:
    folder = write(tmp_path / "mlx", llama_tensors() | tensors, **fields)
    assert re.search(message, fails(capsys, folder, tmp_path / "peft"))
    assert not (tmp_path / "peft").exists()


def test_missing_and_damaged_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peft"
    assert "not a folder" in fails(capsys, tmp_path / "nothing", out)
    folder = write(tmp_path / "mlx", llama_tensors())
    data = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(data[:-1])
    assert "adapters.safetensors is truncated" in fails(capsys, folder, out)
    (folder / "adapters.safetensors").rename(folder / "adapters.npz")
    assert "adapters.npz: save it again" in fails(capsys, folder, out)
    (folder / "adapter_config.json").write_text("{")
    assert "is not JSON" in fails(capsys, folder, out)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in fails(capsys, folder, out)
    assert not out.exists()


def test_what_is_there_stays_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "mlx", llama_tensors())
    out = tmp_path / "peft"
    assert main([str(folder), str(out)]) == 0
    capsys.readouterr()
    (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "exists: name another folder, or pass --replace" in fails(
        capsys, folder, out, "--scale", "3"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([str(folder), str(out), "--scale", "3", "--replace"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 9
    assert (out / "README.md").read_text() == "mine"
    capsys.readouterr()
    assert "is the adapter itself" in fails(capsys, folder, folder, "--replace")
    assert "of PEFT already: use it as it is" in fails(capsys, out, tmp_path / "again")


@pytest.mark.parametrize("arguments", [[], ["one"], ["a", "b", "--scale", "nan"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
