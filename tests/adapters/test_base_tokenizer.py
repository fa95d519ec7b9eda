"""A base's tokenizer is there with its vocabulary, or is refused with the names of its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.makers import save_base, tiny_gpt2, tiny_tokenizer
from transformers import AutoTokenizer

from superpose_adapters.base.tokenizer import TokenizerError, load_tokenizer
from superpose_train.model import load_base

# With and without words that transformers' class knows by itself, such as the languages of MBart.
MODEL_TYPES = ["gpt2", "llama", "gemma2", "mbart", "qwen2", "opt", "bert", "ctrl"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("added", [False, True], ids=["nothing", "added tokens"])
def test_a_folder_without_a_vocabulary_is_refused_with_the_names_of_the_files(
    tmp_path: Path, model_type: str, added: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if added:  # as hubs have them, in a file that lies beside the vocabulary
        tokens = ("<|im_end|>", "<tool_call>", "</tool_call>")
        entries = {
            str(1000 + i): {"content": token, "special": i == 0} for i, token in enumerate(tokens)
        }
        settings = {"added_tokens_decoder": entries}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        "has no tokenizer.json, and no other tokenizer that can be used: copy tokenizer.json and "
        "tokenizer_config.json there from where the base came from"
    )


def test_a_vocabulary_without_a_tokenizer_json_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tiny_tokenizer().backend_tokenizer.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "merges.txt", "vocab.json")
    ]
    text = "naïve 日本"
    loaded, known = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == known(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_trainer_refuses_it_in_the_same_words(tmp_path: Path) -> None:
    base = save_base(tiny_gpt2(), tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"^base mine has no tokenizer.json, and no other .*: copy"
    ):
        load_base("mine", base)
