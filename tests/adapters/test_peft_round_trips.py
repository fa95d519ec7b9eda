"""Adapters as PEFT saves them, and as others rename them: PEFT's own logits, or a true refusal."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from tests.makers import load_peft, make_adapter, peft_model, save_base, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.base.facts import BaseFacts, read_facts
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.peft.folder import (
    CONFIG_NAME,
    TENSORS_NAME,
    files_digest,
    parse_adapter,
    read_adapter,
)

IDS = torch.tensor([[5, 17, 200, 3, 99, 42, 7, 1]])


class Base:
    """A model, its checkpoint, and what a reader of adapters knows of it."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model = model
        self.folder = save_base(model, folder)
        self.layout: Layout = read_layout(model)
        self.facts: BaseFacts = read_facts(str(folder), folder, model)

    def read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.layout, base=self.facts)

    def logits(self, adapter: Adapter) -> Tensor:
        """Of the base with the adapter's deltas written into its parameters, in float64."""
        model: Any = copy.deepcopy(self.model).double()
        with torch.no_grad():
            for name, f in adapter.modules.items():
                delta = f.scaling * (f.b.double() @ f.a.double())
                model.get_submodule(name).weight += self.layout[name].delta(delta)
            logits: Tensor = model(IDS).logits
        return logits

    @torch.no_grad()
    def reference(self, folder: Path) -> Tensor:
        model: Any = load_peft(self.model, folder).double()
        logits: Tensor = model(IDS).logits
        return logits

    def base_logits(self) -> Tensor:
        model: Any = copy.deepcopy(self.model).double()
        with torch.no_grad():
            logits: Tensor = model(IDS).logits
        return logits

    def agrees(self, folder: Path) -> Adapter:
        """Check that the adapter is served as PEFT means it, and that it does something."""
        adapter = self.read(folder)
        expected = self.reference(folder)
        assert (self.base_logits() - expected).abs().max() > 1e-3
        assert (self.logits(adapter) - expected).abs().max() < 1e-6
        return adapter

    def refuses(self, folder: Path, reason: str, message: str) -> None:
        with pytest.raises(AdapterError, match=message) as caught:
            self.read(folder)
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tiny_gpt2(), tmp_path_factory.mktemp("bases") / "tiny-gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tiny_llama(), tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Llama whose attention has biases and whose MLP has none."""
    return Base(tiny_llama(attention_bias=True), tmp_path_factory.mktemp("bases") / "biased")


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load((folder / TENSORS_NAME).read_bytes())
    return tensors


MADE: dict[str, dict[str, Any]] = {
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "no init": {"init_lora_weights": None},
    "weights tied": {"ensure_weight_tying": True},
    "megatron core": {"megatron_core": "other.core"},
    "QALoRA's groups": {"qalora_group_size": 8},
}


