from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.makers import tiny_gpt2
from torch import Tensor

from superpose_adapters.digest import (
    adapter_digest,
    canonical_digest,
    checkpoint_digest,
    hash_bytes,
    tensor_digest,
)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 5),
        "a": torch.randn(4, 2).bfloat16(),
        "c": torch.randn(7).half(),
        "d": torch.arange(6),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
    }


def test_digest_is_sha256_of_the_framed_header_and_bytes() -> None:
    found = tensor_digest({"y": torch.tensor([2.0]), "x": torch.tensor([[1, 2]])}, {"r": 4})
    header = b'[[["x","I64",[1,2]],["y","F32",[1]]],{"r":4}]'
    body = struct.pack("<qq", 1, 2) + struct.pack("<f", 2.0)
    assert found == hashlib.sha256(struct.pack("<Q", len(header)) + header + body).hexdigest()


def test_digest_ignores_order_and_memory_layout() -> None:
    original = tensors()
    shuffled = dict(reversed(original.items()))
    shuffled["b"] = shuffled["b"].T.contiguous().T
    assert not shuffled["b"].is_contiguous()
    assert tensor_digest(shuffled) == tensor_digest(original)


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.zeros(3, 5)},
        {"b": tensors()["b"].reshape(5, 3)},
        {"d": torch.arange(6).double()},
        {"d": torch.arange(6).view(torch.float64)},  # the same bits
        {"e": torch.zeros(0)},
        {"empty": torch.zeros(3, 0)},
    ],
)
def test_digest_sees_values_shapes_dtypes_and_names(change: dict[str, Tensor]) -> None:
    assert tensor_digest(tensors() | change) != tensor_digest(tensors())


def test_bytes_cannot_move_between_tensors() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    other = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])}
    assert tensor_digest(one) != tensor_digest(other)


def test_adapter_digest_sees_the_config() -> None:
    digests = {adapter_digest(tensors(), {"r": 4, "lora_alpha": alpha}) for alpha in (8.0, 16.0)}
    assert len(digests) == 2
    assert adapter_digest(tensors(), {"a": 1, "b": 2}) == adapter_digest(
        tensors(), {"b": 2, "a": 1}
    )


def test_an_unnamed_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor z has dtype torch\.complex64"):
        tensor_digest({"z": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_hash_bytes_is_the_hash_of_the_bits(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).remainder(5).reshape(3, 4).to(dtype)
    raw = bytes(tensor.flatten().view(torch.uint8).tolist())
    assert hash_bytes(tensor) == hashlib.sha256(raw).hexdigest()
    assert hash_bytes(tensor.T) == hash_bytes(tensor.T.contiguous()) != hash_bytes(tensor)


def test_hash_bytes_sees_one_flipped_bit_and_the_sign_of_zero() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, 33))
    before = hash_bytes(parameter)
    with torch.no_grad():
        parameter.view(torch.int32)[63, 32] ^= 1
    assert hash_bytes(parameter) != before
    assert hash_bytes(torch.tensor([0.0])) != hash_bytes(torch.tensor([-0.0]))


def test_large_tensors_are_hashed_whole() -> None:
    tensor = torch.arange((1 << 20) + 7, dtype=torch.float32)  # more than one piece
    assert hash_bytes(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def test_checkpoint_digest_is_that_of_its_tensors_however_split(tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "split", max_shard_size="50KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    loaded = load_file(tmp_path / "whole" / "model.safetensors")
    digest = checkpoint_digest(tmp_path / "whole")
    assert digest == checkpoint_digest(tmp_path / "split") == tensor_digest(loaded)
    tiny_gpt2(1).save_pretrained(tmp_path / "other")
    assert checkpoint_digest(tmp_path / "other") != digest


def test_checkpoint_digest_counts_files_without_an_index(tmp_path: Path) -> None:
    half = dict(list(tensors().items())[:3])
    rest = dict(list(tensors().items())[3:])
    save_file(half, tmp_path / "x.safetensors")
    save_file(rest, tmp_path / "y.safetensors")
    assert checkpoint_digest(tmp_path) == tensor_digest(tensors())
    save_file(half, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"tensor a is in x.safetensors and in z.safetensors"):
        checkpoint_digest(tmp_path)
    # transformers loads this file and no other, so no other counts.
    save_file(half, tmp_path / "model.safetensors")
    assert checkpoint_digest(tmp_path) == tensor_digest(half)


def test_checkpoint_without_safetensors_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \*\.safetensors file: save .*safe_serialization"):
        checkpoint_digest(tmp_path)


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: is truncated"):
        checkpoint_digest(tmp_path)
    path.unlink()
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"gone.safetensors: missing"):
        checkpoint_digest(tmp_path)


def test_canonical_digest_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_digest(float("nan"))
    assert canonical_digest({"b": 1, "a": [1.5]}) == (
        hashlib.sha256(b'{"a":[1.5],"b":1}').hexdigest()
    )
