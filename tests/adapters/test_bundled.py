from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.makers import load_peft
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import (
    MINI_DOMAINS,
    held_out,
    mini_adapters,
    mini_base,
    resolve_base,
)
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.qa import part_of, read_rows, split_key
from superpose_adapters.text_encoder import TextEncoder, vocabulary_of
from superpose_train.loss import evaluate_loss

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(mini_base())


def test_base_is_small_half_precision_and_tied() -> None:
    file = mini_base() / "model.safetensors"
    assert file.stat().st_size <= 14 * MEGABYTE
    with safe_open(file, "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert "lm_head.weight" not in names


def test_tokenizer_is_fast_and_loses_nothing(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(mini_base())
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.config.bos_token_id
    assert len(tokenizer) == model.config.vocab_size
    for text in ("Hello world", " two  spaces\n\n", "naïve 12.5 % — 漢字 🙂", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("domain", MINI_DOMAINS)
def test_adapter_fits_the_base_and_names_no_machine(domain: str) -> None:
    folder = mini_adapters()[domain]
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    assert (folder / "adapter_model.safetensors").stat().st_size < MEGABYTE
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "mini"
    record = json.loads((folder / "training.json").read_text("utf-8"))
    assert record["base_digest"] == checkpoint_digest(mini_base())


def test_held_out_rows_are_of_the_test_part() -> None:
    for domain in MINI_DOMAINS:
        rows = read_rows(held_out(domain))
        assert 24 <= len(rows) <= 60
        assert {part_of(row.question) for row in rows} == {"test"}
        assert len({split_key(row.question) for row in rows}) == len(rows)


@pytest.mark.parametrize("domain", MINI_DOMAINS)
def test_each_adapter_lowers_the_perplexity_of_its_domain(domain: str, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(mini_base(), dtype=torch.float32)
    encoder = TextEncoder(tokenizer, vocabulary_of(model))
    rows = [encoder.row(row.question, row.answer, 128) for row in read_rows(held_out(domain))]
    before = evaluate_loss(model, rows, 0, 16).perplexity
    after = evaluate_loss(load_peft(model, mini_adapters()[domain]), rows, 0, 16).perplexity
    assert after < 0.8 * before


def test_base_resolves(tmp_path: Path) -> None:
    assert resolve_base("mini") == mini_base()
    assert resolve_base(str(mini_base())) == mini_base()
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        resolve_base(str(tmp_path))
    with pytest.raises(ValueError, match="no bundled domain 'law'; there are math"):
        held_out("law")


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
    with pytest.raises(ValueError, match=r"base owner/name: .*use mini, a folder, or an id"):
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
