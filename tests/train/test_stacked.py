from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from tests.makers import load_peft, save_base, tiny_gpt2, tiny_llama
from torch import Tensor

from superpose_train import record as training_record
from superpose_train import train as trainer_module
from superpose_train.loss import NotFinite
from superpose_train.options import Options
from superpose_train.stacked import run as stacked_run
from superpose_train.stacked.factors import Dropout, Shape, StackedAdamW
from superpose_train.stacked.stack import train_many
from superpose_train.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_gpt2(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of other sizes and lengths of rows."""
    folder = tmp_path_factory.mktemp("data")
    paths = (folder / "one.jsonl", folder / "two.jsonl")
    for path, word, count in zip(paths, ("aaaa", "zz"), (60, 45), strict=True):
        rows = [
            {"question": f"{word} {chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": word * 3}
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


def run(base: Path, data: Path, out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "base": str(base),
        "data": (data,),
        "name": out.name,
        "out": out,
        "max_length": 40,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "device": "cpu",
        "precision": "float32",
    }
    return Options(**(values | changes))


def different(base: Path, data: tuple[Path, Path], folder: Path) -> list[Options]:
    """Runs that differ in all that may differ; dropout apart, whose numbers are the stack's own."""
    one, two = data
    return [
        run(base, one, folder / "a", max_steps=8, learning_rate=5e-3, seed=1),
        run(base, two, folder / "b", epochs=1, rank=6, alpha=8, seed=2, schedule="linear"),
        run(
            base,
            one,
            folder / "c",
            max_steps=7,
            rank=3,
            seed=3,
            init_seed=9,
            schedule="constant",
            loss_scope="answer",
            template="Q: {q}\nA: {a}",
            max_eval_rows=3,
            frozen_a="random",
        ),
        run(base, two, folder / "d", max_steps=6, frozen_a=(2, 3), learning_rate=1e-2),
    ]


def factors(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def assert_same_bits(one: Path, other: Path) -> None:
    expected, result = factors(one), factors(other)
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.fixture(scope="module")
def alone(
    base: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The same runs one by one, through transformers.Trainer."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, [train(options) for options in different(base, data, folder)]


@pytest.fixture(scope="module")
def together(
    base: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("together")
    return folder, train_many(different(base, data, folder))


def test_losses_and_adapters_are_those_of_training_one_by_one(
    alone: tuple[Path, list[dict[str, Any]]], together: tuple[Path, list[dict[str, Any]]]
) -> None:
    for one, stacked in zip(alone[1], together[1], strict=True):
        name = one["name"]
        # With at most eight steps every step's loss is in the record, and so is its evaluation.
        for kind in ("training", "validation"):
            assert len(one["history"][kind]) == one["steps"]
            for (step, loss), (other_step, other) in zip(
                one["history"][kind], stacked["history"][kind], strict=True
            ):
                assert step == other_step
                assert other == pytest.approx(loss, rel=1e-4), (name, kind, step)
        for part in ("validation", "test"):
            for figures in ("base_figures", "adapter_figures"):
                expected, result = one[figures][part], stacked[figures][part]
                assert result["tokens"] == expected["tokens"]
                assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
        for field in ("steps", "best_step", "trained_parameters", "parameters", "data"):
            assert one[field] == stacked[field]
        expected, result = factors(alone[0] / name), factors(together[0] / name)
        assert expected.keys() == result.keys()
        for key, tensor in expected.items():
            scale = tensor.abs().max()
            torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=float(1e-3 * scale))


def test_bfloat16_stays_near_training_one_by_one_in_it(
    base: Path,
    data: tuple[Path, Path],
    together: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    def in_bfloat16(folder: Path) -> list[Options]:
        chosen = different(base, data, folder)
        return [dataclasses.replace(options, precision="bfloat16") for options in chosen]

    alone = [train(options) for options in in_bfloat16(tmp_path / "alone")]
    records = train_many(in_bfloat16(tmp_path / "together"))
    for one, stacked, exact in zip(alone, records, together[1], strict=True):
        assert one["parameters"] == stacked["parameters"]
        assert stacked["parameters"]["precision"] == stacked["precision_asked"] == "bfloat16"
        # The base alone is measured, in float32 whatever the step computes in.
        assert stacked["base_figures"] == exact["base_figures"]
        for (_, loss), (_, other), (_, in_float32) in zip(
            *(record["history"]["training"] for record in (one, stacked, exact)), strict=True
        ):
            assert other != in_float32
            assert other == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_where_that_is_fast(
    fast: bool,
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": fast})
    ran = "bfloat16" if fast else "float32"
    for asked in ("auto", ran):
        options = run(base, data[0], tmp_path / asked, max_steps=3, precision=asked)
        [record] = train_many([options])
        assert (record["precision_asked"], record["parameters"]["precision"]) == (asked, ran)
    assert_same_bits(tmp_path / "auto", tmp_path / ran)


def test_the_result_is_what_train_writes(
    alone: tuple[Path, list[dict[str, Any]]], together: tuple[Path, list[dict[str, Any]]]
) -> None:
    for one, stacked in zip(alone[1], together[1], strict=True):
        name = one["name"]
        folder = together[0] / name
        assert {file.name for file in folder.iterdir()} == {
            file.name for file in (alone[0] / name).iterdir()
        }
        assert (folder / "adapter_config.json").read_text("utf-8") == (
            alone[0] / name / "adapter_config.json"
        ).read_text("utf-8")
        assert json.loads((folder / "training.json").read_text("utf-8")) == stacked
        assert stacked.keys() - one.keys() == {"stack"}
        assert stacked["stack"] == {"size": 4, "max_stack": 16}
        assert PeftConfig.from_pretrained(folder).r == one["parameters"]["rank"]
        load_peft(tiny_gpt2(), folder)
    assert sorted(path.name for path in together[0].iterdir()) == ["a", "b", "c", "d"]


def test_a_finished_call_is_not_trained_again(
    base: Path, data: tuple[Path, Path], together: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, records = together
    before = (folder / "a" / "training.json").stat().st_mtime_ns
    assert train_many(different(base, data, folder)) == records
    assert (folder / "a" / "training.json").stat().st_mtime_ns == before
    other = [dataclasses.replace(different(base, data, folder)[0], seed=77)]
    with pytest.raises(ValueError, match="a exists and is not the result of this run"):
        train_many(other)


@pytest.mark.parametrize("calls", [2, 6, 9, 12])
def test_a_killed_stack_goes_on_and_ends_with_the_same_bits(
    calls: int,
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def runs(folder: Path) -> list[Options]:
        # With dropout: its random numbers must go on where they were.
        return [
            dataclasses.replace(options, dropout=0.2) for options in different(base, data, folder)
        ]

    train_many(runs(tmp_path / "whole"))
    save = stacked_run.Stack._save
    seen = 0

    def killed(self: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            # The worst moment: adapters are written, the checkpoint still has them at work.
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(stacked_run.Stack, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            train_many(runs(tmp_path / "killed"))
    records = train_many(runs(tmp_path / "killed"))
    assert any(record["resumed"] for record in records)
    for name in "abcd":
        assert_same_bits(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["a", "b", "c", "d"]


def test_a_kill_between_two_that_end_together_is_taken_up_without_the_written_one(
    base: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(folder: Path) -> list[Options]:
        return [
            run(base, data[0], folder / "a", max_steps=3, seed=1),
            run(base, data[0], folder / "b", max_steps=3, seed=2),
            run(base, data[1], folder / "c", max_steps=5, seed=3),
        ]

    train_many(runs(tmp_path / "whole"))
    write = training_record.write_adapter

    def killed(tensors: Any, config: Any, label: str, record: Any, out: Path) -> None:
        if out.name == "b":
            raise KeyboardInterrupt
        write(tensors, config, label, record, out)

    with monkeypatch.context() as patch:
        patch.setattr(stacked_run, "write_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            train_many(runs(tmp_path / "killed"))
    # As a caller does that asks for what is missing only.
    train_many(runs(tmp_path / "killed")[1:])
    for name in "abc":
        assert_same_bits(tmp_path / "whole" / name, tmp_path / "killed" / name)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["a", "b", "c"]


def test_a_long_list_is_split_and_means_the_same(
    base: Path,
    data: tuple[Path, Path],
    together: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    lines: list[str] = []
    records = train_many(different(base, data, tmp_path), max_stack=3, tell=lines.append)
    assert [record["stack"]["size"] for record in records] == [3, 3, 3, 1]
    for record, whole in zip(records, together[1], strict=True):
        assert record["adapter_figures"]["test"]["loss"] == pytest.approx(
            whole["adapter_figures"]["test"]["loss"], rel=1e-4
        )
    assert sum(line.startswith("wrote ") for line in lines) == 4


def test_dropout_does_not_depend_on_companions(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"question": f"{i:x}?" + "why" * 9, "answer": "so"} for i in range(60)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def dropped(folder: Path) -> Options:
        return run(base, data[1], folder / "x", max_steps=4, dropout=0.3)

    alone = train_many([dropped(tmp_path / "alone")])[0]
    companion = run(base, long, tmp_path / "y", max_steps=5, dropout=0.1, rank=8)
    together = train_many([companion, dropped(tmp_path / "both")])[1]
    for (_, one), (_, other) in zip(
        alone["history"]["training"], together["history"]["training"], strict=True
    ):
        assert other == pytest.approx(one, rel=1e-5)
    without = train_many([dataclasses.replace(dropped(tmp_path / "none"), dropout=0.0)])[0]
    assert without["history"]["training"][-1] != alone["history"]["training"][-1]


def test_dropout_keeps_the_mean_and_each_ones_share() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    dropout = Dropout([0.5, 0.0, 0.1], generators, [(4, 50), (3, 20), (4, 50)])
    result = dropout(torch.ones(12, 50, 40)).view(3, 4, 50, 40)
    assert torch.equal(result[1], torch.ones(4, 50, 40))
    for at, share in ((0, 0.5), (2, 0.1)):
        assert torch.unique(result[at]).tolist() == pytest.approx([0, 1 / (1 - share)])
        assert (result[at] == 0).float().mean().item() == pytest.approx(share, abs=0.02)
        assert result[at].mean().item() == pytest.approx(1, abs=0.03)


def test_adamw_is_torchs_with_a_clip_for_each() -> None:
    torch.manual_seed(0)
    start = torch.randn(3, 50)
    stacked = StackedAdamW(start.clone(), torch.ones(3, 50), torch.zeros(3, 50), torch.zeros(3, 50))
    stacked.mask[2, 30:] = 0
    single = [row.clone().requires_grad_() for row in start]
    rates = [1e-3, 1e-1, 1e-2]
    adamw = [
        torch.optim.AdamW([row], lr=rate, weight_decay=0.0)
        for row, rate in zip(single, rates, strict=True)
    ]
    for count in range(1, 20):
        gradients = torch.randn(3, 50) * torch.tensor([[0.01], [1.0], [30.0]])
        stacked.step(gradients, rates, count)
        for row, gradient in zip(single, gradients, strict=True):
            row.grad = gradient.clone()
        last = single[2].grad
        assert last is not None
        last[30:] = 0
        for row, optimizer in zip(single, adamw, strict=True):
            torch.nn.utils.clip_grad_norm_([row], 1.0)
            optimizer.step()
    for at in range(3):
        torch.testing.assert_close(stacked.parameters[at], single[at].detach())
    assert torch.equal(stacked.parameters[2, 30:], start[2, 30:])
    assert torch.equal(stacked.keep([2, 0]).parameters, stacked.parameters[[2, 0]])


def test_padding_of_a_narrow_rank_stays_zero() -> None:
    shape = Shape((("m", 6, 5),), 4)
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    row = shape.pack({"m": (a, b)})
    wide_a, wide_b = shape.factors(row.unsqueeze(0))["m"]
    torch.testing.assert_close(wide_b[0] @ wide_a[0], b @ a)
    parameters = row.unsqueeze(0).requires_grad_()
    wide_a, wide_b = shape.factors(parameters)["m"]
    (torch.randn(7, 6) @ wide_a[0].T @ wide_b[0].T).square().sum().backward()  # type: ignore[no-untyped-call]
    assert parameters.grad is not None
    # Without the mask: the gradients themselves are zero.
    adamw = StackedAdamW(
        parameters.detach(), torch.ones(1, 44), torch.zeros(1, 44), torch.zeros(1, 44)
    )
    adamw.step(parameters.grad, [0.1], 1)
    after_a, after_b = shape.factors(adamw.parameters)["m"]
    assert not after_a[0, 2:].any()
    assert not after_b[0, :, 2:].any()
    assert not torch.equal(after_a[0, :2], a)


def test_frozen_a_stays(together: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = [t for name, t in factors(together[0] / "d").items() if ".lora_A." in name]
    for a in rows:
        torch.testing.assert_close(a @ a.T, torch.eye(4) / 3, rtol=0, atol=1e-6)


def test_llama_trains_in_a_stack(data: tuple[Path, Path], tmp_path: Path) -> None:
    folder = save_base(tiny_llama(), tmp_path / "llama")
    runs = [run(folder, path, tmp_path / path.stem, max_steps=3) for path in data]
    records = train_many(runs)
    expected = train(dataclasses.replace(runs[1], out=tmp_path / "alone"))
    assert records[1]["adapter_figures"]["test"]["loss"] == pytest.approx(
        expected["adapter_figures"]["test"]["loss"], rel=1e-4
    )
    load_peft(tiny_llama(), tmp_path / "two")


def test_a_loss_that_is_not_finite_names_the_run_and_leaves_finished_ones(
    base: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = [
        run(base, data[0], tmp_path / "good", max_steps=2),
        run(base, data[0], tmp_path / "bad", max_steps=40, learning_rate=1e30),
    ]
    with pytest.raises(NotFinite, match=r"^bad \(.*bad\): .* loss is not finite at step"):
        train_many(runs)
    assert not (tmp_path / "bad").exists()
    load_peft(tiny_gpt2(), tmp_path / "good")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "same --batch-size: a has 8, b has 4"),
        ({"max_length": 30}, "same --max-length"),
        ({"target_modules": ("c_fc",)}, "same --target-modules"),
        ({"base": "mini"}, "same --base"),
        ({"precision": "bfloat16"}, "same --precision: a has float32, b has bfloat16"),
        ({"out": Path("a")}, "two runs have the same --out"),
        ({"data": ("none.jsonl",)}, "none.jsonl: no such file"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused_before_anything_is_written(
    changes: dict[str, Any],
    message: str,
    base: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        run(base, data[0], Path("a")),
        dataclasses.replace(run(base, data[1], Path("b")), **changes),
    ]
    with pytest.raises(ValueError, match=message):
        train_many(runs)
    assert not list(tmp_path.iterdir())
    assert train_many([]) == []


def test_a_full_disk_leaves_no_result_and_the_old_checkpoint(
    base: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run(base, data[0], tmp_path / "a", max_steps=4)]
    write = torch.save
    calls = 0

    def full(state: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            path.write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data.pkl")
        write(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="cannot be written; is the disk full"):
            train_many(runs)
    assert not (tmp_path / "a").exists()
    assert train_many(runs)[0]["resumed"]


def test_trainers_steps_are_not_read_from_its_log_alone(
    base: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of every step are Trainer's, epochs and short last batches included."""
    taken: list[list[list[int]]] = []
    step = trainer_module.AdapterTrainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Tensor], *more: Any) -> Any:
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        taken.append([ids[mask == 1].tolist() for ids, mask in rows])
        return step(self, model, inputs, *more)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "training_step", watched)
    options = run(base, data[1], tmp_path / "a", epochs=2.5, seed=5, max_rows=21)
    train(options)
    members = []
    original = stacked_run.Stack.run

    def kept(self: Any) -> None:
        members.extend(self._members)
        original(self)

    monkeypatch.setattr(stacked_run.Stack, "run", kept)
    train_many([dataclasses.replace(options, out=tmp_path / "b")])
    ours = [[list(row.ids) for row in members[0].batch(at)] for at in range(len(taken))]
    assert ours == taken
    assert len({len(batch) for batch in taken}) == 2
