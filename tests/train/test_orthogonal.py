"""O-LoRA against PEFT with every adapter active, and against a plain PyTorch training loop."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tests.makers import load_peft, make_adapter, save_base, tiny_gpt2
from torch import Tensor
from transformers import AutoTokenizer

from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import read_adapter
from superpose_adapters.qa import Row, read_rows, split_rows
from superpose_train import train as trainer_module
from superpose_train.cli import main
from superpose_train.model import attach_adapter
from superpose_train.options import Options
from superpose_train.stacked.stack import train_many
from superpose_train.train import train

TARGETS = ["c_attn", "c_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_gpt2(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    paths = (folder / "one.jsonl", folder / "two.jsonl")
    for path, word in zip(paths, ("aaaa", "zzzz"), strict=True):
        rows = [
            {"question": f"{word} {chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": word * 3}
            for i in range(60)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


def options(base: Path, data: Path, out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "base": str(base),
        "data": (data,),
        "name": out.name,
        "out": out,
        "max_length": 40,
        "batch_size": 8,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "device": "cpu",
        "precision": "float32",
    }
    return Options(**(values | changes))


@pytest.fixture(scope="module")
def past(
    base: Path, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """One of ours, and a stranger's of another rank and scaling, in fewer modules."""
    folder = tmp_path_factory.mktemp("past")
    train(options(base, data[0], folder / "math"))
    made = make_adapter(
        tiny_gpt2(), folder / "odd", 5, r=3, use_rslora=True, target_modules=["c_attn"]
    )
    return folder / "math", made


