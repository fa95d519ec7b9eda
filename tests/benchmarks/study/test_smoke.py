"""The smoke config from end to end, and what becomes of runs that are broken off."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from benchmarks.study import run, training
from benchmarks.study.__main__ import main
from benchmarks.study.config import read_config
from benchmarks.study.evaluator import Local
from benchmarks.study.experiments import controls, orthogonal, seeds
from benchmarks.study.inputs import Sources, read_inputs
from benchmarks.study.results import Results
from benchmarks.study.study import Study, total
from benchmarks.study.workspace import Workspace
from safetensors.torch import load_file, save_file
from tests.makers import load_peft
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The results of the smoke config."""
    folder = tmp_path_factory.mktemp("study")
    out, cache = folder / "out", folder / "cache"
    assert main(["run", "--config=smoke", f"--out={out}", f"--cache={cache}"]) == 0
    return Workspace(out, cache)


@pytest.fixture(scope="module")
def results(done: Workspace) -> Results:
    inputs = read_inputs(done.inputs_path)
    assert inputs is not None
    return Results(Study(read_config("smoke"), inputs), done)


def test_a_shared_a_makes_larger_cosines(results: Results) -> None:
    by_name = {group.name: group for group in seeds.groups(results.study)}
    same = [g.rms for g in seeds.known(results, by_name[seeds.SAME_A].pairs)]
    different = [g.rms for g in seeds.known(results, by_name[seeds.DIFFERENT_A].pairs)]
    assert len(same) == 6
    assert min(same) > 2 * max(different)
    bounds = seeds.cosine_bounds(results.study, results)
    assert bounds.floor
    assert bounds.shared_floor
    assert min(different) > 2 * bounds.floor
    assert min(same) > 2 * bounds.shared_floor > 4 * bounds.floor


def test_frozen_disjoint_a_has_cosine_0(results: Results) -> None:
    largest = orthogonal.largest_cosine(results.study, results)
    assert largest is not None
    assert largest < 1e-6


def test_a_joint_adapter_of_rank_12_is_below_one_of_rank_4(results: Results) -> None:
    union = results.study.config.domains
    narrow, wide = (
        controls.joint_losses(results.study, results, union, rank, "tokens")[0] for rank in (4, 12)
    )
    assert narrow is not None
    assert wide is not None
    assert wide.perplexity < 0.8 * narrow.perplexity


def test_each_adapter_is_the_best_on_its_own_domain(results: Results) -> None:
    domains = results.study.config.domains
    for arm in results.study.arms:
        for domain in domains:
            own = results.perplexity(total(arm.fundamental[domain]), [domain])
            others = [
                results.perplexity(terms, [domain])
                for terms in [(), *(total(arm.fundamental[d]) for d in domains if d != domain)]
            ]
            assert own is not None
            assert all(other is not None and own < other / 3 for other in others)


def test_a_sum_is_its_concatenated_adapter(results: Results, done: Workspace) -> None:
    """The sum of deltas is one adapter of concatenated factors, as cat = sum says."""
    from superpose_adapters.bundled import MINI
    from superpose_adapters.fold import concatenate_factors
    from superpose_adapters.layout import read_layout
    from superpose_adapters.peft.folder import read_adapter

    layout = read_layout(AutoModelForCausalLM.from_pretrained(MINI.base()))
    arm = results.study.arms[0]
    adapters = [
        read_adapter(done.adapter(results.study.adapter_key(spec)), layout)
        for spec in arm.fundamental.values()
    ]
    for module in adapters[0].modules:
        pair = concatenate_factors(dict.fromkeys(adapters, 1.0), module)
        assert pair is not None
        a_cat, b_cat = pair
        apart = sum(
            a.modules[module].scaling
            * (a.modules[module].b.double() @ a.modules[module].a.double())
            for a in adapters
        )
        assert isinstance(apart, torch.Tensor)
        together = b_cat.double() @ a_cat.double()
        assert float((together - apart).norm() / apart.norm()) < 1e-6


