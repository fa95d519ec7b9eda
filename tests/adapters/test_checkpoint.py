from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.base.folder import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 66, 7, 200, 31]])
# As openai-community/gpt2 has it, with the sizes of the tiny one.
HUB_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 256,
    "embd_pdrop": 0.1,
    "eos_token_id": 256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 257,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders of the tiny GPT-2 and the tiny Llama, which tests copy."""
    root = tmp_path_factory.mktemp("bases")
    return {
        "gpt2": save_base(tiny_gpt2(), root / "gpt2"),
        "llama": save_base(tiny_llama(), root / "llama"),
    }


@pytest.fixture
def gpt2(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))


@pytest.fixture
def llama(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["llama"], tmp_path / "base"))


def configure(folder: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in drop}))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def store(folder: Path, tensors: dict[str, Tensor], name: str = WEIGHTS) -> None:
    save_file(tensors, folder / name, {"format": "pt"})


def change(folder: Path, drop: tuple[str, ...] = (), **tensors: Tensor) -> None:
    """Store other tensors; in their names __ stands for a dot."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    store(folder, {k: v for k, v in (stored(folder) | new).items() if k not in drop})


def rename(folder: Path, name: Callable[[str], str]) -> None:
    store(folder, {name(key): tensor for key, tensor in stored(folder).items()})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


