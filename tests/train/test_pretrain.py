from __future__ import annotations

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.digest import checkpoint_digest
from superpose_train.bundles import pretrain
from superpose_train.bundles.pretrain import Settings

TINY = Settings(
    vocabulary=280, layers=1, heads=2, width=16, context=16, batch_size=4, warmup_steps=3
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 300 passages of lines drawn from few words: something that a tiny model can learn."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "fly"]
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for document in range(4):
            lines = (" ".join(chance.choices(words, k=60)) for _ in range(2200))
            print(json.dumps({"title": str(document), "text": "\n".join(lines)}), file=file)
    return path


def run(corpus: Path, out: Path, tokens: int = 1280, **options: int) -> dict[str, object] | None:
    return pretrain.pretrain(corpus, out, TINY, tokens, checkpoint_steps=8, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "base"
    run(corpus, out)
    return out


def test_passages_are_whole_and_one_in_a_hundred_is_held_out(corpus: Path) -> None:
    training, held_out = pretrain.read_passages(corpus)
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        text = "\n".join(json.loads(line)["text"] for line in lines)
    assert sum(map(len, training + held_out)) == pytest.approx(len(text), rel=0.001)
    assert not set(training) & set(held_out)
    assert 0 < len(held_out) < 0.05 * len(training)
    assert all(passage in text for passage in held_out)


def test_result_loads_offline_as_a_base(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == model.config.n_positions == TINY.context
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == pretrain.END_OF_TEXT
    assert len(tokenizer) == model.config.vocab_size == 280
    text = "the cat — 漢字 🙂\n\n 12.5"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tensors = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    assert {"config.json", "generation_config.json"} <= {file.name for file in trained.iterdir()}


def test_record_states_what_was_measured(trained: Path, corpus: Path) -> None:
    record = json.loads((trained / "pretrain.json").read_text("utf-8"))
    assert record["tokens_seen"] == 1280 == record["steps"] * TINY.tokens_per_step
    assert record["validation_perplexity"] == pytest.approx(math.exp(record["validation_loss"]))
    # Better than a model that knows the vocabulary only.
    assert record["validation_loss"] < 0.98 * math.log(280)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    held_out = pretrain.pack(
        tokenizer.backend_tokenizer, pretrain.read_passages(corpus)[1], TINY.context
    )
    ids = torch.from_numpy(held_out.astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert record["validation_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_killed_run_goes_on_and_ends_the_same(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "base"
    assert run(corpus, out, stop_after_steps=5) is None
    assert not out.exists()
    assert run(corpus, out, stop_after_steps=6) is None
    assert run(corpus, out) is not None
    assert checkpoint_digest(out) == checkpoint_digest(trained)
    assert list(tmp_path.iterdir()) == [out]


def test_another_seed_is_another_model(trained: Path, corpus: Path, tmp_path: Path) -> None:
    pretrain.pretrain(corpus, tmp_path / "base", replace(TINY, seed=1), 64)
    assert checkpoint_digest(tmp_path / "base") != checkpoint_digest(trained)


def test_each_epoch_draws_every_block_once_in_its_own_order() -> None:
    blocks = np.arange(12, dtype=np.uint16).reshape(6, 2)
    settings = replace(TINY, batch_size=4)
    drawn = torch.cat([pretrain.batch_blocks(step, blocks, settings)[:, 0] for step in range(3)])
    first, second = drawn[:6].tolist(), drawn[6:].tolist()
    assert sorted(first) == sorted(second) == [0, 2, 4, 6, 8, 10]
    assert first != second


def test_schedule_warms_up_holds_and_decays() -> None:
    settings = replace(TINY, warmup_steps=10, decay_fraction=0.25)
    factors = [pretrain.learning_rate_factor(step, 100, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(factors[10:76]) == {1.0}
    assert factors[76:] == pytest.approx([(100 - i) / 25 for i in range(76, 100)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "15"], "--width 15 must be a multiple"),
        (["--vocabulary", "10"], "--vocabulary must lie between"),
        (["--context", "1"], "--context must be at least 2"),
        (["--corpus", "none.jsonl"], "No such file"),
        (["--corpus", "bad.jsonl"], 'bad.jsonl:2: expected a JSON object with a string "text"'),
        (["--corpus", "small.jsonl"], "too small"),
        (["--out", "taken"], "taken exists; name another --out"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("small.jsonl").write_text('{"text": "a few words"}\n', "utf-8")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"words": 1}\n', "utf-8")
    defaults = ["--corpus", "small.jsonl", "--out", "base", "--vocabulary", "300", "--layers", "1"]
    assert pretrain.main([*defaults, *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain: ")
    assert message in error
    assert not Path("base").exists()


def test_work_of_other_settings_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    run(corpus, out, stop_after_steps=1)
    with pytest.raises(ValueError, match=r"base\.work holds a run with another corpus or other"):
        pretrain.pretrain(corpus, out, replace(TINY, seed=5), 128)


def test_a_loss_that_is_not_finite_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    settings = replace(TINY, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(ValueError, match=r"not finite at step \d+; lower --learning-rate"):
        pretrain.pretrain(corpus, tmp_path / "base", settings, 1280, checkpoint_steps=4)
    assert not (tmp_path / "base").exists()