def test_the_losses_of_a_sum_are_those_of_its_concatenated_adapter(
    results: Results, done: Workspace, tmp_path: Path
) -> None:
    """One adapter of rank 3 r, the factors of three side by side, read and run by PEFT."""
    study = results.study
    folders = [done.adapter(study.adapter_key(spec)) for spec in study.arms[0].fundamental.values()]
    each = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    scaling, rank = config["lora_alpha"] / config["r"], 3 * config["r"]
    whole = {
        name: torch.cat([tensors[name] for tensors in each], dim=0)
        if ".lora_A." in name
        else scaling * torch.cat([tensors[name] for tensors in each], dim=1)
        for name in each[0]
    }
    folder = tmp_path / "concatenated"
    folder.mkdir()
    save_file(whole, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"r": rank, "lora_alpha": rank})
    )
    sources = Sources(study.config, "mini", None, tmp_path / "made")
    rows = sources.texts("birds", "test", study.template)
    local = Local(sources.base, study.config.evaluation)
    summed = local.row_nats([(each, 1.0) for each in folders], rows, "all")
    base = AutoModelForCausalLM.from_pretrained(sources.base, dtype=torch.float32)
    model = load_peft(base, folder)
    ids = [torch.tensor(row.ids) for row in rows]
    with torch.no_grad():
        logits = [model(input_ids=each.unsqueeze(0)).logits[0] for each in ids]
    expected = [
        cross_entropy(each[:-1], row[1:], reduction="sum").item()
        for each, row in zip(logits, ids, strict=True)
    ]
    assert summed == pytest.approx(expected, rel=1e-4)
    assert local.row_nats([(folders[0], 1.0)], rows, "all") != pytest.approx(summed, rel=1e-2)


def test_removal_is_exact_and_subtraction_is_not(done: Workspace) -> None:
    found = {r["dtype"]: r for r in done.findings if "refold_equals_never_added" in r}
    assert set(found) == {"float32", "bfloat16"}
    for record in found.values():
        assert record["changed_by_adding"]
        assert record["refold_equals_never_added"]
        assert record["empty_mix_equals_base"]
    assert found["bfloat16"]["subtraction"][-1]["changed"] > 0.01


def test_the_report_is_complete(done: Workspace) -> None:
    html = (done.out / "report.html").read_text()
    assert "are missing" not in html
    assert "takes GPT-2&#x27;s weights from the Hub and was not run" in html
    assert "Not part of this study yet" in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    pictures = sorted(path.stem for path in (done.out / "figures").iterdir())
    assert {"figure1", "layers", "grid", "lambda", "blocks", "overlap", "prediction"} <= set(
        pictures
    )
    assert html.count("data:image/png;base64,") == len(pictures)
    read = json.loads((done.out / "results.json").read_text())
    claims = [claim for section in read["sections"] for claim in section["claims"]]
    verdicts = {claim["text"]: claim["verdict"] for claim in claims}
    # What the config does not ask for cannot be judged: pairs across its two seeds are one pair
    # of seeds, and most of it has one seed.
    assert set(verdicts.values()) == {"holds", "does not hold", "not decided"}
    counted = re.search(r"Of (\d+) claims (\d+) hold, (\d+) do not, (\d+) are not decided", html)
    assert counted
    total_claims, *counts = map(int, counted.groups())
    assert total_claims == len(claims) == sum(counts)
    # Markdown escapes what it would not show as it stands; without the escapes all is there.
    markdown = (done.out / "report.md").read_text()
    shown = re.sub(r"\\([\\`*_<>])", r"\1", markdown)
    for claim in claims:
        assert claim["text"] in shown
    assert "<chart> {q} <pilot> {a}" in shown
    assert not re.search(r"(?<!\\)<chart>", markdown.split("```json")[0])
    table = pyarrow.parquet.read_table(done.out / "losses.parquet")
    assert table.num_rows > 1000
    assert "base" in table.column("model").to_pylist()


def test_tuning_is_reported(done: Workspace) -> None:
    (record,) = (record for record in done.findings if "trials" in record)
    assert len(record["trials"]) == 2
    assert record["best"]["validation_loss"] > 0


