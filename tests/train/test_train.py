from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from tests.full_disk import files_of_at_most
from tests.makers import (
    VOCABULARY,
    load_peft,
    save_base,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    tokenizer_adding,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.qa import file_sha256, part_of, read_rows, split_rows
from superpose_adapters.text_encoder import TextEncoder
from superpose_train import train as trainer_module
from superpose_train.cli import main
from superpose_train.data import is_hub_id
from superpose_train.frozen_a import orthogonal_block
from superpose_train.loss import evaluate_loss
from superpose_train.model import (
    attach_adapter,
    choose_targets,
    load_base,
)
from superpose_train.options import Options, base_label
from superpose_train.precision import trained_precision
from superpose_train.record import finished_record, write_adapter, writing
from superpose_train.schedule import Plan, learning_rates
from superpose_train.train import last_checkpoint, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_gpt2(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of 60 rows each; answers follow a pattern that a few steps can learn."""
    folder = tmp_path_factory.mktemp("data")
    paths = (folder / "one.jsonl", folder / "two.jsonl")
    for path, word in zip(paths, ("aaaa", "zzzz"), strict=True):
        rows = [
            {"question": f"{word} {chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": word * 3}
            for i in range(60)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


def options(base: Path, data: Path | tuple[Path, ...], out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "base": str(base),
        "data": data if isinstance(data, tuple) else (data,),
        "name": "letters",
        "out": out,
        "max_length": 40,
        "batch_size": 8,
        "epochs": 4,
        "learning_rate": 3e-3,
        "dropout": 0.1,
        "device": "cpu",
        "precision": "float32",
    }
    return Options(**(values | changes))


def peft_loss(
    base: Path, data: Path, folder: Path, prompt: str = "Question: {}\nAnswer:", first: int = 1
) -> tuple[float, int]:
    """PEFT's reading of a folder, scored in float32 by transformers' own loss: (mean nats, tokens).

    Args:
        base: With its tokenizer of one token a byte.
        data: Of whose rows the test part is scored.
        folder: The adapter.
        prompt: What precedes an answer.
        first: Token that is scored first; 0: the answer's first.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_peft(tiny_gpt2(), folder)
    nats, tokens = 0.0, 0
    for row in split_rows(read_rows(data)).test:
        question = prompt.format(row.question)
        ids = [*tokenizer(f"{question} {row.answer}")["input_ids"], tokenizer.eos_token_id][:40]
        start = first or len(question)
        labels = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        nats, tokens = nats + loss * (len(ids) - start), tokens + len(ids) - start
    return nats / tokens, tokens


@pytest.fixture(scope="module")
def trained(
    base: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "letters"
    return out, train(options(base, data[0], out))


def test_result_is_a_peft_folder_that_peft_loads(
    trained: tuple[Path, dict[str, Any]], base: Path, data: tuple[Path, Path]
) -> None:
    out, record = trained
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    config = PeftConfig.from_pretrained(out)
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (4, 64, True)
    assert config.target_modules == {"c_attn", "c_proj"}
    assert config.base_model_name_or_path == "tiny"

    loss, tokens = peft_loss(base, data[0], out)
    assert record["adapter_figures"]["test"]["tokens"] == tokens
    assert record["adapter_figures"]["test"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_bfloat16_by_name_trains_on_any_processor_and_is_measured_in_float32(
    trained: tuple[Path, dict[str, Any]], base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out, expected = tmp_path / "letters", trained[1]
    record = train(options(base, data[0], out, precision="bfloat16"))
    for (_, loss), (_, other) in zip(
        expected["history"]["training"], record["history"]["training"], strict=True
    ):
        assert other != loss
        assert other == pytest.approx(loss, rel=0.02)
    loss, _ = peft_loss(base, data[0], out)
    assert record["adapter_figures"]["test"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert record["base_figures"] == expected["base_figures"]
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_where_that_is_fast(
    fast: bool,
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    ran = "bfloat16" if fast else "float32"
    asked = ("auto", ran)
    records = [
        train(options(base, data[0], tmp_path / each, precision=each, max_steps=3))
        for each in asked
    ]
    assert [record["precision_asked"] for record in records] == list(asked)
    assert [record["parameters"]["precision"] for record in records] == [ran, ran]
    one, two = (load_file(tmp_path / each / "adapter_model.safetensors") for each in asked)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("bf16_autocast", "ran"), [(True, "bfloat16"), (False, "float32")])
def test_a_record_from_before_precision_is_read(
    bf16_autocast: bool, ran: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    record = json.loads((trained[0] / "training.json").read_text("utf-8"))
    identity = {
        name: record[name] for name in ("base_digest", "data", "parameters", "orthogonal_to")
    }
    identity["parameters"] = identity["parameters"] | {"precision": ran}
    del record["precision_asked"], record["parameters"]["precision"]
    record["parameters"]["frozen_a_block"] = record["parameters"].pop("frozen_a")
    for later in ("sparsity", "orthogonality", "norm_penalty"):
        del record["parameters"][later]
    del record["orthogonal_to"]
    record["bf16_autocast"] = bf16_autocast
    (tmp_path / "training.json").write_text(json.dumps(record), "utf-8")
    assert trained_precision(record) == ran
    assert finished_record(tmp_path, identity) is not None
    identity["parameters"]["precision"] = "float32" if bf16_autocast else "bfloat16"
    with pytest.raises(ValueError, match="is not the result of this run"):
        finished_record(tmp_path, identity)


def test_record_says_what_was_done(
    trained: tuple[Path, dict[str, Any]], base: Path, data: tuple[Path, Path]
) -> None:
    out, record = trained
    assert json.loads((out / "training.json").read_text("utf-8")) == record
    assert record["base_digest"] == checkpoint_digest(base)
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for row in read_rows(data[0]):
        counts[part_of(row.question)] += 1
    assert record["data"] == [{"name": "one.jsonl", "sha256": file_sha256(data[0]), "rows": counts}]
    assert record["parameters"]["target_modules"] == ["c_attn", "c_proj"]
    assert record["parameters"]["seed"] == record["parameters"]["init_seed"] == 0
    for part in ("validation", "test"):
        before = record["base_figures"][part]["perplexity"]
        assert record["adapter_figures"][part]["perplexity"] < 0.7 * before
    assert not any(str(out.parent) in file.read_text("latin-1") for file in out.iterdir())


def test_an_interrupted_run_goes_on_and_ends_the_same(
    trained: tuple[Path, dict[str, Any]],
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "letters"
    evaluate = trainer_module.AdapterTrainer.evaluate
    calls = 0

    def interrupted(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options(base, data[0], out))
    assert not out.exists()
    work = tmp_path / ".letters.work"
    whole = last_checkpoint(work)
    assert whole is not None
    # A checkpoint that a kill cut short has no readable state.
    torn = work / "checkpoint-999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_st', "utf-8")
    assert last_checkpoint(work) == whole

    with pytest.raises(ValueError, match="holds an interrupted run with other data"):
        train(options(base, data[0], out, rank=2))
    record = train(options(base, data[0], out))
    assert record["resumed"]
    expected, result = (
        load_file(folder / "adapter_model.safetensors") for folder in (trained[0], out)
    )
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    assert record["adapter_figures"] == trained[1]["adapter_figures"]
    assert not work.exists()


def test_a_frozen_a_stays_frozen_when_a_run_is_taken_up_again(
    base: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(folder: str, block: int) -> Options:
        return options(
            base, data[0], tmp_path / folder, max_steps=8, dropout=0.0, frozen_a=(block, 8)
        )

    expected = train(frozen("whole", 1))
    evaluate = trainer_module.AdapterTrainer.evaluate

    def interrupted(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(frozen("killed", 1))
    record = train(frozen("killed", 1))
    assert record["resumed"]
    assert record["trained_parameters"] == expected["trained_parameters"]
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)

    # Another block: the cosine of the deltas is 0 by construction, whatever the data taught them.
    train(frozen("second", 8))
    two = load_file(tmp_path / "second" / "adapter_model.safetensors")
    for name in one:
        if ".lora_A." in name:
            first, second = (
                (tensors[name.replace("lora_A", "lora_B")] @ tensors[name]).double().flatten()
                for tensors in (one, two)
            )
            assert abs(torch.dot(first, second) / (first.norm() * second.norm())) < 1e-6


def test_seeds_are_apart(base: Path, data: tuple[Path, Path]) -> None:
    def factors(**seeds: int) -> dict[str, torch.Tensor]:
        model = attach_adapter(
            tiny_gpt2(), options(base, data[0], Path("unused"), **seeds), ["c_attn"]
        )
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], two[name]) for name in one)

    assert equal(factors(seed=1, init_seed=7), factors(seed=2, init_seed=7))
    assert equal(factors(seed=7), factors(seed=2, init_seed=7))
    assert not equal(factors(seed=1, init_seed=7), factors(seed=1, init_seed=8))


def test_joint_training_lowers_both_and_takes_rows_of_each(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    record = train(options(base, data, tmp_path / "both", max_rows=30, max_eval_rows=4, epochs=3))
    assert [file["rows"]["train"] for file in record["data"]] == [30, 30]
    assert [file["name"] for file in record["data"]] == ["one.jsonl", "two.jsonl"]
    encoder = TextEncoder(AutoTokenizer.from_pretrained(base), VOCABULARY)
    model = load_peft(tiny_gpt2(), tmp_path / "both")
    for path in data:
        rows = [encoder.row(row.question, row.answer, 40) for row in read_rows(path)]
        after = evaluate_loss(model, rows, 0, 16).mean
        assert after < 0.9 * evaluate_loss(tiny_gpt2(), rows, 0, 16).mean


def test_llama_trains_all_its_projections(data: tuple[Path, Path], tmp_path: Path) -> None:
    folder = save_base(tiny_llama(), tmp_path / "llama")
    record = train(options(folder, data[0], tmp_path / "out", epochs=0.5))
    assert len(record["parameters"]["target_modules"]) == 7
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert config.fan_in_fan_out is False
    load_peft(tiny_llama(), tmp_path / "out")


def test_evaluation_ignores_padding_and_batching(base: Path, data: tuple[Path, Path]) -> None:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(base), VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = [
        encoder.row(row.question, row.answer * (1 + i % 3), 60)
        for i, row in enumerate(read_rows(data[0])[:12])
    ]
    alone = evaluate_loss(model, rows, 0, 1)
    together = evaluate_loss(model, rows, 99, 5)
    assert together.tokens == alone.tokens == sum(len(row.ids) - 1 for row in rows)
    assert together.nats == pytest.approx(alone.nats, rel=1e-5)


def test_a_loss_that_is_not_finite_is_refused(
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "bad"
    code = main(command(base, data[0], out, "--learning-rate", "1e30", "--epochs", "4"))
    assert code == 1
    assert "not finite at step" in last_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
        ("linear", lambda share: 1 - share),
        ("constant", lambda share: 1.0),
    ],
)
def test_the_schedule_is_laid_out_over_max_steps(
    schedule: Any, shape: Any, base: Path, data: tuple[Path, Path]
) -> None:
    chosen = options(base, data[0], Path("unused"), max_steps=100, schedule=schedule)
    plan = Plan.of(chosen, rows=48)
    assert plan == Plan(steps=100, warmup=5, every=13, logging=3)
    assert Plan.of(replace(chosen, max_steps=None, epochs=2.5), rows=49).steps == 18
    rate = learning_rates(chosen, plan)
    for step in range(100):
        factor = step / 5 if step < 5 else shape((step - 5) / 95)
        assert rate(step) == pytest.approx(3e-3 * factor, abs=1e-12)


def test_max_rows_may_differ_by_source_and_max_steps_ends_the_run(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    record = train(options(base, data, tmp_path / "both", max_rows=(10, 24), max_steps=3))
    assert [file["rows"]["train"] for file in record["data"]] == [10, 24]
    assert record["steps"] == 3
    assert record["parameters"]["max_rows"] == [10, 24]


def test_loss_on_the_answer_alone_in_another_template(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"template": "{q} -> {a}", "loss_scope": "answer", "max_steps": 4}
    record = train(options(base, data[0], tmp_path / "out", **changes))
    loss, tokens = peft_loss(base, data[0], tmp_path / "out", "{} ->", first=0)
    figures = record["adapter_figures"]["test"]
    assert figures["tokens"] == tokens
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)


def test_rows_begin_as_the_bases_tokenizer_begins_a_text(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Losses of the base against transformers' own of `tokenizer(text)` and of the bare text."""
    model, tokenizer = tiny_gpt2(vocab_size=VOCABULARY + 1), tokenizer_adding("<s>")
    base = save_base(model, tmp_path / "base", tokenizer)
    for special_tokens, before in ((True, ["<s>"]), (False, [])):
        out = tmp_path / f"{special_tokens}"
        record = train(options(base, data[0], out, special_tokens=special_tokens, max_steps=1))
        assert record["special_tokens"] == before
        nats, tokens = 0.0, 0
        for row in split_rows(read_rows(data[0])).test:
            text = f"Question: {row.question}\nAnswer: {row.answer}"
            encoded = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
            ids = torch.tensor([[*encoded, tokenizer.eos_token_id][:40]])
            with torch.no_grad():
                nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        figures = record["base_figures"]["test"]
        assert figures["tokens"] == tokens
        assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_a_result_of_other_special_tokens_is_another(tmp_path: Path) -> None:
    """A record from before they were told is one of rows that began with none."""
    parameters = {"precision": "float32"}
    identity = {"base_digest": "b", "parameters": parameters, "special_tokens": list[str]()}
    out = tmp_path / "law"
    out.mkdir()
    (out / "training.json").write_text(json.dumps({"base_digest": "b", "parameters": parameters}))
    assert finished_record(out, identity) is not None
    with pytest.raises(ValueError, match="is not the result of this run"):
        finished_record(out, identity | {"special_tokens": ["<s>"]})


def test_a_row_with_a_token_that_the_base_lacks_is_named(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    base = save_base(tiny_gpt2(), tmp_path / "base", tokenizer)
    path = tmp_path / "rows.jsonl"
    lines = data[0].read_text("utf-8").splitlines()
    lines[7] = json.dumps({"question": "it is [PAD]", "answer": "so"})
    path.write_text("\n".join(lines), "utf-8")
    assert main(command(base, path, tmp_path / "out", "--max-steps", "1")) == 1
    assert "rows.jsonl: the row with the question 'it is [PAD]' holds token 257" in last_line(
        capsys
    )


def test_a_byte_order_mark_is_no_part_of_the_rows(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + data[0].read_bytes())
    assert read_rows(marked) == read_rows(data[0])
    assert main(command(base, marked, tmp_path / "out", "--max-steps", "1")) == 0


def test_rows_whose_question_fills_the_length_are_left_out_and_counted(
    base: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"question": f"{chr(97 + i % 26)}{chr(97 + i // 26)}" * (1 if i % 3 else 30), "answer": "a"}
        for i in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    chosen = options(base, path, tmp_path / "out", loss_scope="answer", max_length=30, max_steps=1)
    record = train(chosen)
    [file] = record["data"]
    short = [row for row in split_rows(read_rows(path)).train if len(row.question) < 3]
    assert file["rows"]["train"] == len(short)
    assert sum(file["rows"].values()) + sum(file["rows_without_answer"].values()) == 90
    with pytest.raises(ValueError, match="begins within --max-length 10 tokens"):
        train(replace(chosen, max_length=10, out=tmp_path / "none"))


def test_columns_may_have_other_names(base: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "renamed.jsonl"
    lines = (json.loads(line) for line in data[0].read_text("utf-8").splitlines())
    renamed = [{"instruction": row["question"], "output": row["answer"]} for row in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed), "utf-8")
    columns = {"question_column": "instruction", "answer_column": "output"}
    record = train(options(base, path, tmp_path / "renamed", max_steps=2, **columns))
    same = train(options(base, data[0], tmp_path / "plain", max_steps=2))
    assert record["adapter_figures"] == same["adapter_figures"]
    with pytest.raises(ValueError, match='"question" is missing; the columns are instruction, out'):
        train(options(base, path, tmp_path / "none"))


def test_a_hub_dataset_is_all_its_parts(
    base: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []
    rows = [{"q": row.question, "a": row.answer, "id": 1} for row in read_rows(data[0])]

    def load_dataset(name: str, configuration: str | None) -> dict[str, list[dict[str, Any]]]:
        asked.append((name, configuration))
        return {"train": rows[:40], "test": rows[40:]}

    stand_in: Any = ModuleType("datasets")
    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    columns = {"question_column": "q", "answer_column": "a", "max_steps": 2}
    sources: Any = ("owner/some-set:main",)
    record = train(options(base, sources, tmp_path / "hub", **columns))
    assert asked == [("owner/some-set", "main")]
    same = train(options(base, data[0], tmp_path / "file", max_steps=2))
    assert record["adapter_figures"] == same["adapter_figures"]
    [described] = record["data"]
    assert described["name"] == "owner/some-set:main"
    assert described["rows"] == same["data"][0]["rows"]
    with pytest.raises(ValueError, match='row 0: "question" is missing; the columns are a, id, q'):
        train(options(base, sources, tmp_path / "none"))

    def unreachable(name: str, configuration: str | None) -> None:
        raise ConnectionError("no network\nat all")

    stand_in.load_dataset = unreachable
    with pytest.raises(ValueError, match=r"set:main cannot be loaded from the Hub: no network$"):
        train(options(base, sources, tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'superpose\[hub\]'"):
        train(options(base, sources, tmp_path / "none"))


def test_files_and_hub_ids_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/plain").write_text("", "utf-8")
    for name, hub in {
        "owner/name": True,
        "owner/name:a-configuration": True,
        "folder/plain": False,
        "data/rows.jsonl": False,
        "data/rows.jsonl.gz": False,
        "rows": False,
        "/absolute/name": False,
    }.items():
        assert is_hub_id(name) is hub
    assert not is_hub_id(Path("owner/name"))


def test_blocks_of_a_are_orthogonal_and_as_long_as_fresh_rows() -> None:
    def block(index: int, blocks: int = 8, **changes: Any) -> torch.Tensor:
        values: dict[str, Any] = {"seed": 1, "module": "h.0.c", "in_features": 64, "rank": 4}
        return orthogonal_block(**(values | changes), block=index, blocks=blocks).double()

    whole = torch.cat([block(index) for index in range(1, 9)])
    torch.testing.assert_close(
        whole @ whole.T, torch.eye(32, dtype=torch.float64) / 3, rtol=0, atol=1e-7
    )
    fresh = torch.nn.Linear(64, 2000).weight  # kaiming_uniform(a=sqrt 5), as PEFT's
    assert fresh.square().sum(1).mean().item() == pytest.approx(1 / 3, rel=0.02)
    torch.testing.assert_close(block(2, blocks=3), block(2))
    assert (block(1) @ block(1, module="h.1.c").T).abs().max() > 1e-3
    assert (block(1) @ block(1, seed=2).T).abs().max() > 1e-3
    with pytest.raises(ValueError, match="17 blocks of --rank 4 do not fit into the 64 inputs"):
        block(1, blocks=17)


def test_a_follows_from_the_init_seed_alone(base: Path, data: tuple[Path, Path]) -> None:
    def first(**changes: Any) -> dict[str, torch.Tensor]:
        chosen = options(base, data[0], Path("unused"), frozen_a=(1, 2), **changes)
        model = attach_adapter(tiny_gpt2(), chosen, ["c_attn"])
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora_A." in n)
        return {n: p for n, p in model.named_parameters() if ".lora_A." in n}

    one, other = first(seed=1, init_seed=3), first(seed=2, init_seed=3, name="other")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_bases_own_dropout_is_off(tmp_path: Path) -> None:
    folder = save_base(tiny_gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), tmp_path / "b")
    model, _ = load_base(str(folder), folder)
    model.train()
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_full_disk_leaves_no_result(
    base: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that cannot be written whole; the same command goes on when there is room."""
    out = tmp_path / "out"
    with files_of_at_most(4000):
        assert main(command(base, data[0], out, "--max-steps", "2")) == 1
    work = tmp_path / ".out.work"
    assert last_line(capsys) == f"superpose-train: {work}: cannot be written: File too large"
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert main(command(base, data[0], out, "--max-steps", "2")) == 0


def test_a_result_that_does_not_fit_on_the_disk_is_not_there(tmp_path: Path) -> None:
    tensors = {"base_model.model.c.lora_A.weight": torch.zeros(4, 1000)}
    # Its tensors, and then its config, are too large.
    for size, rows in ((4000, 4), (20, 0)):
        with files_of_at_most(size), pytest.raises(OSError, match="out: cannot be written"):
            write_adapter(
                {n: t[:rows] for n, t in tensors.items()}, LoraConfig(), "", {}, tmp_path / "out"
            )
    assert not list(tmp_path.iterdir())


def test_a_result_that_could_not_be_written_is_written_by_the_same_command(
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full when all is trained: the last checkpoint is gone on from."""

    def full(*arguments: Any) -> None:
        with files_of_at_most(2000):
            write_adapter(*arguments)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_adapter", full)
        assert main(command(base, data[0], out, "--max-steps", "2")) == 1
    assert f"{out}: cannot be written" in last_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == [".out.work"]
    assert main(command(base, data[0], out, "--max-steps", "2")) == 0
    record = json.loads((out / "training.json").read_text("utf-8"))
    assert record["resumed"] is True
    # The end of the run is not the end of an epoch.
    assert record["steps"] == 2 < record["data"][0]["rows"]["train"] / 16


def test_what_is_no_failed_write_is_not_called_one(tmp_path: Path) -> None:
    for error in (RuntimeError("CUDA error: out of memory"), FileNotFoundError(2, "no", "gone")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def test_two_processes_train_what_one_does(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": f"{chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": "aa"} for i in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    more = ("--max-steps", "4", "--max-rows", "32", "--batch-size", "8", "--rank", "2")
    assert main(command(base, path, tmp_path / "one", *more)) == 0
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "superpose_train.cli"),
            *command(base, path, tmp_path / "two", *more),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("wrote ") == 1
    one, two = (
        json.loads((tmp_path / name / "training.json").read_text("utf-8"))
        for name in ("one", "two")
    )
    assert two["processes"] == 2
    # Each process takes half of every batch, and the loss is a mean over the tokens of both.
    for (_, loss), (_, other) in zip(
        one["history"]["training"], two["history"]["training"], strict=True
    ):
        assert other == pytest.approx(loss, rel=1e-4)
    assert two["adapter_figures"]["test"]["loss"] == pytest.approx(
        one["adapter_figures"]["test"]["loss"], rel=1e-4
    )
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one", "rows.jsonl", "two"]


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--base", str(base), "--data", str(data), "--name", "letters", "--out", str(out)]
    return [*fixed, "--device", "cpu", "--precision", "float32", "--max-length", "40", *more]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--data", "columns.jsonl"], 'columns.jsonl:1: "answer" is missing'),
        (["--data", "short.jsonl"], "short.jsonl: no row falls into the"),
        (["--target-modules", "q_proj"], "q_proj matches nothing in this base; choose from c_attn"),
        (["--target-modules", "c_attn,wte"], "wte matches transformer.wte, which cannot"),
        (["--target-modules", "lm_head"], "lm_head matches lm_head, which cannot be adapted"),
        (["--out", "taken"], "taken exists; name another --out"),
        (["--base", "no/such/base/here"], "base no/such/base/here: neither a folder"),
        (["--base", "broken"], "base broken names no model_type in config.json"),
        (["--name", "../evil"], "../evil"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--epochs", "nan"], "--epochs must be a finite number above 0, got nan"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["--seed", "-1"], "--seed must lie between 0"),
        (["--max-rows", "5,6"], "--max-rows has 2 numbers for 1 sources of data"),
        (["--max-rows", "0"], "--max-rows must be at least 1, got 0"),
        (["--max-steps", "0"], "--max-steps must be at least 1, got 0"),
        (["--template", "{a} {q}"], "--template: a template must hold {q} once and end in"),
        (["--frozen-a", "4/3"], "--frozen-a must be random, or I/N with I from 1 to N"),
        (["--frozen-a", "1/9"], "9 blocks of --rank 4 do not fit into the 32 inputs"),
        (["--answer-column", "question"], "name the same column"),
        (["--tune", "0"], "--tune must be at least 1, got 0"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--max-length", "65"], "--max-length 65 is above the base's 64 tokens"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str],
    message: str,
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{}", "utf-8")
    Path("columns.jsonl").write_text('{"question": "q"}\n', "utf-8")
    Path("short.jsonl").write_text('{"question": "q", "answer": "a"}\n', "utf-8")
    before = set(tmp_path.iterdir())
    assert main(command(base, data[0], Path("out"), *more)) == 1
    line = last_line(capsys)
    assert line.startswith("superpose-train: ")
    assert message in line
    assert set(tmp_path.iterdir()) == before


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--base", "mini"])
    assert caught.value.code == 2
    assert "superpose-train: error:" in last_line(capsys)
    with pytest.raises(SystemExit):
        main(command(Path("b"), Path("d"), Path("o"), "--precision", "half"))
    assert "choose from auto, float32, bfloat16" in last_line(capsys).replace("'", "")
    with pytest.raises(ValueError, match="--precision must be auto or float32 or bfloat16, got"):
        options(Path("b"), Path("d"), Path("o"), precision="half")


def test_the_command_line_ends_in_a_summary(
    base: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "letters"
    assert main(command(base, data[0], out, "--epochs", "0.2", "--target-modules", "c_attn")) == 0
    assert f"wrote {out}: test perplexity" in capsys.readouterr().out.splitlines()[-1]


def test_an_unknown_architecture_needs_targets() -> None:
    with pytest.raises(ValueError, match=r"of type other; choose from c_attn, c_fc, c_proj"):
        choose_targets(tiny_gpt2(), "other", ())
    assert choose_targets(tiny_gpt2(), "other", ("c_fc",)) == ["c_fc"]
    one = "transformer.h.1.attn.c_attn"
    assert choose_targets(tiny_gpt2(), "gpt2", (one, one)) == [one]


def test_layers_of_two_layouts_are_not_trained_together(base: Path, tmp_path: Path) -> None:
    model: Any = nn.ModuleDict({"old": tiny_gpt2(), "new": tiny_llama()})
    with pytest.raises(ValueError, match="mix Conv1D and Linear"):
        attach_adapter(model, options(base, tmp_path, tmp_path), ["c_attn", "q_proj"])


def test_base_labels_are_never_paths(tmp_path: Path) -> None:
    assert base_label("mini") == "mini"
    assert base_label("openai-community/gpt2") == "openai-community/gpt2"
    assert base_label(str(tmp_path)) == tmp_path.name


def test_a_base_that_is_not_whole_is_not_trained_on(
    base: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = Path(shutil.copytree(base, tmp_path / "partial"))
    tensors = load_file(partial / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    assert main(command(partial, data[0], tmp_path / "out")) == 1
    line = last_line(capsys)
    assert f"base {partial} is not a whole GPT2LMHeadModel" in line
    assert "lacks transformer.h.1.mlp.c_fc.weight" in line
    assert not (tmp_path / "out").exists()
