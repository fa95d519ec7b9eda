"""What `--adapter-dir` may hold besides adapters that fit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from tests.integration.harness import Family, LoopThread, start

from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_server.errors import StartupError


def no_adapter(folder: Path) -> None:
    (folder / "checkpoint-8").mkdir(parents=True)


def nothing(folder: Path) -> None:
    folder.symlink_to("nowhere")


def cut_short(folder: Path) -> None:
    tensors = folder / TENSORS_NAME
    tensors.write_bytes(tensors.read_bytes()[:-5])


def not_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("{")


def file_from_elsewhere(folder: Path) -> None:
    tensors = folder / TENSORS_NAME
    elsewhere = folder.parent.parent / "elsewhere"
    tensors.rename(elsewhere)
    tensors.symlink_to(elsewhere)


WRONG = {
    "runs": (no_adapter, r"a PEFT folder holds adapter_config\.json"),
    "law.tune": (no_adapter, r"law\.tune"),
    "gone": (nothing, "no such file"),
    "cut-short": (cut_short, "save or copy it again"),
    "not-json": (not_json, "JSON"),
    "linked": (file_from_elsewhere, "leads outside .*: copy the file"),
}


@pytest.fixture
def folders(gpt2: Family, tmp_path: Path) -> Path:
    """One adapter, a file, and what is hidden."""
    folders = tmp_path / "adapters"
    shutil.copytree(gpt2.adapters["a"], folders / "a")
    (folders / "rows.jsonl").touch()
    (folders / ".law.work" / "checkpoint-8").mkdir(parents=True)
    return folders


def spoil(name: str, gpt2: Family, folders: Path) -> None:
    make = WRONG[name][0]
    if make not in (no_adapter, nothing):
        shutil.copytree(gpt2.adapters["b"], folders / name)
    make(folders / name)


def test_what_is_no_adapter_is_left_out_with_a_warning(
    loop: LoopThread,
    gpt2: Family,
    llama: Family,
    folders: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in WRONG:
        spoil(name, gpt2, folders)
    shutil.copytree(llama.adapters["a"], folders / "of-another-base")
    (folders / "linked-folder").symlink_to(gpt2.adapters["a"])
    with caplog.at_level(logging.WARNING, "superpose_server.runtime"):
        served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders)
    try:
        assert [adapter.domain for adapter in served.client.adapters()] == ["a"]
        assert served.client.add("a").weights == {"a": 1.0}
    finally:
        served.stop()
    told = [record.getMessage() for record in caplog.records]
    names = [*WRONG, "of-another-base", "linked-folder"]
    assert len(told) == len(names)
    for name in names:
        (line,) = [
            line for line in told if line.startswith(f"left out: adapter {folders / name}: ")
        ]
        assert "\n" not in line


@pytest.mark.parametrize("name", WRONG)
def test_strict_refuses_what_is_no_adapter(
    loop: LoopThread, gpt2: Family, folders: Path, tmp_path: Path, name: str
) -> None:
    spoil(name, gpt2, folders)
    with pytest.raises(StartupError, match=WRONG[name][1]) as caught:
        start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders, strict=True)
    line = str(caught.value)
    assert line.startswith(f"adapter {folders / name}: ")
    assert line.endswith("; without --strict it is left out")


def test_strict_serves_what_fits(
    loop: LoopThread, gpt2: Family, folders: Path, tmp_path: Path
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders, strict=True)
    try:
        assert [adapter.domain for adapter in served.client.adapters()] == ["a"]
    finally:
        served.stop()


def test_an_adapter_of_the_default_mix_is_not_left_out(
    loop: LoopThread, gpt2: Family, folders: Path, tmp_path: Path
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders)
    served.client.add("a")
    served.stop()
    cut_short(folders / "a")
    with pytest.raises(StartupError) as caught:
        start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders)
    line = str(caught.value)
    assert line.startswith("the default mix holds a (adapter ")
    assert f"cannot be served (adapter {folders / 'a'}: " in line
    assert "put that adapter back, or delete" in line


def test_a_folder_named_as_a_pushed_adapter_is_refused_with_remedies_that_work(
    loop: LoopThread, gpt2: Family, folders: Path, tmp_path: Path
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state")
    served.client.push("a", gpt2.adapters["b"])
    served.stop()
    with pytest.raises(StartupError) as refused:
        start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders)
    assert str(refused.value) == (
        f"domain a is both directory and pushed: rename the folder a in --adapter-dir {folders}, "
        "or start without it and run adapterctl delete a"
    )
    served = start(loop, gpt2.base, tmp_path / "state")
    served.client.delete("a")
    served.stop()
    served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=folders)
    assert [adapter.domain for adapter in served.client.adapters()] == ["a"]
    served.stop()