@pytest.mark.parametrize("fields", MADE.values(), ids=MADE)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_peft_makes_is_served_as_peft_means_it(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    base: Base = request.getfixturevalue(family)
    folder = make_adapter(base.model, tmp_path / "a", 3, **fields)
    assert base.agrees(folder).warnings == ()


WRITTEN: dict[str, dict[str, Any]] = {
    "rsLoRA null": {"use_rslora": None},
    "fan-in null": {"fan_in_fan_out": None},
    "EVA's settings": {"eva_config": {"rho": 2.0, "tau": 0.99}},
    "EVA's settings, EVA": {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    # Left in the config by a conversion to plain LoRA.
    "CorDA's settings": {"corda_config": {"corda_method": "kpm"}},
    "LoRA-GA's settings": {"lora_ga_config": {"direction": "ArBr"}},
    "LoftQ's settings": {"loftq_config": {"loftq_bits": 4}},
    "runtime": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "ms-swift": {"lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6, "lora_dtype": "fp32"},
    "a comment": {"_comment": "best of three"},
    "an early PEFT": {"merge_weights": True},
    "seq2seq": {"task_type": "SEQ_2_SEQ_LM"},
    "features": {"task_type": "FEATURE_EXTRACTION"},
}


@pytest.mark.parametrize("fields", WRITTEN.values(), ids=WRITTEN)
def test_what_others_write_is_served_as_peft_reads_it(
    gpt2: Base, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    edit(folder, **fields)
    warnings = gpt2.agrees(folder).warnings
    assert len(warnings) == ("task_type" in fields)


class TestCopiesOfTheBase:
    def save(self, base: Base, folder: Path, dtype: torch.dtype, **lora: Any) -> Path:
        wrapped: Any = peft_model(base.model, 3, **lora)
        wrapped.to(dtype).save_pretrained(folder, save_embedding_layers=True)
        return folder

    def test_a_head_below_its_own_adapter(self, llama: Base, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        self.save(llama, folder, torch.float32, target_modules=["q_proj", "lm_head"])
        assert "base_model.model.lm_head.base_layer.weight" in tensors_of(folder)
        assert "lm_head" in llama.agrees(folder).modules

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_embedding_and_head(
        self, request: pytest.FixtureRequest, tmp_path: Path, family: str
    ) -> None:
        base: Base = request.getfixturevalue(family)
        folder = self.save(base, tmp_path / "a", torch.float32)
        names = [name for name in tensors_of(folder) if "lora" not in name]
        assert names
        adapter = base.agrees(folder)
        plain = make_adapter(base.model, tmp_path / "b", 3)
        assert adapter.digest == base.read(plain).digest  # what changes nothing is not in it
        config, tensors = ((folder / n).read_bytes() for n in (CONFIG_NAME, TENSORS_NAME))
        assert files_digest(config, tensors) == adapter.digest

    def test_without_the_base_they_are_surplus(self, llama: Base, tmp_path: Path) -> None:
        folder = self.save(llama, tmp_path / "a", torch.float32)
        with pytest.raises(AdapterError, match=r"no use for .*lm_head"):
            read_adapter(folder, llama.layout)

    def test_a_wider_dtype_than_the_checkpoints_is_no_difference(self, tmp_path: Path) -> None:
        narrow = Base(tiny_llama().to(torch.bfloat16), tmp_path / "narrow")
        narrow.model = AutoModelForCausalLM.from_pretrained(narrow.folder, dtype=torch.float32)
        narrow.agrees(self.save(narrow, tmp_path / "a", torch.float32))

    def test_a_narrower_one_is(self, llama: Base, tmp_path: Path) -> None:
        folder = self.save(llama, tmp_path / "a", torch.bfloat16)
        llama.refuses(folder, "UNSUPPORTED_FEATURE", "differs from the base's .*=False")

    @pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
    def test_one_number_more_or_less_is_named(self, llama: Base, tmp_path: Path, key: str) -> None:
        folder = self.save(llama, tmp_path / "a", torch.float32)
        tensors = tensors_of(folder)
        tensors[f"base_model.model.{key}"][-1, -1] += 1
        save_file(tensors, folder / TENSORS_NAME)
        llama.refuses(folder, "UNSUPPORTED_FEATURE", rf"{key} differs from the base's {key}")

    def test_a_resized_embedding_is_named(self, llama: Base, tmp_path: Path) -> None:
        folder = self.save(llama, tmp_path / "a", torch.float32)
        tensors = tensors_of(folder)
        key = "base_model.model.model.embed_tokens.weight"
        tensors[key] = torch.cat([tensors[key], torch.zeros(1, 32)])
        save_file(tensors, folder / TENSORS_NAME)
        llama.refuses(folder, "UNSUPPORTED_FEATURE", r"resized: its shape is \(258, 32\)")

    def test_a_checkpoint_that_is_gone_is_named(self, tmp_path: Path) -> None:
        base = Base(tiny_llama(), tmp_path / "gone")
        folder = self.save(base, tmp_path / "a", torch.float32)
        (base.folder / "model.safetensors").unlink()
        base.refuses(folder, "UNSUPPORTED_FEATURE", "cannot be compared with the base")


class TestBiases:
    @pytest.mark.parametrize("bias", ["lora_only", "all"])
    def test_a_base_without_any(self, llama: Base, tmp_path: Path, bias: str) -> None:
        llama.agrees(make_adapter(llama.model, tmp_path / "a", 3, bias=bias))

    def test_adapted_modules_without_any(self, biased: Base, tmp_path: Path) -> None:
        folder = make_adapter(
            biased.model, tmp_path / "a", 3, bias="lora_only", target_modules=["down_proj"]
        )
        biased.agrees(folder)

    @pytest.mark.parametrize(
        ("bias", "modules"), [("lora_only", ["q_proj"]), ("all", ["down_proj"])]
    )
    def test_what_may_have_been_trained_is_refused(
        self, biased: Base, tmp_path: Path, bias: str, modules: list[str]
    ) -> None:
        folder = make_adapter(biased.model, tmp_path / "a", 3, bias=bias, target_modules=modules)
        biased.refuses(folder, "UNSUPPORTED_FEATURE", rf'bias is "{bias}".*_proj\.bias')
        # Not even if the tensors were lost: they were trained.
        kept = {name: t for name, t in tensors_of(folder).items() if "lora" in name}
        save_file(kept, folder / TENSORS_NAME)
        biased.refuses(folder, "UNSUPPORTED_FEATURE", rf'bias is "{bias}".*_proj\.bias')

    def test_an_unknown_base_may_have_some(self, llama: Base, tmp_path: Path) -> None:
        folder = make_adapter(llama.model, tmp_path / "a", 3, bias="lora_only")
        with pytest.raises(AdapterError, match='bias is "lora_only"'):
            read_adapter(folder, llama.layout)


PREFIX = "base_model.model."
RENAMED: dict[str, tuple[Callable[[str], str], str]] = {
    "the adapter's name": (lambda n: n.replace(".weight", ".default.weight"), "adapter's name"),
    "another adapter's name": (lambda n: n.replace(".weight", ".law.weight"), "adapter's name"),
    "compiled": (lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"),
    "compiled outside": (lambda n: f"_orig_mod.{n}", "_orig_mod"),
    "compiled layers": (lambda n: n.replace(".mlp.", "._orig_mod.mlp."), "_orig_mod"),
    "FSDP": (lambda n: f"_fsdp_wrapped_module.{n}", "_fsdp_wrapped_module"),
    "DataParallel": (lambda n: f"module.{n}", "prefix module"),
    "DataParallel inside": (lambda n: n.replace(PREFIX, f"{PREFIX}module."), "prefix module"),
    "prefix missing": (lambda n: n.removeprefix(PREFIX), "without base_model.model in front"),
    "prefix twice": (lambda n: PREFIX + n, "base_model.model twice"),
    "all at once": (
        lambda n: f"module.{PREFIX}{n}".replace(".weight", ".default.weight"),
        "adapter's name",
    ),
}


@pytest.mark.parametrize(("rename", "warning"), RENAMED.values(), ids=RENAMED)
def test_known_renames_are_undone_and_said(
    gpt2: Base, tmp_path: Path, rename: Callable[[str], str], warning: str
) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    expected, digest = gpt2.reference(folder), gpt2.read(folder).digest
    save_file({rename(n): t for n, t in tensors_of(folder).items()}, folder / TENSORS_NAME)
    adapter = gpt2.read(folder)
    assert (gpt2.logits(adapter) - expected).abs().max() < 1e-6
    assert adapter.digest == digest
    assert warning in " ".join(adapter.warnings)
    # A store knows no base.
    config, tensors = ((folder / n).read_bytes() for n in (CONFIG_NAME, TENSORS_NAME))
    assert files_digest(config, tensors) == digest
    assert parse_adapter(config, tensors, gpt2.layout).warnings == adapter.warnings


def test_an_adapter_of_the_model_without_its_head(llama: Base, tmp_path: Path) -> None:
    backbone: Any = llama.model.model
    fields: dict[str, Any] = {
        "target_modules": ["layers.0.self_attn.q_proj", "v_proj", "lm_head"],
        "rank_pattern": {"^layers.*v_proj": 3},
    }
    folder = make_adapter(backbone, tmp_path / "a", 3, task_type="FEATURE_EXTRACTION", **fields)
    adapter = llama.read(folder)
    trained: Any = load_peft(backbone, folder).double()
    head: Any = llama.model.lm_head
    with torch.no_grad():
        hidden = trained(input_ids=IDS).last_hidden_state
        expected = hidden @ head.weight.double().T
    assert (llama.logits(adapter) - expected).abs().max() < 1e-6
    assert any("without its head" in warning for warning in adapter.warnings)
    with pytest.raises(AdapterError, match=r"no use for .*layers\.0\.self_attn"):
        read_adapter(folder, llama.layout)


def test_copies_beside_an_adapter_of_the_model_without_its_head(
    llama: Base, tmp_path: Path
) -> None:
    backbone: Any = llama.model.model
    wrapped: Any = peft_model(
        backbone, 3, task_type="FEATURE_EXTRACTION", target_modules=["q_proj"]
    )
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    tensors = tensors_of(tmp_path / "a")
    copy_of_base = "base_model.model.embed_tokens.weight"
    assert copy_of_base in tensors
    assert len(llama.read(tmp_path / "a").modules) == 2
    tensors[copy_of_base][0] += 1
    save_file(tensors, tmp_path / "a" / TENSORS_NAME)
    llama.refuses(tmp_path / "a", "UNSUPPORTED_FEATURE", "differs from the base's model.embed_tok")


def test_two_adapters_in_one_file_are_refused(gpt2: Base, tmp_path: Path) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    tensors = {
        name.replace(".weight", f".{adapter}.weight"): tensor.clone()
        for name, tensor in tensors_of(folder).items()
        for adapter in ("law", "tax")
    }
    save_file(tensors, folder / TENSORS_NAME)
    gpt2.refuses(folder, "TENSOR_SURPLUS", r"several adapters \(law, tax\)")


def test_two_names_of_one_tensor_are_refused(gpt2: Base, tmp_path: Path) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    tensors = tensors_of(folder)
    save_file(
        tensors | {f"module.{n}": t.clone() for n, t in tensors.items()}, folder / TENSORS_NAME
    )
    gpt2.refuses(folder, "TENSOR_SURPLUS", r"tensors base_model\S+ and module\.\S+ are both")


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_a_git_lfs_pointer_is_named(gpt2: Base, tmp_path: Path, name: str) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    (folder / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
    )
    gpt2.refuses(folder, "FILE_CORRUPT", f"{name} is a Git LFS pointer.*git lfs pull")


def test_an_adapter_one_level_below_is_named(gpt2: Base, tmp_path: Path) -> None:
    make_adapter(gpt2.model, tmp_path / "run" / "checkpoint-20", 3)
    gpt2.refuses(tmp_path / "run", "FILE_MISSING", r"but .*/run/checkpoint-20 holds one: name that")


def test_a_folder_of_mlx_is_named(gpt2: Base, tmp_path: Path) -> None:
    folder = make_adapter(gpt2.model, tmp_path / "a", 3)
    (folder / TENSORS_NAME).rename(folder / "adapters.safetensors")
    gpt2.refuses(folder, "UNSUPPORTED_FEATURE", "an adapter of MLX .*superpose-convert")


def test_tensors_named_as_mlx_are_named(llama: Base, tmp_path: Path) -> None:
    folder = make_adapter(llama.model, tmp_path / "a", 3)
    save_file(
        {
            n.removeprefix(PREFIX)
            .replace("lora_A.weight", "lora_a")
            .replace("lora_B.weight", "lora_b"): t
            for n, t in tensors_of(folder).items()
        },
        folder / TENSORS_NAME,
    )
    llama.refuses(folder, "TENSOR_SURPLUS", "named as MLX's: .*superpose-convert")


class TestWhatCannotBeAdapted:
    def test_an_embedding_beside_layers(self, llama: Base, tmp_path: Path) -> None:
        folder = make_adapter(llama.model, tmp_path / "a", target_modules=["q_proj"])
        wrapped: Any = peft_model(llama.model, target_modules=["q_proj", "embed_tokens"])
        wrapped.save_pretrained(folder, save_embedding_layers=False)
        llama.refuses(folder, "TARGET_NOT_ADAPTABLE", r"embed_tokens \(Embedding\) is in this base")

    def test_an_embedding_alone(self, llama: Base, tmp_path: Path) -> None:
        wrapped: Any = peft_model(llama.model, target_modules=["embed_tokens"])
        wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
        llama.refuses(
            tmp_path / "a", "TARGET_NOT_ADAPTABLE", r"embed_tokens \(Embedding\), which is"
        )

    @pytest.mark.parametrize(
        ("module", "owner"),
        [
            ("mlp.experts.1.w1", r"mlp\.experts \(MixtralExperts\)"),
            ("mlp.gate", r"mlp\.gate \(MixtralTopKRouter\)"),
        ],
    )
    def test_experts_and_routers(self, tmp_path: Path, module: str, owner: str) -> None:
        config = MixtralConfig(
            vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        )  # fmt: skip
        base = Base(MixtralForCausalLM(config).eval(), tmp_path / "mixtral")
        folder = make_adapter(base.model, tmp_path / "a", target_modules=["q_proj"])
        extra = f"{PREFIX}model.layers.0.{module}.lora_A.weight"
        save_file(tensors_of(folder) | {extra: torch.ones(4, 32)}, folder / TENSORS_NAME)
        base.refuses(
            folder, "TARGET_NOT_ADAPTABLE", rf"module model\.layers\.0\.{owner} is in this"
        )

    def test_what_the_base_does_not_have_is_no_such_thing(
        self, llama: Base, tmp_path: Path
    ) -> None:
        folder = make_adapter(llama.model, tmp_path / "a")
        extra = f"{PREFIX}model.layers.7.mlp.gate.lora_A.weight"
        save_file(tensors_of(folder) | {extra: torch.ones(4, 32)}, folder / TENSORS_NAME)
        llama.refuses(folder, "TENSOR_SURPLUS", r"no use for \(.*layers\.7")


class TestAnotherBase:
    @pytest.mark.parametrize(
        ("served", "named"),
        [
            ("openai-community/gpt2", "openai-community/gpt2-medium"),
            ("openai-community/gpt2", "mini"),
            ("mini", "gpt2"),
            ("/srv/models/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
            ("openai-community/gpt2", "/hub/models--openai-community--gpt2-xl/snapshots/0f1e"),
        ],
    )
    def test_warned_of(self, llama: Base, served: str, named: str) -> None:
        facts = BaseFacts(served, Path("/x/0f1e"), "", {}, {})
        assert facts.differs_from(named)

    @pytest.mark.parametrize(
        ("served", "named"),
        [
            ("openai-community/gpt2", "gpt2"),
            ("openai-community/gpt2", "OpenAI-Community/GPT2"),
            ("mini", "mini"),
            ("/srv/models/Llama-3.2-1B/", "meta-llama/llama-3.2-1b"),
            ("openai-community/gpt2", "/hub/models--openai-community--gpt2/snapshots/0f1e"),
            # These may hold anything.
            ("openai-community/gpt2", "/tmp/merged"),
            ("openai-community/gpt2", "./base"),
            ("openai-community/gpt2", "C:\\models\\base"),
            ("openai-community/gpt2", ""),
        ],
    )  # fmt: skip
    def test_not_warned_of(self, served: str, named: str) -> None:
        assert not BaseFacts(served, Path("/x/0f1e"), "", {}, {}).differs_from(named)

    @pytest.mark.parametrize("name", ["elsewhere/other", "elsewhere/Tiny-GPT2", None, 3])
    def test_an_adapter_says_it(self, gpt2: Base, tmp_path: Path, name: Any) -> None:
        folder = make_adapter(gpt2.model, tmp_path / "a")
        edit(folder, base_model_name_or_path=name)
        warnings = gpt2.read(folder).warnings
        assert len(warnings) == (name == "elsewhere/other")
        assert all("elsewhere/other" in w and gpt2.facts.name in w for w in warnings)
