from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import shapes
from benchmarks.shapes import SIZES, VOCABULARY, Group, adapter_folder, base_folder, prompts
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import DEFAULT_LIMITS, read_adapter


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_tiny_base_loads_and_its_greedy_texts_vary(tiny: Path) -> None:
    model = load(tiny)
    ids = torch.tensor(prompts(tiny, 1, 8))
    mask = torch.ones_like(ids)
    text = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 8:].tolist()
    assert len(set(text)) > 4


@pytest.mark.parametrize(
    ("size", "parameters"), [("small", 124.4e6), ("medium", 354.8e6), ("large", 774.0e6)]
)
def test_the_sizes_are_those_of_gpt2(size: str, parameters: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(**SIZES[size]))
    assert model.num_parameters() == pytest.approx(parameters, rel=1e-3)


def test_every_token_has_text_and_text_comes_back(tiny: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.eos_token_id == VOCABULARY - 1
    assert all(tokenizer.batch_decode([[token] for token in range(VOCABULARY)]))
    text = "Question: What is glaucoma ?\nAnswer: été"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)


def test_the_same_seed_makes_the_same_base(tiny: Path, tmp_path: Path) -> None:
    assert checkpoint_digest(base_folder("tiny", tmp_path)) == checkpoint_digest(tiny)


def test_the_server_reads_the_adapters(tiny: Path, adapters: Path) -> None:
    layout = read_layout(load(tiny))
    read = {
        folder.name: read_adapter(folder, layout, DEFAULT_LIMITS, root=adapters)
        for folder in sorted(adapters.iterdir())
    }
    assert {name: adapter.rank for name, adapter in read.items()} == {
        "domain-000": 4,
        "domain-001": 4,
        "domain-002": 4,
        "wide-000": 8,
    }
    assert len({adapter.digest for adapter in read.values()}) == 4
    # c_attn and both c_proj of two layers.
    assert {len(adapter.modules) for adapter in read.values()} == {6}


def test_peft_reads_the_adapters_and_their_deltas_have_their_size(
    tiny: Path, adapters: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        wrapped: Any = PeftModel.from_pretrained(load(tiny), adapters / "domain-001")
    adapted = [module for module in wrapped.modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 6
    for module in adapted:
        base = module.get_base_layer().weight
        size = module.get_delta_weight("default").norm() / base.norm()
        assert float(size) == pytest.approx(shapes._DELTA_SIZE, rel=0.25)


def test_a_base_of_another_family_gets_adapters_for_all_its_layers(tmp_path: Path) -> None:
    from tests.makers import save_base, tiny_llama

    base = save_base(tiny_llama(), tmp_path / "llama")
    folder = adapter_folder(base, tmp_path / "cache", [Group(1)])
    adapter = read_adapter(folder / "domain-000", read_layout(load(base)), DEFAULT_LIMITS)
    assert len(adapter.modules) == 2 * 7
    assert "lm_head" not in adapter.modules


def test_what_was_made_is_not_made_again(
    cache: Path, tiny: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "_whole", None)
    assert base_folder("tiny", cache) == tiny
    groups = [Group(3), Group(1, rank=8, prefix="wide")]
    assert adapter_folder(tiny, cache, groups) == adapters


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, size: object) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_write_base", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base_folder("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prompts_differ_and_are_the_same_for_the_same_seed(tiny: Path) -> None:
    made = prompts(tiny, 4, 16)
    assert made == prompts(tiny, 4, 16) != prompts(tiny, 4, 16, seed=1)
    assert len({tuple(prompt) for prompt in made}) == 4
    assert {len(prompt) for prompt in made} == {16}
    assert all(0 <= token < VOCABULARY - 1 for prompt in made for token in prompt)
