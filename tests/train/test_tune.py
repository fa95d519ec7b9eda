from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.full_disk import files_of_at_most
from tests.makers import load_peft, make_adapter, save_base, tiny_gpt2

from superpose_train.cli import main
from superpose_train.loss import NotFinite
from superpose_train.options import Options
from superpose_train.train import train
from superpose_train.tuning import tune as tune_module
from superpose_train.tuning.plots import draw_history, draw_importances
from superpose_train.tuning.tune import Space, tune


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_gpt2(), tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"question": f"a {chr(97 + i % 26)}{chr(97 + i // 26)}?", "answer": "so"} for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


SPACE = Space(epochs=(1, 2), batch_size=(8, 16), learning_rate=(1e-3, 1e-2))


def options(base: Path, data: Path, out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "base": str(base),
        "data": (data,),
        "name": "letters",
        "out": out,
        "max_length": 30,
        "max_rows": 24,
        "rank": 2,
        "device": "cpu",
        "precision": "float32",
    }
    return Options(**(values | changes))


def settings(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial["parameters"] for trial in found["trials"]]


@pytest.fixture(scope="module")
def found(
    base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tuned") / "letters"
    return out, tune(options(base, data, out), 5, SPACE)


def test_the_best_setting_is_left_at_out(
    found: tuple[Path, dict[str, Any]], base: Path, data: Path, tmp_path: Path
) -> None:
    out, tuning = found
    losses = [trial["validation_loss"] for trial in tuning["trials"]]
    assert len(losses) == 5
    assert tuning["best"]["validation_loss"] == min(losses)
    assert json.loads((out / "tuning.json").read_text("utf-8")) == tuning
    assert json.loads((out / "training.json").read_text("utf-8")) == tuning["record"]
    assert tuning["record"]["adapter_figures"]["validation"]["loss"] == min(losses)
    load_peft(tiny_gpt2(), out)
    # Trained anew with that setting alone, it is the same.
    record = train(options(base, data, tmp_path / "again", **tuning["best"]["parameters"]))
    assert record["adapter_figures"] == tuning["record"]["adapter_figures"]
    for name in ("history.png", "importance.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_settings_lie_in_the_space_and_importances_add_up(
    found: tuple[Path, dict[str, Any]],
) -> None:
    tuning = found[1]
    for setting in settings(tuning):
        assert 0 <= setting["dropout"] <= 0.3
        assert setting["batch_size"] in (8, 16)
        assert setting["epochs"] in (1, 2)
        assert 1e-3 <= setting["learning_rate"] <= 1e-2
    assert len({setting["learning_rate"] for setting in settings(tuning)}) == 5
    assert tuning["importances"].keys() == tuning["best"]["parameters"].keys()
    assert sum(tuning["importances"].values()) == pytest.approx(1)


@pytest.mark.parametrize("moment", ["while training", "before the study knows"])
def test_a_killed_search_goes_on_as_if_it_had_not_been(
    moment: str,
    found: tuple[Path, dict[str, Any]],
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def killed(chosen: Options) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 3 and moment == "while training":
            raise KeyboardInterrupt
        record = train(chosen)
        if calls == 3:
            raise KeyboardInterrupt
        return record

    out = tmp_path / "letters"
    with monkeypatch.context() as patch:
        patch.setattr(tune_module, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(options(base, data, out), 5, SPACE)
    assert not out.exists()
    again = tune(options(base, data, out), 5, SPACE)
    assert settings(again) == settings(found[1])
    assert [t["validation_loss"] for t in again["trials"]] == [
        t["validation_loss"] for t in found[1]["trials"]
    ]
    # Done: nothing is trained any more; with more trials it goes on.
    monkeypatch.setattr(tune_module, "train", None)
    assert tune(options(base, data, out), 5, SPACE) == again
    monkeypatch.undo()
    more = tune(options(base, data, out), 6, SPACE)
    assert settings(more)[:5] == settings(again)
    assert json.loads((out / "tuning.json").read_text("utf-8")) == more
    for changes in ({"seed": 1}, {"precision": "bfloat16"}):
        with pytest.raises(ValueError, match="holds a search with other options"):
            tune(options(base, data, out, **changes), 6, SPACE)


def test_a_search_on_a_full_disk_names_its_file(base: Path, data: Path, tmp_path: Path) -> None:
    with files_of_at_most(4000), pytest.raises(OSError, match=r"study.sqlite3: cannot be"):
        tune(options(base, data, tmp_path / "out"), 1, SPACE)
    assert tune(options(base, data, tmp_path / "out"), 1, SPACE)["best"]["number"] == 1


def test_a_search_does_not_go_on_with_other_data_of_the_same_name(
    base: Path, data: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(data.read_bytes())
    tune(options(base, rows, tmp_path / "out"), 1, SPACE)
    rows.write_bytes(data.read_bytes() + data.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="holds a search with other options, data or base"):
        tune(options(base, rows, tmp_path / "out"), 2, SPACE)


def test_a_setting_that_diverges_counts_and_is_not_the_best(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def diverges(chosen: Options) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise NotFinite("training loss overflows")
        return train(chosen)

    lines: list[str] = []
    monkeypatch.setattr(tune_module, "train", diverges)
    found = tune(options(base, data, tmp_path / "out"), 2, SPACE, tell=lines.append)
    assert [trial["state"] for trial in found["trials"]] == ["not finite", "complete"]
    assert found["trials"][0]["validation_loss"] is None
    assert found["best"]["number"] == 2
    assert found["importances"] == {}
    assert lines[0].endswith(": training loss overflows")
    calls = 0
    with pytest.raises(ValueError, match="no trial had a finite loss"):
        tune(options(base, data, tmp_path / "none"), 1, SPACE)


def test_the_command_line_tunes(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "letters"
    arguments = ["--base", str(base), "--data", str(data), "--name", "letters", "--out", str(out)]
    more = ["--max-length", "30", "--max-rows", "8", "--device", "cpu", "--tune"]
    assert main([*arguments, "--precision", "bfloat16", *more, "1"]) == 0
    assert json.loads((out / "training.json").read_text("utf-8"))["parameters"]["precision"] == (
        "bfloat16"
    )
    captured = capsys.readouterr()
    assert "trial 1: dropout" in captured.err
    assert f"wrote {out}: test perplexity" in captured.out
    assert main([*arguments, "--max-steps", "3", *more, "1"]) == 1
    assert "leave --max-steps away" in capsys.readouterr().err
    (tmp_path / ".letters.tune" / "search.json").unlink()
    assert main([*arguments, *more, "1"]) == 1
    assert "letters exists; name another --out" in capsys.readouterr().err


def test_plots_of_little(tmp_path: Path) -> None:
    trials: list[dict[str, Any]] = [
        {"number": 1, "validation_loss": None},
        {"number": 2, "validation_loss": 3.0},
    ]
    draw_history(trials, tmp_path / "history.png")
    draw_importances({}, tmp_path / "importance.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_search_beside_a_past_domain_is_not_carried_on_beside_another(
    base: Path, data: Path, tmp_path: Path
) -> None:
    past = make_adapter(tiny_gpt2(), tmp_path / "math", 1)
    chosen = options(base, data, tmp_path / "letters", orthogonal_to=(past,))
    tuning = tune(chosen, 1, SPACE)
    assert [each["domain"] for each in tuning["record"]["orthogonal_to"]] == ["math"]
    make_adapter(tiny_gpt2(), past, 2)
    with pytest.raises(ValueError, match="holds a search with other options, data or base"):
        tune(chosen, 2, SPACE)
