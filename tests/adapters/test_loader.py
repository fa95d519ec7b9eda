"""The loader against PEFT's own reading, and against everything that must not come in."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save, save_file
from tests.makers import load_peft, make_adapter, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.peft.folder import (
    CONFIG_NAME,
    TENSORS_NAME,
    Limits,
    files_digest,
    parse_adapter,
    read_adapter,
)

GPT2 = tiny_gpt2()
LLAMA = tiny_llama()
LAYOUT = read_layout(GPT2)
# Of Python's audit events: files, code, processes, sockets, pickles.
AUDITED = {"open", "exec", "compile", "import", "subprocess", "os", "socket", "pickle", "ctypes"}
KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # Not load_file, whose tensors are a window on a file that the tests write over.
    return json.loads((folder / CONFIG_NAME).read_text()), load(
        (folder / TENSORS_NAME).read_bytes()
    )


def parse(config: dict[str, Any], tensors: dict[str, Tensor], **limits: int) -> Adapter:
    return parse_adapter(json.dumps(config).encode(), save(tensors), LAYOUT, Limits(**limits))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return make_adapter(GPT2, tmp_path / "adapters" / "good")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "r": 5},
        {"target_modules": "all-linear", "lora_alpha": 3},
        {"target_modules": r".*(c_fc|k_proj)", "rank_pattern": {r".*\.0\..*": 2}},
        {"alpha_pattern": {"(c_attn|q_proj)": 40}, "layers_to_transform": [1]},
        {"fan_in_fan_out": True},
        {"fan_in_fan_out": False},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_deltas_are_those_of_peft(
    tmp_path: Path, model: nn.Module, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = make_adapter(model, tmp_path / "a", seed=3, dtype=dtype, **fields)
    layout = read_layout(model)
    adapter = read_adapter(folder, layout)
    reference = {
        name.removeprefix("base_model.model."): module
        for name, module in load_peft(model, folder).named_modules()
        if hasattr(module, "lora_A")
    }
    assert list(adapter.modules) == sorted(reference)
    for name, module in reference.items():
        factors = adapter.modules[name]
        assert factors.a.dtype == factors.b.dtype == torch.float32
        assert factors.a.is_contiguous()
        assert factors.b.T.is_contiguous()  # rank by rank, as a correction reads it
        delta = layout[name].delta(factors.scaling * (factors.b.double() @ factors.a.double()))
        expected = module.get_delta_weight("default").double()
        assert expected.norm() > 0
        assert torch.allclose(delta, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert adapter.nbytes == (folder / TENSORS_NAME).stat().st_size


def test_two_writings_of_one_adapter_have_one_digest(good: Path) -> None:
    config, tensors = contents(good)
    adapter = read_adapter(good, LAYOUT)
    same = {key: config[key] for key in reversed(config) if config[key] is not None}
    same |= {"base_model_name_or_path": "elsewhere", "inference_mode": False}
    same |= {"target_modules": ".*(c_attn|c_proj)"}
    assert parse(same, dict(reversed(tensors.items()))).digest == adapter.digest
    assert parse(config | {"lora_alpha": 8.0}, tensors).digest == adapter.digest
    files = ((good / CONFIG_NAME).read_bytes(), (good / TENSORS_NAME).read_bytes())
    assert files_digest(*files) == adapter.digest


def test_what_changes_the_effect_changes_the_digest(good: Path) -> None:
    config, tensors = contents(good)
    other = tensors | {KEY.format("A"): tensors[KEY.format("A")].clone()}
    other[KEY.format("A")][0, 0] += 1
    half = {key: tensor.half() for key, tensor in tensors.items()}
    digests = {
        read_adapter(good, LAYOUT).digest,
        parse(config, other).digest,
        parse(config, half).digest,
        parse(config | {"lora_alpha": 9}, tensors).digest,
        parse(config | {"use_rslora": True}, tensors).digest,
        parse(config | {"alpha_pattern": {"c_attn": 3}}, tensors).digest,
    }
    assert len(digests) == 6


def test_the_factors_are_copies(good: Path) -> None:
    before = read_adapter(good, LAYOUT)
    kept = {name: (f.a.clone(), f.b.clone()) for name, f in before.modules.items()}
    with (good / TENSORS_NAME).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    for name, (a, b) in kept.items():
        assert torch.equal(before.modules[name].a, a)
        assert torch.equal(before.modules[name].b, b)


def without(key: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: tensors.__delitem__(key)


def setting(**fields: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: config.update(fields)


def replacing(
    change: Callable[[Tensor], Tensor], key: str = KEY.format("B")
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: tensors.update({key: change(tensors[key]).contiguous()})


def adding(key: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, tensors: tensors.update({key: torch.ones(4, 32)})


def zeroing(part: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.update({k: torch.zeros_like(t) for k, t in tensors.items() if part in k})

    return change


def spoiling(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[-1, -1] = value
        return tensor

    return change


def ranks(rank: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["r"] = rank
        for key, tensor in tensors.items():
            shape = (rank, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], rank)
            tensors[key] = torch.ones(shape)

    return change


BAD: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], None], str, str]] = {
    "missing tensor": (without(KEY.format("B")), "TENSOR_MISSING", r"1 tensors .*c_attn\.lora_B"),
    "a module missing": (setting(target_modules=["c_attn", "c_proj", "c_fc"]), "TENSOR_MISSING",
                         r"4 tensors .*h\.0\.mlp\.c_fc\.lora_A"),
    "surplus tensor": (adding("base_model.model.lm_head.lora_A.weight"), "TENSOR_SURPLUS",
                       r"1 tensors .*lm_head\.lora_A"),
    "key with the adapter's name": (adding(KEY.format("A.default")), "TENSOR_SURPLUS",
                                    r"lora_A\.default\.weight"),
    "a module not selected": (setting(layers_to_transform=[1]), "TENSOR_SURPLUS", r"6 tensors"),
    "trained embedding": (adding("base_model.model.transformer.wte.lora_embedding_A"),
                          "TENSOR_SURPLUS", r"lora_embedding_A"),
    "wrong shape": (replacing(lambda b: b[:-1]), "SHAPE_MISMATCH",
                    r"c_attn\.lora_B\.weight has shape \(95, 4\) .*\(96, 4\)"),
    "transposed": (replacing(lambda b: b.T), "SHAPE_MISMATCH", r"\(4, 96\)"),
    "flat": (replacing(lambda b: b.flatten()), "SHAPE_MISMATCH", r"\(384,\)"),
    "rank of another config": (setting(r=8), "SHAPE_MISMATCH", r"\(8, 32\)"),
    "rank pattern of another config": (setting(rank_pattern={"c_attn": 2}), "SHAPE_MISMATCH",
                                       r"\(2, 32\)"),
    "rank over the cap": (ranks(257), "RANK_TOO_HIGH", r"rank 257: the limit is 256"),
    "NaN": (replacing(spoiling(float("nan"))), "NOT_FINITE", r"c_attn\.lora_B\.weight holds NaN"),
    "infinity": (replacing(spoiling(float("-inf")), KEY.format("A")), "NOT_FINITE", r"lora_A"),
    "all-zero B": (zeroing("lora_B"), "ZERO_EFFECT", r"every delta is zero"),
    "all-zero A": (zeroing("lora_A"), "ZERO_EFFECT", r"every delta is zero"),
    "alpha 0": (setting(lora_alpha=0), "ZERO_EFFECT", r"every delta is zero"),
    "float64": (replacing(lambda b: b.double()), "DTYPE_UNSUPPORTED", r"dtype F64: save it as F32"),
    "int8": (replacing(lambda b: b.to(torch.int8)), "DTYPE_UNSUPPORTED", r"dtype I8"),
    "DoRA": (setting(use_dora=True), "UNSUPPORTED_FEATURE", r"use_dora is true"),
    "bias": (setting(bias="lora_only"), "UNSUPPORTED_FEATURE", r'bias is "lora_only"'),
    "PiSSA": (setting(init_lora_weights="pissa"), "UNSUPPORTED_FEATURE",
              r'init_lora_weights is "pissa".*path_initial_model_for_weight_conversion'),
    "modules_to_save": (setting(modules_to_save=["wte"]), "UNSUPPORTED_FEATURE",
                        r"modules_to_save is \[\"wte\"\]"),
    "tied lm_head": (setting(target_modules=["c_attn", "c_proj", "lm_head"]), "TIED_PARAMETER",
                     r"module lm_head shares its parameter"),
    "another base": (setting(target_modules=["q_proj"]), "TARGET_NOT_FOUND", r"another base"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "message"), BAD.values(), ids=BAD)
def test_a_bad_adapter_is_refused_by_reason_and_name(
    good: Path,
    change: Callable[[dict[str, Any], dict[str, Tensor]], None],
    reason: str,
    message: str,
) -> None:
    config, tensors = contents(good)
    assert parse(config, tensors).rank == 4
    change(config, tensors)
    (good / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, good / TENSORS_NAME)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(good, LAYOUT)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError) as pushed:
        parse(config, tensors)
    assert str(pushed.value) == str(caught.value)


def test_contents_of_an_adapter_open_no_file_and_run_nothing(good: Path) -> None:
    """Whatever they name: what Python tells its auditors of is all that could."""
    config, tensors = contents(good)
    named = {
        "base_model_name_or_path": "/etc/passwd",
        "auto_mapping": {"base_model_class": "system", "parent_library": "os"},
        "revision": "../../etc/passwd",
    }
    parse(config, tensors)  # What is imported once is imported now.
    seen: list[str] = []
    listening = True

    def auditor(event: str, _: object) -> None:
        if listening:
            seen.append(event)

    sys.addaudithook(auditor)  # For good: there is no way to remove one.
    try:
        parse(config | named, tensors)
    finally:
        listening = False
    assert {event.partition(".")[0] for event in seen} & AUDITED == set()


def test_one_module_may_be_zero_if_another_is_not(good: Path) -> None:
    config, tensors = contents(good)
    tensors[KEY.format("B")].zero_()
    assert len(parse(config, tensors).modules) == 6


def test_the_rank_at_the_cap_is_accepted(good: Path) -> None:
    config, tensors = contents(good)
    ranks(256)(config, tensors)
    assert parse(config, tensors).rank == 256
    with pytest.raises(AdapterError, match="rank 256: the limit is 255"):
        parse(config, tensors, max_rank=255)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def lying(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        header, body = header_of(data)
        change(header[KEY.format("A")])
        return file_of(header, body)

    return spoil


CORRUPT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", r"0 bytes long"),
    "seven bytes": (lambda d: d[:7], r"7 bytes long"),
    "truncated header": (lambda d: d[:100], r"is truncated or no safetensors file"),
    "truncated data": (lambda d: d[:-1], r"is truncated: its tensors need"),
    "surplus data": (lambda d: d + b"\0", r"1 bytes that belong to no tensor"),
    "huge header length": (lambda d: b"\xff" * 8 + d[8:], r"claims 18446744073709551615 bytes"),
    "header over the limit": (lambda d: file_of(b" " * (5 << 20), b""), r"header of 5242880 bytes"),
    "header that is no JSON": (lambda d: file_of(b"{'a'}", b""), r"header that is not JSON"),
    "deep header": (lambda d: file_of(b"[" * 100_000, b""), r"header that is not JSON"),
    "header that is a list": (lambda d: file_of([], b""), r"not a JSON object"),
    "key twice": (lambda d: file_of(b'{"a":{},"a":{}}', b""), r'names "a" twice'),
    "NaN in the header": (lambda d: file_of(b'{"a":NaN}', b""), r"header that holds NaN"),
    "entry without shape": (lying(lambda e: e.pop("shape") and None), r"other fields than"),
    "unknown dtype": (lying(lambda e: e.update(dtype="F7")), r"unknown dtype 'F7'"),
    "negative shape": (lying(lambda e: e.update(shape=[-4, -32])), r"a shape that is not one"),
    "boolean shape": (lying(lambda e: e.update(shape=[True, 128])), r"a shape that is not one"),
    "shape larger than data": (lying(lambda e: e.update(shape=[2**40, 32])), r"need"),
    "narrower dtype": (lying(lambda e: e.update(dtype="F16")), r"512 bytes where .* need 256"),
    "offsets backwards": (lying(lambda e: e.update(data_offsets=[8, 0])), r"not a range"),
    "offsets of another tensor": (
        lying(lambda e: e.update(data_offsets=[n + 512 for n in e["data_offsets"]])),
        r"at byte \d+ where",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_tensor_file_is_refused(
    good: Path, spoil: Callable[[bytes], bytes], message: str
) -> None:
    path = good / TENSORS_NAME
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(AdapterError, match=rf"^adapter_model\.safetensors .*{message}") as caught:
        read_adapter(good, LAYOUT)
    assert caught.value.reason == "FILE_CORRUPT"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_a_pickle_is_refused_by_name_and_not_opened(good: Path, name: str) -> None:
    (good / TENSORS_NAME).unlink()
    (good / name).symlink_to("/nonexistent")  # opening it would fail otherwise
    with pytest.raises(AdapterError) as caught:
        read_adapter(good, LAYOUT)
    assert caught.value.reason == "PICKLE_REFUSED"
    assert str(caught.value) == (
        f"{name}: pickle files are refused; save with safe_serialization=True"
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_of_the_tensor_file_is_refused(good: Path, zipped: bool) -> None:
    _, tensors = contents(good)
    torch.save(tensors, good / TENSORS_NAME, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterError, match="pickle files are refused") as caught:
        read_adapter(good, LAYOUT)
    assert caught.value.reason == "PICKLE_REFUSED"


def test_other_files_of_a_trainer_are_left_alone(good: Path) -> None:
    (good / "training_args.bin").write_bytes(b"\x80\x04.")
    (good / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert read_adapter(good, LAYOUT).rank == 4


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_missing_file_is_named(good: Path, name: str) -> None:
    (good / name).unlink()
    with pytest.raises(AdapterError, match=rf"{name}: no such file") as caught:
        read_adapter(good, LAYOUT)
    assert caught.value.reason == "FILE_MISSING"


def test_the_byte_caps_hold_for_folders_and_pushes(good: Path) -> None:
    config, tensors = ((good / n).read_bytes() for n in (CONFIG_NAME, TENSORS_NAME))
    exact = Limits(max_bytes=len(tensors), max_config_bytes=len(config))
    assert parse_adapter(config, tensors, LAYOUT, exact) == read_adapter(good, LAYOUT, exact)
    for limits, name in [
        (Limits(max_bytes=len(tensors) - 1), TENSORS_NAME),
        (Limits(max_config_bytes=len(config) - 1), CONFIG_NAME),
    ]:
        with pytest.raises(AdapterError, match=f"{name} is larger than the limit") as pushed:
            parse_adapter(config, tensors, LAYOUT, limits)
        with pytest.raises(AdapterError, match=f"{name} is larger than the limit") as read:
            read_adapter(good, LAYOUT, limits)
        assert pushed.value.reason == read.value.reason == "TOO_LARGE"


def test_a_huge_file_is_refused_before_it_is_read(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(good / TENSORS_NAME, 1 << 40)  # sparse
    opened: list[int] = []
    original = os.fdopen

    def fdopen(descriptor: int, *arguments: Any, **options: Any) -> Any:
        opened.append(os.fstat(descriptor).st_size)
        return original(descriptor, *arguments, **options)

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(AdapterError, match="larger than the limit"):
        read_adapter(good, LAYOUT)
    assert opened == [(good / CONFIG_NAME).stat().st_size]


def test_a_file_that_grows_while_it_is_read_is_refused(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (good / TENSORS_NAME).stat().st_size
    original = os.fdopen

    def fdopen(descriptor: int, *arguments: Any, **options: Any) -> Any:
        if os.fstat(descriptor).st_size == size:
            os.truncate(good / TENSORS_NAME, 4 * size)
        return original(descriptor, *arguments, **options)

    monkeypatch.setattr(os, "fdopen", fdopen)
    with pytest.raises(AdapterError, match="grew while it was read") as caught:
        read_adapter(good, LAYOUT, Limits(max_bytes=2 * size))
    assert caught.value.reason == "FILE_CORRUPT"


@pytest.mark.parametrize("limit", ["max_rank", "max_bytes", "max_config_bytes"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is 0"):
        Limits(**{limit: 0})


@pytest.mark.parametrize("name", ["Good", "a b", "..", ".hidden", "-x"])
def test_a_name_that_is_no_domain_is_refused(good: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="not a valid name") as caught:
        read_adapter(good.parent / name, LAYOUT)
    assert caught.value.reason == "NAME_INVALID"


class TestPathsStayInside:
    @pytest.fixture
    def outside(self, good: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(good, tmp_path / "outside"))

    def refused(self, folder: Path, layout: Layout, root: Path) -> None:
        with pytest.raises(AdapterError, match="leads outside") as caught:
            read_adapter(folder, layout, root=root)
        assert caught.value.reason == "PATH_ESCAPE"

    def test_dots(self, good: Path, outside: Path) -> None:
        self.refused(good.parent / ".." / "outside", LAYOUT, good.parent)

    def test_another_folder(self, good: Path, outside: Path) -> None:
        self.refused(outside, LAYOUT, good.parent)

    def test_a_link_to_a_folder(self, good: Path, outside: Path) -> None:
        (good.parent / "link").symlink_to(outside)
        self.refused(good.parent / "link", LAYOUT, good.parent)
        with pytest.raises(AdapterError, match="leads outside"):  # the parent is the default root
            read_adapter(good.parent / "link", LAYOUT)

    @pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
    def test_a_link_to_a_file(self, good: Path, outside: Path, name: str) -> None:
        (good / name).unlink()
        (good / name).symlink_to(outside / name)
        self.refused(good, LAYOUT, good.parent)

    def test_a_sibling_with_the_same_beginning(self, good: Path) -> None:
        sibling = Path(shutil.copytree(good, good.parent.parent / "adapters2" / "good"))
        self.refused(sibling, LAYOUT, good.parent)

    def test_links_inside_are_followed(self, good: Path) -> None:
        (good.parent / "link").symlink_to(good)
        assert read_adapter(good.parent / "link", LAYOUT) == read_adapter(good, LAYOUT)

    def test_a_link_that_leads_nowhere_or_in_a_circle(self, good: Path) -> None:
        for name, target in [("gone", "nothing"), ("loop", "loop")]:
            (good.parent / name).symlink_to(good.parent / target)
            with pytest.raises(AdapterError) as caught:
                read_adapter(good.parent / name, LAYOUT)
            assert caught.value.reason == "FILE_MISSING"

    def test_what_is_no_regular_file(self, good: Path) -> None:
        (good / TENSORS_NAME).unlink()
        os.mkfifo(good / TENSORS_NAME)  # opening it must not wait for a writer
        with pytest.raises(AdapterError, match="not a regular file") as caught:
            read_adapter(good, LAYOUT)
        assert caught.value.reason == "FILE_CORRUPT"
        (good / CONFIG_NAME).unlink()
        (good / CONFIG_NAME).mkdir()
        with pytest.raises(AdapterError, match=f"{CONFIG_NAME}: not a regular file"):
            read_adapter(good, LAYOUT)

    def test_a_file_in_place_of_the_folder(self, good: Path) -> None:
        (good.parent / "file").write_text("x")
        with pytest.raises(AdapterError, match="not a directory"):
            read_adapter(good.parent / "file", LAYOUT)
