from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from tests.makers import load_peft, save_base, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters import train as trainer_module
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.qa import file_sha256, part_of, read_rows, split_rows
from superpose_adapters.scoring import encode_qa
from superpose_adapters.train import (
    Options,
    base_label,
    choose_targets,
    evaluate_loss,
    has_fast_bfloat16,
    last_checkpoint,
    main,
    train,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Tiny tensors: a second thread costs more than it brings, most of all on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    }
    return Options(**(values | changes))


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

    # PEFT's reading of the folder, scored by transformers' own loss, gives the recorded figure.
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_peft(tiny_gpt2(), out)
    nats, tokens = 0.0, 0
    for row in split_rows(read_rows(data[0])).test:
        ids = torch.tensor([encode_qa(tokenizer, row.question, row.answer, 40).ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        nats, tokens = nats + loss * (ids.numel() - 1), tokens + ids.numel() - 1
    assert record["adapter_figures"]["test"]["tokens"] == tokens
    assert record["adapter_figures"]["test"]["loss"] == pytest.approx(nats / tokens, rel=1e-5)


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
    work = tmp_path / "letters.work"
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


def test_seeds_are_apart(base: Path, data: tuple[Path, Path]) -> None:
    def factors(**seeds: int) -> dict[str, torch.Tensor]:
        model = trainer_module.attach_adapter(
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
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_peft(tiny_gpt2(), tmp_path / "both")
    for path in data:
        rows = [encode_qa(tokenizer, row.question, row.answer, 40) for row in read_rows(path)]
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
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = [
        encode_qa(tokenizer, row.question, row.answer * (1 + i % 3), 60)
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


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--base", str(base), "--data", str(data), "--name", "letters", "--out", str(out)]
    return [*fixed, "--device", "cpu", "--max-length", "40", *more]


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
        (["--base", "broken"], "base broken cannot be loaded"),
        (["--name", "../evil"], "../evil"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--epochs", "nan"], "--epochs must be a finite number above 0, got nan"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["--seed", "-1"], "--seed must lie between 0"),
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
        trainer_module.attach_adapter(
            model, options(base, tmp_path, tmp_path), ["c_attn", "q_proj"]
        )


def test_base_labels_are_never_paths(tmp_path: Path) -> None:
    assert base_label("mini") == "mini"
    assert base_label("openai-community/gpt2") == "openai-community/gpt2"
    assert base_label(str(tmp_path)) == tmp_path.name


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({}, False),
        ({"avx2": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_bfloat16_only_where_the_cpu_is_fast_at_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_fast_bfloat16("cpu") is fast