def test_what_is_done_is_not_done_again(
    done: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Results alone are enough: no adapter is there any more, and none is trained."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(training, "train_many", never)
    monkeypatch.setattr(run, "score_missing", never)
    before = (done.out / "losses.jsonl").read_bytes()
    copy = tmp_path / "out"
    shutil.copytree(done.out, copy)
    assert main(["run", "--config=smoke", f"--out={copy}", f"--cache={tmp_path / 'empty'}"]) == 0
    assert (copy / "losses.jsonl").read_bytes() == before


def test_a_part_of_the_results_makes_a_report(done: Workspace, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(done.out, copy)
    lines = (copy / "losses.jsonl").read_bytes().splitlines(keepends=True)
    # The last line torn, as a kill leaves it.
    (copy / "losses.jsonl").write_bytes(b"".join(lines[:60]) + lines[60][:-9])
    (copy / "geometry.jsonl").unlink()
    assert main(["report", "--config=smoke", f"--out={copy}"]) == 0
    html = (copy / "report.html").read_text()
    assert "are missing" in html
    assert "not run" in html


def test_a_run_that_was_broken_off_ends_the_same(
    done: Workspace, results: Results, tmp_path: Path
) -> None:
    """Losses torn, an adapter half written: what is missing is made again, with the same result."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    shutil.copytree(done.out, out)
    shutil.copytree(done.cache, cache)
    path = out / "losses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lost = [json.loads(line) for line in lines[-40:]]
    path.write_bytes(b"".join(lines[:-40]) + lines[-40][:50])
    key = lost[0]["mix"][0][0]
    shutil.rmtree(cache / "adapters" / key)
    (cache / "adapters" / f".{key}.1234").mkdir()
    assert main(["run", "--config=smoke", f"--out={out}", f"--cache={cache}"]) == 0
    again = Workspace(out, cache)
    for record in lost:
        found = again.losses.get(record["key"])
        assert found is not None
        assert found["nats"] == pytest.approx(record["nats"], rel=1e-4)
    assert len(again.losses) == len(done.losses)


def _one_line(capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    yield from capsys.readouterr().err.splitlines()


_FILES = "data.files = { a = 'a.jsonl', b = 'b.jsonl', c = 'c.jsonl' }"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no such file"),
        ('{"question": "why"}', '"answer" is missing'),
        ('{"question": "why", "answer": "so"}', "no row falls into the"),
    ],
)
def test_bad_data_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str | None, message: str
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(f"name = 'bad'\nbase = 'mini'\ndomains = ['a', 'b', 'c']\n{_FILES}\n")
    for name in "abc":
        if rows is not None:
            (tmp_path / f"{name}.jsonl").write_text(rows + "\n")
    arguments = ["run", f"--config={config}", f"--data={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert main([*arguments, f"--cache={tmp_path / 'cache'}"]) == 1
    (line,) = _one_line(capsys)
    assert line.startswith("study: ")
    assert message in line


def test_no_data_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config=mini", f"--out={tmp_path}"]) == 1
    (line,) = _one_line(capsys)
    assert "name its folder by --data or SUPERPOSE_DATA" in line


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--config=smoke", f"--out={tmp_path / 'none'}"]) == 1
    (line,) = _one_line(capsys)
    assert line.endswith("nothing was run; use `run` first")


def test_modules_that_the_base_lacks_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(
        "name = 'bad'\nbase = 'mini'\ndomains = ['a', 'b', 'c']\n"
        "data.files = { a = 'birds', b = 'metals', c = 'ports' }\ndata.synthetic = 60\n"
        "training.target_modules = ['q_proj']\nevaluation.test_rows = 2\n"
    )
    arguments = ["run", f"--config={config}", f"--out={tmp_path / 'out'}"]
    assert main([*arguments, f"--cache={tmp_path / 'cache'}"]) == 1
    assert "q_proj matches nothing in this base" in list(_one_line(capsys))[-1]


def test_a_loss_that_is_not_finite_is_told_and_leaves_no_adapter(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(
        f"name = 'bad'\nbase = '{tiny}'\ndomains = ['a', 'b', 'c']\n"
        "data.files = { a = 'birds', b = 'metals', c = 'ports' }\ndata.synthetic = 80\n"
        "training.learning_rate = 1e30\ntraining.rows = 32\ntraining.eval_rows = 4\n"
        "evaluation.test_rows = 2\n"
    )
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert main(["run", f"--config={config}", f"--out={out}", f"--cache={cache}"]) == 1
    message = list(_one_line(capsys))[-1]
    assert re.match(
        r"study: [abc](-[abc])*-r4-s\d-a\d \(.*: validation loss is not finite", message
    )
    assert message.endswith("lower --learning-rate")
    assert [path for path in (cache / "adapters").iterdir() if not path.name.startswith(".")] == []
    assert not (out / "adapters.jsonl").exists()


def test_two_runs_do_not_write_to_one_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with Workspace(out, tmp_path).locked():
        assert main(["run", "--config=smoke", f"--out={out}", f"--cache={tmp_path}"]) == 1
    assert "another run writes here" in list(_one_line(capsys))[-1]


def test_all_pairs_of_a_sum_are_measured(results: Results) -> None:
    for arm in results.study.arms:
        for composition in results.study.compositions(arm):
            for pair in combinations(composition.summed, 2):
                assert results.pair(pair) is not None
