"""`superpose-merge`: what it writes is an adapter like any, and is what it says."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import load_peft, make_adapter, save_base, tiny_gpt2, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from superpose_adapters.adapter import Adapter
from superpose_adapters.base.checkpoint import load_checkpoint, load_skeleton
from superpose_adapters.base.facts import read_facts
from superpose_adapters.bundled import MINI
from superpose_adapters.fold import concatenate_factors, fold_into
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.merge.method import MergeError
from superpose_adapters.merge.methods import DATA_METHODS, METHODS
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.term import Pair, Term
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_adapters.peft.folder import read_adapter
from superpose_adapters.provenance import Source
from superpose_train.merging.command import main

IDS = torch.tensor([[5, 17, 200, 3, 99, 42]])


@dataclass(frozen=True)
class Setting:
    """A base on the disk, and adapters for it in one folder."""

    base: str
    model: Any
    adapters: Path

    @property
    def layout(self) -> Layout:
        return read_layout(self.model)

    def merge(self, mix: str, method: str, out: Path, *more: str | Path) -> int:
        places: list[str | Path] = ["--adapters", self.adapters, "--base", self.base, "--out", out]
        return run(mix, "--method", method, *places, *more)

    def read(self, folder: Path) -> Adapter:
        return read_adapter(folder, self.layout)


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def make_setting(folder: Path, make: Callable[[], Any], targets: list[str]) -> Setting:
    model = make()
    save_base(model, folder / "base")
    adapters = folder / "adapters"
    make_adapter(model, adapters / "law", 1, r=2, target_modules=targets)
    make_adapter(model, adapters / "tax", 2, r=3, use_rslora=True, rank_pattern={targets[0]: 5})
    make_adapter(model, adapters / "sea", 3, r=1, target_modules=targets[:1])
    (adapters / "notes").mkdir()
    return Setting(str(folder / "base"), model, adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    targets = ["q_proj", "down_proj"]
    return make_setting(tmp_path_factory.mktemp("llama"), tiny_llama, targets)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("gpt2"), tiny_gpt2, ["c_attn", "mlp.c_fc"])


@pytest.fixture(params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest) -> Setting:
    found: Setting = request.getfixturevalue(request.param)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).double()(IDS).logits
    return found


def bound(setting: Setting, weights: dict[str, float]) -> BoundMix:
    return BoundMix.of(
        "0" * 64,
        (
            BoundEntry(name, setting.read(setting.adapters / name), weight)
            for name, weight in weights.items()
        ),
    )


def folded(model: Any, layout: Layout, weights: dict[Adapter, float], dtype: torch.dtype) -> Any:
    """Our own fold, module by module."""
    result = copy.deepcopy(model).to(dtype)
    for module in {name for adapter in weights for name in adapter.modules}:
        factors = concatenate_factors(weights, module)
        assert factors is not None
        parameter = result.get_submodule(module).weight.data
        fold_into(parameter, parameter.clone(), *factors, layout[module])
    return result


def test_a_sum_is_the_mix_to_the_last_bit(setting: Setting, tmp_path: Path) -> None:
    assert setting.merge("law=1,tax=-0.37,sea=0.5", "sum", tmp_path / "both") == 0
    mix = bound(setting, {"law": 1.0, "tax": -0.37, "sea": 0.5}).weights
    merged = setting.read(tmp_path / "both")
    for dtype in (torch.float32, torch.bfloat16):
        expected = folded(setting.model, setting.layout, mix, dtype).state_dict()
        found = folded(setting.model, setting.layout, {merged: 1.0}, dtype).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        base = copy.deepcopy(setting.model).to(dtype).state_dict()
        assert not all(torch.equal(found[name], base[name]) for name in base)


def test_peft_reads_the_sum_as_our_fold_and_as_its_own_cat(
    setting: Setting, tmp_path: Path
) -> None:
    assert setting.merge("law=0.7,sea=-0.4", "sum", tmp_path / "both") == 0
    found = logits(load_peft(setting.model, tmp_path / "both"))
    mix = bound(setting, {"law": 0.7, "sea": -0.4}).weights
    expected = logits(folded(setting.model, setting.layout, mix, torch.float32))
    assert (expected - logits(setting.model)).abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-5
    # PEFT's own sum. Of rsLoRA it has another scale, so `tax` is left out.
    theirs: Any = load_peft(setting.model, setting.adapters / "law")
    theirs.load_adapter(setting.adapters / "sea", adapter_name="sea")
    theirs.add_weighted_adapter(["default", "sea"], [0.7, -0.4], "both", combination_type="cat")
    theirs.set_adapter("both")
    assert (logits(theirs.eval()) - expected).abs().max() < 1e-5


def test_what_was_merged_is_said(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setting.merge("sea=0.5,law", "sum", tmp_path / "both") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.fullmatch(
        rf"wrote {re.escape(str(tmp_path / 'both'))}: sum of sea=0\.5,law=1, rank 3, \d+ modules, "
        r"\d+\.\d\d s; 0\.00 % off the plain sum\n",
        out,
    )
    found = setting.read(tmp_path / "both").provenance
    assert found is not None
    assert (found.method, found.options) == ("sum", {})
    parts = {name: setting.read(setting.adapters / name).digest for name in ("sea", "law")}
    assert set(found.sources) == {
        Source("sea", parts["sea"], 0.5),
        Source("law", parts["law"], 1.0),
    }
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # The folder's own name, and no path.


def test_the_distance_to_the_sum_is_told(
    llama: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama.merge("law,sea", "mean", tmp_path / "both") == 0
    assert "; 50.00 % off the plain sum" in capsys.readouterr().out


def test_a_merge_of_merges_and_of_one(llama: Setting, tmp_path: Path) -> None:
    assert llama.merge("law,sea=2", "sum", tmp_path / "made" / "two") == 0
    more = ("--adapters", tmp_path / "made")
    assert llama.merge("two=0.5,tax", "sum", tmp_path / "three", *more) == 0
    mix = bound(llama, {"law": 0.5, "sea": 1.0, "tax": 1.0}).weights
    expected = logits(folded(llama.model, llama.layout, mix, torch.float32))
    assert (logits(load_peft(llama.model, tmp_path / "three")) - expected).abs().max() < 1e-5
    assert llama.merge("tax=-1", "sum", tmp_path / "one") == 0
    assert llama.read(tmp_path / "one").rank == 5


def test_bundled_adapters_need_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both"
    assert run("math,medicine=0.5", "--base", "mini", "--method", "sum", "--out", out) == 0
    assert ": sum of math=1,medicine=0.5, rank 8, " in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(MINI.base()).float().eval()
    layout = read_layout(model)
    mix = {
        read_adapter(MINI.adapters()["math"], layout): 1.0,
        read_adapter(MINI.adapters()["medicine"], layout): 0.5,
    }
    expected = logits(folded(model, layout, mix, torch.float32))
    assert (expected - logits(model)).abs().max() > 0.1
    assert (logits(load_peft(model, out)) - expected).abs().max() < 1e-5


REFUSED: dict[str, tuple[list[str], str]] = {
    "no adapter": (["base"], "mix 'base' is the base: name adapters"),
    "weights of 0": (["law=0,tax=0"], "is the base: name adapters"),
    "a server's": (["default"], "default is a server's mix"),
    "bad syntax": (["law=1,,tax"], "part 2 is empty"),
    "bad weight": (["law=much"], "weight of 'law' is 'much'"),
    "unknown adapter": (["law,sky"], r"no adapter is called sky \(there: law, sea, tax\)"),
    "unknown method": (["law", "--method", "blend"], "no method is called 'blend': use .*sum"),
    "unknown option": (["law", "--option", "rank=3"], "sum has no option 'rank'"),
    "option of another kind": (
        ["law", "--method", "svd", "--option", "rank=many"],
        "svd: rank is 'many': use a whole number",
    ),
    "not a number": (["law", "--method", "svd", "--option", "rank=NaN"], "svd: rank is 'nan'"),
    "data for none": (["law", "--data", "law=x.jsonl"], "sum learns nothing from rows"),
    "no data": (["law", "--method", "regmean"], "regmean learns from rows: pass some by --data"),
    "no rows": (
        ["law", "--method", "regmean", "--data", "law=/nowhere/rows.jsonl"],
        "/nowhere/rows.jsonl: no such file",
    ),
    "no such folder": (["law", "--adapters", "/nowhere"], "--adapters /nowhere: no such folder"),
    "no such base": (["law", "--base", "/nowhere/base"], "base /nowhere/base: neither a folder"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line(
    llama: Setting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    mix, *rest = arguments
    assert re.search(message, fails(capsys, llama, mix, tmp_path / "out", *rest))
    assert list(tmp_path.iterdir()) == []


def fails(
    capsys: pytest.CaptureFixture[str], setting: Setting, mix: str, out: Path, *more: str | Path
) -> str:
    # argparse takes the last of a flag that is given twice.
    assert setting.merge(mix, "sum", out, *more) == 1
    told, error = capsys.readouterr()
    assert told == ""
    (line,) = error.splitlines()
    assert line.startswith("superpose-merge: ")
    return line


def test_adapters_of_another_base_are_refused_by_name(
    llama: Setting, gpt2: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(gpt2.adapters / "law", tmp_path / "other" / "alien")
    more = ("--adapters", tmp_path / "other")
    line = fails(capsys, llama, "law,alien", tmp_path / "out", *more)
    assert "alien: " in line
    assert "another base" in line


def test_two_folders_of_one_name_are_not_guessed_between(
    llama: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama.adapters / "law", tmp_path / "law")
    line = fails(capsys, llama, "law", tmp_path / "out", "--adapters", tmp_path)
    assert f"law is {llama.adapters / 'law'} and {tmp_path / 'law'}: rename one" in line
    # One that is named twice is one.
    assert llama.merge("law", "sum", tmp_path / "out", "--adapters", llama.adapters / "law") == 0


def test_what_is_there_stays_unless_told(
    llama: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert llama.merge("law", "sum", out) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "exists: name another folder, or pass --replace" in fails(capsys, llama, "tax", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert llama.merge("tax", "sum", out, "--replace") == 0
    assert llama.read(out).digest != llama.read(llama.adapters / "law").digest
    capsys.readouterr()
    one = shutil.copytree(llama.adapters / "law", tmp_path / "here" / "one")
    more = ("--adapters", one, "--replace")
    assert "is one of those to be merged" in fails(capsys, llama, "law,one", one, *more)


def test_what_an_adapter_is_warned_of_is_told_on_stderr(
    llama: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(llama.adapters / "law", tmp_path / "made" / "old")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "owner/another-model"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert llama.merge("old,tax", "sum", tmp_path / "out", "--adapters", folder) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("superpose-merge: warning: old: its base_model_name_or_path is owner/")


def test_a_rank_that_no_server_takes_by_default_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    save_base(model, tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, tmp_path / "made" / name, seed, r=129, target_modules=["q_proj"])
    setting = Setting(str(tmp_path / "base"), model, tmp_path / "made")
    assert setting.merge("one,two", "sum", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith("; to serve it a server needs --max-rank 258\n")


def test_the_methods_are_listed_whatever_else_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--methods"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split()[0] for line in lines]
    assert {*METHODS, *DATA_METHODS} <= set(words)
    assert all(len(line.split()) > 3 for line in lines if line.split()[0] in METHODS)


USAGE = ["law", "--base", "b", "--method", "svd", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["law"], "the following arguments are required"),
        ([*USAGE, "--option", "x"], "argument --option: 'x' is no NAME=VALUE, as in density=0.2"),
        (
            [*USAGE, "--option", "rank=3", "--option", "rank=4"],
            "argument --option: 'rank' is given twice: give it once",
        ),
        ([*USAGE, "--data", "x"], "argument --data: invalid NAME=FILE value: 'x'"),
    ],
)
def test_wrong_usage_ends_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_merge_computes_on_one_thread_and_leaves_their_number_as_it_was(
    llama: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []

    class Counted(PlainSum):
        def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
            numbers.append(torch.get_num_threads())
            if len(numbers) > 1:
                raise MergeError("enough")
            return super().merge(module, parts, terms)

    monkeypatch.setitem(METHODS, "sum", Counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert llama.merge("law", "sum", tmp_path / "out") == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert numbers == [1, 1]


def test_without_the_trainers_packages_methods_that_learn_say_so(
    llama: Setting,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    for name in [name for name in sys.modules if name.startswith("superpose_train.merging.data")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "superpose_train.model", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    more = ("--method", "regmean", "--data", f"law={rows}")
    line = fails(capsys, llama, "law", tmp_path / "out", *more)
    assert "regmean needs what superpose-train needs" in line
    assert "pip install 'superpose[train]'" in line


def test_rows_are_what_a_method_learns_from(tmp_path: Path) -> None:
    rows = [f"{name}={MINI.held_out(name)}" for name in ("math", "finance")]
    data = [argument for row in rows for argument in ("--data", row)]
    common = ["--base", "mini", "--method", "regmean"]
    assert run("math,finance", *common, *data, "--out", tmp_path / "both") == 0
    model = load_checkpoint(MINI.base(), torch.float32)
    found = read_adapter(tmp_path / "both", read_layout(model)).provenance
    assert found is not None
    assert found.method == "regmean"
    assert {source.domain for source in found.sources} == {"math", "finance"}


@pytest.mark.parametrize(
    "make", [tiny_gpt2, tiny_llama, lambda: tiny_llama(tie_word_embeddings=True)]
)
def test_a_base_without_its_parameters_is_laid_out_as_with_them(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    folder = save_base(make(), tmp_path / "base")
    whole, bare = load_checkpoint(folder, torch.float32), load_skeleton(folder)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert read_layout(bare) == read_layout(whole)
    assert read_facts("base", folder, bare) == read_facts("base", folder, whole)