def refusal(folder: Path) -> str:
    """The reason for which a folder is not loaded, in one line that begins as all of them."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, torch.float32)
    line, start = str(caught.value), f"base {folder} "
    assert line.startswith(start)
    assert "\n" not in line
    for word in ("trust_remote_code", "does not fit", "Traceback", "ignore_mismatched"):
        assert word not in line
    return line.removeprefix(start)


# What is loaded.


def test_the_form_of_gpt2_on_the_hub_is_loaded_whole(tmp_path: Path) -> None:
    original = tiny_gpt2()
    tensors = {
        name.removeprefix("transformer."): tensor.clone()
        for name, tensor in original.state_dict().items()
        if name != "lm_head.weight"
    }
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    store(tmp_path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(HUB_GPT2))
    assert torch.equal(logits(load_checkpoint(tmp_path, torch.float32)), logits(original))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_the_model_is_ready_to_be_served(
    make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    original = make()
    original.save_pretrained(tmp_path)
    model: Any = load_checkpoint(tmp_path, dtype)
    assert type(model) is type(original)
    assert not model.training
    wanted = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name].to(dtype)), name
        assert not parameter.requires_grad
        assert parameter.device.type == "cpu"


def test_shards_are_loaded(tmp_path: Path) -> None:
    original = tiny_gpt2()
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).is_file()
    assert torch.equal(logits(load_checkpoint(tmp_path, torch.float32)), logits(original))


def tiny_glm_moe() -> Any:
    config = transformers.Glm4MoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return transformers.Glm4MoeForCausalLM(config)


MASK = torch.ones(64, 64).tril().view(1, 1, 64, 64)
HARMLESS: dict[str, dict[str, Tensor]] = {
    "triangles as booleans": {"transformer.h.0.attn.bias": MASK.bool()},
    "triangles as bytes": {"transformer.h.1.attn.bias": MASK.byte()},
    "masked_bias": {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)},
    "positions": {"transformer.position_ids": torch.arange(64)[None]},
    "the tied head": {},
}


@pytest.mark.parametrize("surplus", HARMLESS)
def test_what_the_class_makes_itself_may_be_stored(surplus: str, gpt2: Path) -> None:
    tensors = stored(gpt2)
    tensors |= HARMLESS[surplus] or {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    store(gpt2, tensors)
    assert torch.equal(logits(load_checkpoint(gpt2, torch.float32)), logits(tiny_gpt2()))


def test_rotary_frequencies_may_be_stored(llama: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    store(llama, stored(llama) | {name: torch.ones(4)})
    assert torch.equal(logits(load_checkpoint(llama, torch.float32)), logits(tiny_llama()))


def test_a_head_that_config_calls_tied_and_is_not_is_kept(gpt2: Path) -> None:
    head = torch.randn(257, 32)
    change(gpt2, lm_head__weight=head)
    model: Any = load_checkpoint(gpt2, torch.float32)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.transformer.wte.weight, tiny_gpt2().transformer.wte.weight)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("family", ["gpt2", "llama", "hub"])
def test_a_wrapper_before_every_name_is_taken_away(
    prefix: str,
    family: str,
    bases: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(bases["llama" if family == "llama" else "gpt2"], tmp_path / "b"))
    inner = "transformer." if family == "hub" else ""
    rename(folder, lambda name: prefix + name.removeprefix(inner))
    with caplog.at_level(logging.WARNING):
        model = load_checkpoint(folder, torch.float32)
    (record,) = caplog.records
    message = record.getMessage()
    assert message == f"base {folder}: every tensor is named behind {prefix}; loaded without that"
    original = tiny_llama() if family == "llama" else tiny_gpt2()
    assert torch.equal(logits(model), logits(original))


# What is refused, by the files in the folder.


def text(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


def only_adapter(folder: Path) -> None:
    shutil.rmtree(folder)
    make_adapter(tiny_gpt2(), folder)


def sharded(folder: Path) -> None:
    tiny_gpt2().save_pretrained(folder, max_shard_size="40KB")
    (folder / WEIGHTS).unlink(missing_ok=True)


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    next(folder.glob("model-00002-*")).unlink()


def damaged_index(folder: Path) -> None:
    sharded(folder)
    text(folder, INDEX, '{"metadata": {}}')


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def stored_in_two(folder: Path) -> None:
    sharded(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    again = {name: t.clone() for name, t in load_file(first).items()}
    save_file(load_file(second) | again, second, {"format": "pt"})


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "has no config.json: name a folder written by",
    ),
    "only an adapter": (
        only_adapter,
        "is an adapter and no base (adapter_config.json, no config.json): name the base that it "
        "was trained on, and pass the adapter by --adapter-dir or adapterctl push",
    ),
    "an adapter beside it": (
        lambda f: make_adapter(tiny_gpt2(), f),
        "holds an adapter beside the base (adapter_config.json): move the adapter's files into a "
        "folder of their own, and pass it by --adapter-dir or adapterctl push",
    ),
    "damaged config": (
        lambda f: text(f, "config.json", '{"model_type": "gpt2",'),
        "has a config.json that is not JSON (JSONDecodeError: ",
    ),
    "binary config": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        "has a config.json that is not JSON (UnicodeDecodeError: ",
    ),
    "config that is a list": (
        lambda f: text(f, "config.json", "[1]"),
        "has a config.json that is no JSON object: copy it again",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "has no model.safetensors: load it with transformers and convert it with save_pretrained",
    ),
    "pickled weights": (pickled, "has no model.safetensors but pytorch_model.bin: load it"),
    "a lost shard": (without_a_shard, "lacks model-00002-of-"),
    "damaged index": (damaged_index, f"has a {INDEX} that is no index of shards (KeyError: "),
    "truncated": (cut, f"has a damaged {WEIGHTS}, which is truncated: its tensors need"),
    "one name in two files": (stored_in_two, "stores transformer."),
    "distributed": (
        lambda f: store(f, stored(f), "shard-00000-model-00000-of-00001.safetensors"),
        "holds a distributed checkpoint (shard-*",
    ),
    "weights of another name": (
        lambda f: configure(f, transformers_weights="other.safetensors"),
        "names other files than model.safetensors as its weights (transformers_weights in",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_folder_is_refused_for_its_files(case: str, gpt2: Path) -> None:
    spoil, reason = FILES[case]
    spoil(gpt2)
    assert refusal(gpt2).startswith(reason)


# By its configuration.

QUANTISED = "): only unquantised checkpoints will do, in float32, bfloat16 or float16; save a"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        method: ({"quantization_config": {"quant_method": method, "bits": 4}}, QUANTISED)
        for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4")
    },
    "quantised text model": (
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        "is quantised (gptq" + QUANTISED,
    ),
    "no method": ({"quantization_config": {}}, "is quantised (quantization_config" + QUANTISED),
    "older key": ({"compression_config": {}}, "is quantised (compression_config" + QUANTISED),
    "unknown type": (
        {"model_type": "foo"},
        f"is of model type 'foo', which transformers {transformers.__version__} does not know: ",
    ),
    "no type": ({"model_type": None}, "names no model_type in config.json: "),
    "auto_map": ({"auto_map": 3}, "has an auto_map in config.json that is no JSON object: "),
    "encoder-decoder": ({"model_type": "t5"}, "is an encoder-decoder (t5) or a part of one: "),
    "bart": ({"model_type": "bart"}, "is an encoder-decoder (bart) or a part of one: "),
    "cross-attention": (
        {"add_cross_attention": True},
        "is an encoder-decoder (gpt2) or a part of one: ",
    ),
    "clip": (
        {"model_type": "clip"},
        f"is of model type 'clip', for which transformers {transformers.__version__} has no "
        "causal language model: ",
    ),
    "heads": (
        {"n_head": 5},
        "has a config.json of which no gpt2 can be built (ValueError: `embed_dim` must be "
        "divisible by num_heads",
    ),
    "activation": (
        {"activation_function": "foo"},
        "has a config.json of which no gpt2 can be built (KeyError: 'foo')",
    ),
    "no heads": ({"n_head": 0}, "has a config.json of which no gpt2 can be built (ZeroDivision"),
    "fewer than no layers": (
        {"n_layer": -1},
        "has layers that transformers has no cache for (GPT2LMHeadModel, ValueError: ",
    ),
    "negative": ({"n_embd": -32}, "has a config.json of which no gpt2 can be built (RuntimeErr"),
    "text for a number": (
        {"n_embd": "x"},
        "has a config.json that transformers refuses (StrictDataclassFieldValidationError: "
        "Validation error for field 'n_embd': TypeError: Field 'n_embd' expected int, got str",
    ),
    "classifier": (
        {"architectures": ["GPT2ForSequenceClassification"]},
        "was saved as GPT2ForSequenceClassification (architectures in config.json), and only a "
        "GPT2LMHeadModel is served: ",
    ),
    "backbone": ({"architectures": ["GPT2Model"]}, "was saved as GPT2Model (architectures in"),
    "masked": ({"architectures": "BertForMaskedLM"}, "was saved as BertForMaskedLM (archit"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_base_is_refused_for_its_configuration(
    case: str, gpt2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields, reason = SETTINGS[case]
    configure(gpt2, **fields)
    line = refusal(gpt2)
    if reason == QUANTISED:
        reason = f"is quantised ({case}" + QUANTISED
    assert line.startswith(reason)
    assert capfd.readouterr() == ("", "")


SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
STATE = "keeps a state that is no key-value cache ("
LATER = "is no causal language model: its tokens see later ones ("
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (SMALL, f"{STATE}MambaForCausalLM: LinearAttentionLayer): "),
    "jamba": (SMALL, f"{STATE}JambaForCausalLM: LinearAttentionLayer): "),
    "rwkv": (SMALL, f"{STATE}RwkvForCausalLM: recurrent): "),
    "qwen3_next": (SMALL, f"{STATE}Qwen3NextForCausalLM: LinearAttentionLayer): "),
    "recurrent_gemma": (SMALL | {"num_hidden_layers": 3}, f"{STATE}RecurrentGemmaForCausalLM"),
    "lfm2": (
        SMALL | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        f"{STATE}Lfm2ForCausalLM: LinearAttentionLayer): ",
    ),
    "minimax": (
        SMALL | {"num_key_value_heads": 2, "num_local_experts": 2},
        f"{STATE}MiniMaxForCausalLM: LinearAttentionLayer): ",
    ),
    "deepseek_v32": (SMALL, f"{STATE}DeepseekV32ForCausalLM: DynamicIndexedLayer): "),
    "bert": (SMALL, f"{LATER}BertLMHeadModel, as config.json sets it): "),
    "roberta": (SMALL, f"{LATER}RobertaForCausalLM, as"),
    "rembert": (SMALL, f"{LATER}RemBertForCausalLM, as"),
    "bert-generation": (SMALL, f"{LATER}BertGenerationDecoder, as"),
    "llama": (SMALL | {"is_causal": False}, f"{LATER}LlamaForCausalLM, as"),
    "gemma3_text": (
        SMALL | {"use_bidirectional_attention": True, "head_dim": 8},
        f"{LATER}Gemma3ForCausalLM, as",
    ),
    "gemma3": ({}, "takes more than text (vision_config in config.json): "),
    "phi4_multimodal": (SMALL, "takes more than text (audio_config, vision_config in config.json"),
    "blt": ({}, "has layers that transformers has no cache for (BltForCausalLM, AttributeError: "),
    "fuyu": ({}, "takes more than text (text_config in config.json): "),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_refused_before_its_weights_are_read(model_type: str, tmp_path: Path) -> None:
    fields, reason = FAMILIES[model_type]
    text(tmp_path, "config.json", json.dumps({"model_type": model_type, **fields}))
    text(tmp_path, WEIGHTS, "no weights at all")
    assert refusal(tmp_path).startswith(reason)


def test_a_decoder_of_a_masked_family_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, is_decoder=True, max_position_embeddings=64)
    original = transformers.BertLMHeadModel(config).eval()
    original.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path, torch.float32)
    assert torch.equal(logits(model), logits(original))


# By code that it brings.


@pytest.fixture
def trap(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once code of the checkpoint in `gpt2` has run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    sprung = tmp_path / "sprung"
    code = f"open({str(sprung)!r}, 'w')\n"
    for name in ("modeling_x.py", "configuration_x.py", "custom_generate/generate.py"):
        (gpt2 / name).parent.mkdir(exist_ok=True)
        text(gpt2, name, code)
    configure(
        gpt2,
        auto_map={
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        },
    )
    return sprung


def test_transformers_own_class_is_loaded_and_the_code_beside_it_is_not_run(
    trap: Path, gpt2: Path
) -> None:
    model = load_checkpoint(gpt2, torch.float32)
    assert torch.equal(logits(model), logits(tiny_gpt2()))
    assert not trap.exists()


@pytest.mark.parametrize("architectures", [["XForCausalLM"], ["GPT2Model"], None])
def test_a_class_of_its_own_is_refused(
    trap: Path, gpt2: Path, architectures: list[str] | None
) -> None:
    configure(gpt2, architectures=architectures)
    named = architectures[0] if architectures else "no class"
    assert refusal(gpt2) == (
        f"names {named} in config.json and code of its own (auto_map), which is never run; "
        "transformers' own class is GPT2LMHeadModel: use a checkpoint that was saved as that"
    )
    assert not trap.exists()


def test_a_model_type_of_its_own_is_refused(trap: Path, gpt2: Path) -> None:
    configure(gpt2, model_type="x")
    assert refusal(gpt2) == (
        f"is of model type 'x', which transformers {transformers.__version__} does not know, and "
        "needs code of its own (auto_map), which is never run: use a base that transformers has a "
        "class for"
    )
    assert not trap.exists()


# By its tensors.

LN, WTE = "transformer.ln_f.weight", "transformer.wte.weight"
WHOLE = "is not a whole GPT2LMHeadModel as config.json describes it: "
AGAIN = ": copy it again, or save the model again with save_pretrained"
NO_PARAMETERS = ": only float32, bfloat16 and float16 checkpoints will do; save a dequantised"
TENSORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda f: change(f, drop=(LN,)),
        f"{WHOLE}lacks {LN}{AGAIN}",
    ),
    "missing embedding, tied": (
        lambda f: change(f, drop=(WTE,)),
        f"{WHOLE}lacks lm_head.weight, {WTE}{AGAIN}",
    ),
    "more layers in config.json": (
        lambda f: configure(f, n_layer=3),
        f"{WHOLE}lacks transformer.h.2.attn.c_attn.bias, ",
    ),
    "more layers in the file": (
        lambda f: configure(f, n_layer=1),
        f"{WHOLE}no place for transformer.h.1.",
    ),
    "surplus": (
        lambda f: change(f, score__weight=torch.ones(2, 32)),
        f"{WHOLE}no place for score.weight{AGAIN}",
    ),
    "a bias that is no mask": (
        lambda f: change(f, transformer__h__0__attn__masked_bias=torch.ones(32)),
        f"{WHOLE}no place for transformer.h.0.attn.masked_bias{AGAIN}",
    ),
    "another shape": (
        lambda f: change(f, transformer__ln_f__weight=torch.ones(31)),
        f"{WHOLE}in another shape: {LN} is [31], not [32]{AGAIN}",
    ),
    "a tied head of another shape": (
        lambda f: change(f, lm_head__weight=torch.ones(200, 32)),
        f"{WHOLE}in another shape: lm_head.weight is [200, 32], not [257, 32]{AGAIN}",
    ),
    "all at once": (
        lambda f: change(f, drop=(LN,), x=torch.ones(1), transformer__ln_f__bias=torch.ones(1)),
        f"{WHOLE}lacks {LN}; in another shape: transformer.ln_f.bias is "
        f"[1], not [32]; no place for x{AGAIN}",
    ),
    "twice": (
        lambda f: change(f, ln_f__weight=torch.zeros(32)),
        f"stores one parameter twice, as {LN} and as ln_f.weight: remove one of them",
    ),
    "partly wrapped": (
        lambda f: rename(f, lambda name: name if name == LN else f"_orig_mod.{name}"),
        "names some tensors behind a wrapper's prefix and others not (_orig_mod.transformer.h.0.",
    ),
    "differently wrapped": (
        lambda f: rename(f, lambda name: f"{'module' if name == LN else '_orig_mod'}.{name}"),
        "names some tensors behind a wrapper's prefix and others not (_orig_mod.transformer.h.0.",
    ),
    "wrapped within": (
        lambda f: rename(f, lambda name: name.replace("transformer.", "transformer._orig_mod.")),
        f"{WHOLE}lacks lm_head.weight, transformer.h.0.attn.c_attn.bias, "
        "transformer.h.0.attn.c_attn.weight and 26 more; no place for ",
    ),
    "wrapped and not whole": (
        lambda f: rename(f, lambda name: f"module.{name.replace('ln_f.weight', 'ln_f.gain')}"),
        f"{WHOLE}lacks {LN}; no place for transformer.ln_f.gain",
    ),
    "int8": (
        lambda f: change(f, transformer__ln_f__weight=torch.ones(32, dtype=torch.int8)),
        f"stores what is no unquantised parameter ({LN} is I8){NO_PARAMETERS}",
    ),
    "an int8 bias of attention": (
        lambda f: change(f, transformer__h__0__attn__c_attn__bias=torch.ones(96).char()),
        "stores what is no unquantised parameter (transformer.h.0.attn.c_attn.bias is",
    ),
    "fp8": (
        lambda f: change(
            f,
            transformer__wte__weight=torch.ones(257, 32).to(torch.float8_e4m3fn),
            transformer__wte__weight_scale_inv=torch.ones(1, 1),
        ),
        f"stores what is no unquantised parameter ({WTE} is F8_E4M3){NO_PARAMETERS}",
    ),
    "gptq": (
        lambda f: change(
            f,
            drop=("transformer.h.0.attn.c_attn.weight",),
            transformer__h__0__attn__c_attn__qweight=torch.ones(4, 96, dtype=torch.int32),
            transformer__h__0__attn__c_attn__qzeros=torch.ones(1, 12, dtype=torch.int32),
            transformer__h__0__attn__c_attn__scales=torch.ones(1, 96),
        ),
        "stores what is no unquantised parameter (transformer.h.0.attn.c_attn.qweight "
        "is I32, transformer.h.0.attn.c_attn.qzeros is I32)" + NO_PARAMETERS,
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_base_is_refused_for_its_tensors(
    case: str, gpt2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = TENSORS[case]
    spoil(gpt2)
    assert refusal(gpt2).startswith(reason)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_base_without_a_head_is_refused(kind: str, tmp_path: Path) -> None:
    model: nn.Module = getattr(transformers, kind)(tiny_llama().config)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert refusal(tmp_path).startswith(f"was saved as {kind} (architectures in config.json), and")
    configure(tmp_path, drop=("architectures",))
    holds = "" if kind == "LlamaModel" else ", and holds score.weight"
    assert refusal(tmp_path) == (
        f"has no language model's head (lm_head.weight is not stored{holds}): use a checkpoint "
        "that was saved as LlamaForCausalLM, not a backbone or a classifier; if its head is its "
        "embedding, set tie_word_embeddings to true in config.json"
    )


def test_a_lost_expert_is_named_as_transformers_joins_them(tmp_path: Path) -> None:
    tiny_glm_moe().save_pretrained(tmp_path)
    lost = "model.layers.1.mlp.experts.3.down_proj.weight"
    change(tmp_path, drop=(lost,))
    assert refusal(tmp_path).startswith(
        "is not a whole Glm4MoeForCausalLM as config.json describes it: in another shape: "
        "model.layers.1.mlp.experts.down_proj is [3, 32, 16], not [4, 32, 16]"
    )


def test_what_transformers_says_is_as_loud_afterwards_as_before(gpt2: Path) -> None:
    transformers_logging.set_verbosity_info()
    try:
        load_checkpoint(gpt2, torch.float32)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        configure(gpt2, n_layer=3)
        refusal(gpt2)
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity_warning()


def test_a_lack_of_memory_is_no_fault_of_the_checkpoint(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_checkpoint(gpt2, torch.float32)