@pytest.fixture(scope="module")
def beside(
    base: Path,
    data: tuple[Path, Path],
    past: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "law"
    return out, train(options(base, data[1], out, orthogonal_to=past, dropout=0.1))


def peft_sum(*folders: Path) -> Any:
    """PEFT's own sum: every adapter of these folders is active on the tiny base."""
    model: Any = load_peft(tiny_gpt2(), folders[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        for folder in folders[1:]:
            model.load_adapter(str(folder), folder.name)
        model.base_model.set_adapter(["default", *(folder.name for folder in folders[1:])])
    return model.eval()


def mean_loss(model: Any, base: Path, rows: Sequence[Row]) -> Tensor:
    """The mean over all tokens but each row's first, by transformers' own loss, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, tokens = torch.zeros(()), 0
    for row in rows:
        text = f"Question: {row.question}\nAnswer: {row.answer}"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:40]])
        nats = nats + model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return nats / tokens


def a_factors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".lora_A." in name}


def overlap(folder: Path, *past: Path) -> float:
    """The sum of absolute entries of all products of A's of one module, in float64."""
    total = 0.0
    for other in past:
        theirs = a_factors(other)
        for name, a in a_factors(folder).items():
            if name in theirs:
                total += float((theirs[name].double() @ a.double().T).abs().sum())
    return total


def test_what_is_measured_is_the_sum_of_all_by_peft(
    beside: tuple[Path, dict[str, Any]],
    past: tuple[Path, Path],
    base: Path,
    data: tuple[Path, Path],
) -> None:
    out, record = beside
    rows = split_rows(read_rows(data[1])).test
    models = {
        "base_figures": tiny_gpt2(),
        "past_figures": peft_sum(*past),
        "adapter_figures": peft_sum(*past, out),
    }
    with torch.no_grad():
        losses = {name: mean_loss(model, base, rows).item() for name, model in models.items()}
    assert len({round(loss, 3) for loss in losses.values()}) == 3
    for name, loss in losses.items():
        assert record[name]["test"]["loss"] == pytest.approx(loss, rel=1e-5), name


def test_the_record_names_the_past_and_how_far_the_as_overlap(
    beside: tuple[Path, dict[str, Any]], past: tuple[Path, Path], base: Path
) -> None:
    out, record = beside
    assert json.loads((out / "training.json").read_text("utf-8")) == record
    layout = read_layout(tiny_gpt2())
    assert record["orthogonal_to"] == [
        {"domain": folder.name, "digest": read_adapter(folder, layout).digest} for folder in past
    ]
    assert record["parameters"]["orthogonality"] == 0.5
    assert record["a_overlap"]["result"] == pytest.approx(overlap(out, *past), rel=1e-5)
    assert str(past[0].parent) not in (out / "training.json").read_text("utf-8")


def test_every_steps_loss_is_that_of_a_plain_pytorch_loop(
    base: Path, data: tuple[Path, Path], past: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whole data in a batch, no dropout; penalties large enough that their gradients matter."""
    chosen = options(
        base,
        data[1],
        tmp_path / "law",
        orthogonal_to=past,
        orthogonality=0.3,
        norm_penalty=0.02,
        batch_size=64,
        max_steps=4,
        schedule="constant",
    )
    record = train(chosen)

    model = peft_sum(*past)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(
            "new", LoraConfig(r=4, lora_alpha=64, target_modules=TARGETS, fan_in_fan_out=True)
        )
        model.base_model.set_adapter(["default", "odd", "new"])
    first = dict(attach_adapter(tiny_gpt2(), chosen, TARGETS).named_parameters())
    parameters = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".new." in name
        if parameter.requires_grad:
            parameter.data.copy_(first[name.replace(".new.", ".default.")])
        parameters[name] = parameter
    new = {name: parameter for name, parameter in parameters.items() if ".new." in name}
    adamw = torch.optim.AdamW(new.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = mean_loss(model, base, split_rows(read_rows(data[1])).train)
        for name, parameter in new.items():
            loss = loss + 0.02 * parameter.norm()
            for other in ("default", "odd"):
                a_past = parameters.get(name.replace(".new.", f".{other}."))
                if ".lora_A." in name and a_past is not None:
                    loss = loss + 0.3 * (a_past @ parameter.T).abs().sum()
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(new.values(), 1.0)
        adamw.step()
    assert [step for step, _ in record["history"]["training"]] == [1, 2, 3, 4]
    assert [loss for _, loss in record["history"]["training"]] == pytest.approx(losses, rel=2e-4)
    for _, loss in record["history"]["validation"]:
        # Without the penalty, by which no adapter is chosen.
        assert loss < losses[-1] - 0.5


def test_the_as_come_to_overlap_less_than_without_the_penalty(
    base: Path, data: tuple[Path, Path], past: tuple[Path, Path], tmp_path: Path
) -> None:
    with_, without = (
        train(
            options(
                base,
                data[1],
                tmp_path / name,
                orthogonal_to=past[:1],
                orthogonality=orthogonality,
                learning_rate=1e-2,
                max_steps=16,
                max_eval_rows=2,
            )
        )["a_overlap"]
        for name, orthogonality in (("with", 0.5), ("without", 0.0))
    )
    assert with_["first"] == without["first"]
    assert with_["result"] < 0.5 * without["result"]


def test_an_interrupted_run_goes_on_beside_the_same_past_alone(
    beside: tuple[Path, dict[str, Any]],
    base: Path,
    data: tuple[Path, Path],
    past: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate = trainer_module.AdapterTrainer.evaluate
    out = tmp_path / "law"

    def interrupted(self: Any, *arguments: Any, **named: Any) -> dict[str, float]:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.AdapterTrainer, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options(base, data[1], out, orthogonal_to=past, dropout=0.1))
    other = make_adapter(tiny_gpt2(), tmp_path / "math", 6)
    with pytest.raises(ValueError, match="holds an interrupted run with other data, base, past"):
        train(options(base, data[1], out, orthogonal_to=(other, past[1]), dropout=0.1))
    record = train(options(base, data[1], out, orthogonal_to=past, dropout=0.1))
    assert record["resumed"]
    assert record["a_overlap"] == beside[1]["a_overlap"]
    assert record["adapter_figures"] == beside[1]["adapter_figures"]
    expected, result = (
        load_file(folder / "adapter_model.safetensors") for folder in (beside[0], out)
    )
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--orthogonality", "1"], "--orthogonality is a term of --orthogonal-to, which names"),
        (["--norm-penalty", "0.1"], "--norm-penalty is a term of --orthogonal-to, which names"),
        (["--orthogonal-to", "math", "--orthogonality", "nan"], "a finite number, at least 0"),
        (["--orthogonal-to", "none"], "--orthogonal-to none: no adapter_config.json there"),
        (["--orthogonal-to", "."], "--orthogonal-to .: a folder is called as its domain, and ''"),
        (["--orthogonal-to", "math", "--frozen-a", "1/2"], "give one of them"),
        (["--orthogonal-to", "math", "a/math"], "names two folders of one name"),
        (["--orthogonal-to", "math", "twin"], "twin: the same adapter as math"),
        (["--orthogonal-to", "letters"], "holds a domain called letters, as --name is"),
        (["--orthogonal-to", "foreign"], "foreign: its training.json says that it was trained on"),
        (["--orthogonal-to", "wide"], "wide: tensor"),
    ],
)
def test_what_cannot_be_beside_it_is_refused_in_one_line(
    more: list[str],
    message: str,
    base: Path,
    data: tuple[Path, Path],
    past: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("math", "twin", "foreign"):
        shutil.copytree(past[0], tmp_path / name)
    record = json.loads((tmp_path / "foreign" / "training.json").read_text("utf-8"))
    record["base_digest"] = "0" * 64
    (tmp_path / "foreign" / "training.json").write_text(json.dumps(record), "utf-8")
    make_adapter(tiny_gpt2(n_embd=64), tmp_path / "wide")
    before = set(tmp_path.iterdir())
    command = ["--base", str(base), "--data", str(data[1]), "--name", "letters", "--out", "out"]
    assert main([*command, "--device", "cpu", "--max-length", "40", *more]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("superpose-train: ")
    assert message in line
    assert set(tmp_path.iterdir()) == before


def test_the_command_says_beside_what_it_trained_and_what_of_that_is_odd(
    base: Path,
    data: tuple[Path, Path],
    past: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(past[0], tmp_path / "math")
    path = tmp_path / "math" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"special_tokens": ["<s>"]}))
    command = ["--base", str(base), "--data", str(data[1]), "--name", "law", "--device", "cpu"]
    more = ["--out", str(tmp_path / "law"), "--max-length", "40", "--max-steps", "1"]
    beside = ["--orthogonal-to", str(tmp_path / "math"), str(past[1])]
    assert main([*command, *more, *beside]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("in a sum with math, odd")
    assert f"superpose-train: {tmp_path / 'math'}: its training rows began with '<s>'" in err


def test_a_stack_has_no_past(
    base: Path, data: tuple[Path, Path], past: tuple[Path, Path], tmp_path: Path
) -> None:
    chosen = options(base, data[1], tmp_path / "law", orthogonal_to=past)
    with pytest.raises(ValueError, match="law has --orthogonal-to, which stacked"):
        train_many([chosen])
