from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from tests.makers import VOCABULARY, save_base, tiny_gpt2, tiny_tokenizer

from superpose_adapters.base.packaged import PackagedBase
from superpose_adapters.bundled import Bundle
from superpose_adapters.qa import part_of, read_rows, split_key
from superpose_adapters.text_encoder import TextEncoder
from superpose_train.bundles import make_bundle
from superpose_train.options import Options
from superpose_train.train import train

ENCODER = TextEncoder(tiny_tokenizer(), VOCABULARY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in make_bundle.DATA_FILES.values():
        rows = [
            {"question": f"{name[:3]} {word}{number}?", "answer": word}
            for word in (f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
            for number in (1, 2)
        ]
        path = folder / name.removesuffix(".gz")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def test_held_out_rows_are_of_the_test_part_and_no_twins(data: Path) -> None:
    rows = make_bundle.held_out_rows(data / "math.jsonl", ENCODER)
    assert {part_of(row.question) for row in rows} == {"test"}
    assert len({split_key(row.question) for row in rows}) == len(rows) > 5


def test_long_rows_are_left_out(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_bundle, "HELD_OUT_TOKENS", 3)
    assert make_bundle.held_out_rows(data / "math.jsonl", ENCODER) == []


@pytest.mark.parametrize(
    ("name", "precision", "stored"),
    [("mini", "float32", torch.float32), ("smollm2", "bfloat16", torch.float16)],
)
def test_what_is_missing_is_made_and_measured(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    precision: str,
    stored: torch.dtype,
) -> None:
    plain = {domain: name.removesuffix(".gz") for domain, name in make_bundle.DATA_FILES.items()}
    monkeypatch.setattr(make_bundle, "DATA_FILES", plain)

    def quick(options: Options) -> dict[str, object]:
        assert options.label == name
        # As the bundled adapters were made, whatever processor makes them again.
        assert options.precision == precision
        fast = {"max_rows": 32, "max_eval_rows": 4, "max_length": 24, "epochs": 1}
        return train(Options(**(vars(options) | fast)))

    monkeypatch.setattr(make_bundle, "train", quick)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    base = save_base(tiny_gpt2(), tmp_path / "base", tokenizer)
    packaged = None if name == "mini" else SimpleNamespace(folder=lambda: base)
    bundle = Bundle(name, cast(PackagedBase | None, packaged))
    figures = make_bundle.make_bundle(bundle, data, None, tmp_path)
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == figures
    matrix = figures["held_out_perplexity"]
    assert set(matrix) == {"math", "medicine", "finance"}
    for domain, row in matrix.items():
        assert list(row) == ["base", "math", "medicine", "finance"]
        assert row[domain] < row["base"]
        assert figures["held_out_answer_perplexity"][domain]["base"] != row["base"]
        assert read_rows(tmp_path / "held_out" / f"{domain}.jsonl")
        factors = load_file(tmp_path / "adapters" / domain / "adapter_model.safetensors")
        assert {factor.dtype for factor in factors.values()} == {stored}
    monkeypatch.delattr(make_bundle, "train")
    assert make_bundle.make_bundle(bundle, data, None, tmp_path) == figures


def test_a_missing_corpus_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_bundle.main(["mini", "--data", str(data), "--out", str(tmp_path)]) == 1
    assert "name the pretraining text with --corpus" in capsys.readouterr().err


def test_the_data_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SUPERPOSE_DATA", raising=False)
    with pytest.raises(SystemExit):
        make_bundle.main(["mini", "--out", str(tmp_path)])
    monkeypatch.setenv("SUPERPOSE_DATA", str(tmp_path))
    assert make_bundle.main(["mini", "--out", str(tmp_path)]) == 1
