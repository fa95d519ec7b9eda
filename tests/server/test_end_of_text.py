"""A text ends where transformers ends it, or where the tokenizer says that it ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import EOS_ID, save_base, tiny_gpt2, tiny_tokenizer
from tests.server.helpers import Bench
from transformers import AutoModelForCausalLM

from superpose_adapters.base.tokenizer import TokenizerError
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import FinishReason
from superpose_server.engine.tokenizer import Tokenizer

PROMPT = [1, 2, 3, 4, 5]
ENDING = SamplingParams(max_new_tokens=16, temperature=0)


def rewrite(path: Path, **fields: Any) -> None:
    """Change a JSON file; None takes a field away."""
    settings = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tiny_gpt2(), tmp_path / "base")


def greedy(base: Path, count: int = 16) -> list[int]:
    """The tokens that transformers' generate adds, as the base's own files say when it ends."""
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)
    text = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    added: list[int] = text[0, len(PROMPT) :].tolist()
    return added


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", ["one", "list"])
def test_a_text_ends_where_transformers_ends_it(base: Path, where: str, kind: str) -> None:
    whole = greedy(base)
    end = max(whole, key=whole.index)  # what comes first last
    assert 0 < whole.index(end) < len(whole) - 1
    rewrite(base / "generation_config.json", eos_token_id=None)
    if where == "config.json":
        (base / "generation_config.json").unlink()
    rewrite(base / where, eos_token_id=end if kind == "one" else [EOS_ID, end])
    bench = Bench(base)
    _, client = bench.submit(PROMPT, bench.mix(), ENDING)
    _, ignoring = bench.submit(PROMPT, bench.mix(), replace(ENDING, ignore_eos=True))
    _, least = bench.submit(PROMPT, bench.mix(), replace(ENDING, min_new_tokens=16))
    bench.run()
    assert client.tokens == greedy(base)
    assert client.tokens == whole[: whole.index(end) + 1]
    assert client.reason is FinishReason.STOP
    assert ignoring.tokens == whole
    assert end not in least.tokens


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ([3, 5], 7, {3, 5, EOS_ID}),  # as transformers: config.json is not asked
        (None, 7, {EOS_ID}),
        ("none", [7, 8], {7, 8, EOS_ID}),
        (-1, 7, {EOS_ID}),  # how some say that there is none
        ([], 7, {EOS_ID}),
    ],
)
def test_the_tokenizers_own_end_counts_besides(
    base: Path, generation: Any, config: Any, ends: set[int]
) -> None:
    rewrite(base / "config.json", eos_token_id=config)
    if generation == "none":
        (base / "generation_config.json").unlink()
    else:
        rewrite(base / "generation_config.json", eos_token_id=generation)
    assert Tokenizer(base).ends == ends


def test_a_tokenizer_without_an_end_takes_the_files(base: Path) -> None:
    rewrite(base / "tokenizer_config.json", eos_token=None)
    rewrite(base / "generation_config.json", eos_token_id=[3, 5])
    assert Tokenizer(base).ends == {3, 5}


@pytest.mark.parametrize("named", ["</s>", [3, "x"], [[3]], True, 2.5, {"id": 3}])
def test_what_is_no_token_is_refused(base: Path, named: Any) -> None:
    rewrite(base / "generation_config.json", eos_token_id=named)
    with pytest.raises(TokenizerError, match=r"generation_config.json whose eos_token_id is "):
        Tokenizer(base)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_file_that_is_no_object_is_refused(base: Path, text: str) -> None:
    (base / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TokenizerError, match=r"generation_config.json that is no JSON object"):
        Tokenizer(base)


def test_an_end_without_logits_disturbs_nobody(base: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end of turn|>"})  # the model is not resized
    tokenizer.save_pretrained(base)
    bench = Bench(base)
    assert bench.tokenizer.ends == {EOS_ID, EOS_ID + 1}
    _, least = bench.submit(PROMPT, bench.mix(), replace(ENDING, min_new_tokens=4))
    _, other = bench.submit(PROMPT, bench.mix())
    bench.run()
    assert len(least.tokens) >= 4
    assert other.tokens == bench.alone(PROMPT, bench.mix())
