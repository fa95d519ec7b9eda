"""Each benchmark's command on the tiny base: it runs, writes its report, and its checks hold.

Servers run in this process, since one of its own would take most of the time to import torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from benchmarks import (
    correctness,
    fit,
    fold,
    guard,
    load,
    memory,
    merge_stalls,
    merging,
    orthogonal,
    scaling,
    swaps,
)
from benchmarks.serverprocess import resident_bytes
from benchmarks.study.synthetic import write_topic
from tests.integration.harness import LoopThread, start

from superpose_server.config import parse_config


class ServerHere:
    """What `ServerProcess` is, in this process."""

    def __init__(self, base: Path, adapter_dir: Path | None, flags: Sequence[str] = ()) -> None:
        config = parse_config([f"--base={base}", *flags])
        self._folder = tempfile.TemporaryDirectory()
        self._loop = LoopThread()
        self._served = start(
            self._loop,
            base,
            Path(self._folder.name),
            adapter_dir=adapter_dir,
            dtype=config.dtype,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            max_length=config.max_length,
        )
        self.address = self._served.address

    def memory(self) -> int:
        return resident_bytes(os.getpid())

    def __enter__(self) -> ServerHere:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._served.stop()
        self._loop.close()
        self._folder.cleanup()


@pytest.fixture(autouse=True)
def servers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fit, load, memory, merge_stalls, swaps):
        monkeypatch.setattr(module, "ServerProcess", ServerHere)


class Command:
    """Runs a benchmark's `main` with the tiny base and reads what it wrote."""

    def __init__(self, cache: Path, out: Path) -> None:
        self.out = out
        self._options = [
            "--device=cpu",
            "--compile=off",
            f"--cache={cache}",
            f"--out={out}",
        ]

    def __call__(
        self, module: Any, name: str, *options: str, base: str = "tiny", holds: bool = True
    ) -> dict[str, Any]:
        assert (
            module.main([*self._options, "--label=here", f"--model={base}", *options]) == 0
            or not holds
        )
        read: dict[str, Any] = json.loads((self.out / f"{name}-here.json").read_text())
        assert (self.out / f"{name}-here.md").read_text().startswith(f"## {name}: here")
        assert read["settings"]["model"] == base
        return read


@pytest.fixture
def command(cache: Path, tmp_path: Path) -> Command:
    return Command(cache, tmp_path)


def test_fold(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    read = command(fold, "fold", "--seconds=0.1", "--counts=1,2", "--json")
    assert json.loads(capsys.readouterr().out) == read
    seconds = read["data"]["seconds"]
    assert list(seconds) == [
        "plain copy",
        "fold of 1",
        "fold of 2",
        "restore (empty mix)",
        "PEFT merge_adapter, 2",
        "PEFT unmerge_adapter, 2",
        "PEFT add_weighted_adapter(cat) + merge, 2",
    ]
    assert all(len(values) == read["settings"]["rounds"] >= 3 for values in seconds.values())
    assert all(value > 0 for values in seconds.values() for value in values)
    assert not any("another mix" in note for note in read["notes"])


def test_fold_without_peft(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object) -> None:
        raise ImportError

    monkeypatch.setattr(fold, "Peft", absent)
    read = command(fold, "fold", "--seconds=0.1", "--counts=1", "--dtype=bfloat16")
    assert list(read["data"]["seconds"]) == ["plain copy", "fold of 1", "restore (empty mix)"]
    assert "PEFT is absent and was left out." in read["notes"]
    assert read["settings"]["adapted_parameters"] == 2 * 64 * (192 + 64 + 256)


def test_scaling(command: Command) -> None:
    options = ("--seconds=0.1", "--sweeps=loaded,domains", "--loaded=1,3", "--steps=2")
    read = command(scaling, "scaling", *options)
    assert list(read["data"]) == ["loaded", "domains"]
    assert list(read["data"]["loaded"]) == ["1", "3"]
    assert list(read["data"]["domains"]) == ["resident", "1", "2", "4", "8"]


def test_correctness(command: Command) -> None:
    read = command(correctness, "correctness", "--rows=4", "--new-tokens=8")
    assert read["checks"][0]["ok"]
    assert [row[1] for row in read["tables"][0]["rows"]] == [4, 4]


def test_swaps(command: Command) -> None:
    options = ("--streams=4", "--rates=0,20", "--phase=0.3", "--variants=default,engine")
    read = command(swaps, "swaps", "--seconds=0.1", *options)
    assert all(check["ok"] for check in read["checks"])
    for variant in ("default", "engine"):
        (still,) = read["data"][f"{variant}, 0 changes/s"]
        (changed,) = read["data"][f"{variant}, 20 changes/s"]
        assert still["tokens"] > 0
        assert (still["sent"], still["changed"]) == (0, 0)
        assert changed["statuses"] == {"OK": changed["sent"]}
        assert 0 < changed["changed"] <= changed["sent"]
    texts = read["tables"][-1]["rows"]
    assert all(row[2] > 0 and row[5] == 0 for row in texts)


def test_merge_stalls(command: Command) -> None:
    options = ("--streams=4", "--phase=0.3", "--methods=sum,svd")
    read = command(merge_stalls, "merge-stalls", "--seconds=0.1", *options)
    assert all(check["ok"] for check in read["checks"])
    assert list(read["data"]) == ["none", "sum", "svd"]
    merges, gaps, texts = read["tables"]
    assert [row[0] for row in merges["rows"]] == ["sum", "svd"]
    for _, count, merged, slowest, reply, last in merges["rows"]:
        assert count > 0
        assert 0 < merged <= slowest
        assert merged < reply <= last
    assert all(row[6] > 0 for row in gaps["rows"])
    assert texts["rows"][0][2] > 0


def test_fit(command: Command) -> None:
    # So few rows do not tell which mix is better on others, which is the first check.
    read = command(fit, "fit", "--rows=3", "--step=1", base="mini", holds=False)
    assert all(check["ok"] for check in read["checks"][1:])
    table, search = read["tables"]
    assert [len(row) for row in table["rows"]] == [6] * len(table["rows"])
    found, best, _ = search["rows"]
    points = {tuple(each["weights"].values()): each for each in read["data"]["grid"]}
    assert len(points) == 8
    assert best[3] == min(each["fitted"] for each in points.values())
    # What the fit says of the base, the grid says too.
    (base,) = (row for row in table["rows"] if row[0] == "base")
    assert base[1] == pytest.approx(points[0, 0, 0]["held_out"], rel=1e-3)
    assert found[3] <= best[3]


def test_orthogonal(command: Command, tmp_path: Path) -> None:
    # So few rows and steps do not tell which way is better, but a penalty tells at once.
    data = [str(write_topic(topic, 60, tmp_path)) for topic in ("birds", "metals")]
    options = ("--seeds=0", "--steps=2", "--data", *data)
    read = command(orthogonal, "orthogonal", *options, base="mini", holds=False)
    assert read["checks"][0]["ok"]
    assert read["settings"]["domains"] == ["birds-60", "metals-60"]
    found = {way: pair for way, (pair,) in read["data"].items()}
    assert abs(found["frozen A, blocks"]["delta_cosine"]) < 1e-6
    assert found["plain"]["first alone"] == found["O-LoRA"]["first alone"]
    assert found["plain"]["second alone"] != found["O-LoRA"]["second alone"]


def test_merging(command: Command) -> None:
    read = command(merging, "merging", "--rows=12", "--methods", "sum", "mean", base="mini")
    plain, best = ({row[0]: row[1:] for row in table["rows"]} for table in read["tables"])
    ends = ["math alone", "medicine alone", "finance alone", merging.ALL, "half of each"]
    assert list(plain) == list(best) == ["base", *ends, "sum", "mean"]
    # A sum is the mix itself, and the mean a third of it: their best factors are as far apart.
    assert plain["sum"][3:] == plain[merging.ALL][3:]
    assert best["sum"][1:5] == pytest.approx(best["mean"][1:5], rel=0.02)
    assert best["mean"][0] == pytest.approx(3 * best["sum"][0], rel=0.2)
    assert plain["mean"][2] == pytest.approx(2 / 3)
    assert best["sum"][4] < plain["sum"][6]
    # Each alone is best on its own rows.
    for at, domain in enumerate(("math", "medicine", "finance")):
        losses = {name: row[3 + at] for name, row in plain.items()}
        assert min(losses, key=losses.__getitem__) == f"{domain} alone"


def test_load(command: Command) -> None:
    read = command(load, "load", "--seconds=0.5", "--max-batch=4", "--new-tokens=4")
    assert all(check["ok"] for check in read["checks"])
    assert sum(level["statuses"].get("OK", 0) for level in read["data"].values()) > 0


def test_soak(command: Command) -> None:
    options = ("--soak=0.5", "--max-batch=2", "--max-queue=2", "--new-tokens=4")
    read = command(load, "soak", *options)
    assert all(check["ok"] for check in read["checks"])
    assert set(read["data"]["statuses"]) <= {"OK", "RESOURCE_EXHAUSTED"}


def test_guard(command: Command) -> None:
    # On so small a base, next to nothing but the price of a slice: only that it is measured.
    read = command(guard, "guard", "--seconds=0.2")
    for row in read["tables"][0]["rows"]:
        assert row[3] > 0
        assert 0 < row[4] < row[7]
    assert list(read["data"]) == ["the default mix", "mixes of their own"]


def test_memory(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    here = resident_bytes(os.getpid())
    monkeypatch.setattr(memory, "without_weights", lambda base, compiled: (here, here))
    options = ("--max-batch=2", "--max-length=16", "--adapters=3")
    read = command(memory, "memory", *options)
    # By hand: width 64, two layers, tied embeddings; c_attn and two c_proj adapted in each.
    layer = 64 * 192 + 192 + 64 * 64 + 64 + 64 * 256 + 256 + 256 * 64 + 64 + 4 * 64
    assert read["data"]["paper_bytes"] == {
        "model": 4 * (50257 * 64 + 1024 * 64 + 2 * layer + 2 * 64),
        "base_copy": 4 * 2 * (64 * 192 + 64 * 64 + 256 * 64),
        "cache": 4 * 2 * 2 * (2 + 1) * 16 * 64,  # and a scratch slot
        "adapters": 3 * 4 * 2 * 4 * ((64 + 192) + (64 + 64) + (256 + 64)),
    }


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (swaps, ["--variants=other"], "use explicit, default, churn, engine"),
        (merge_stalls, ["--methods=other"], "use sum, "),
        (scaling, ["--sweeps=other"], "use loaded, mixes, domains, rank, streams"),
        (scaling, ["--steps=0"], "use 1 to 64"),
    ],
)
def test_an_unknown_choice_is_refused_with_what_there_is(
    module: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        module.main(options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
