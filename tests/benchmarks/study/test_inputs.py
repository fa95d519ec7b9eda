from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.study import inputs as inputs_module
from benchmarks.study.config import Config, Data, Evaluation, Training
from benchmarks.study.inputs import Sources, read_inputs, setup_digest
from benchmarks.study.study import Study
from tests.makers import VOCABULARY, save_base, tiny_gpt2, tokenizer_adding

_NAMES = ("a", "b", "c")


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _other_word(base: Path) -> None:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[:2]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda base: _edit(base / "config.json", n_head=1), False),
        (lambda base: _edit(base / "config.json", activation_function="relu"), False),
        (_other_word, False),
        (lambda base: _edit(base / "tokenizer_config.json", eos_token="!"), False),
        (lambda base: _edit(base / "config.json", transformers_version="0"), True),
        (lambda base: _edit(base / "config.json", _name_or_path="elsewhere"), True),
        (lambda base: _edit(base / "config.json", dtype="bfloat16"), True),
        (lambda base: (base / "README.md").write_text("more"), True),
    ],
)
def test_the_same_tensors_with_another_setup_are_another_base(
    tiny: Path, tmp_path: Path, change: Callable[[Path], object], same: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    assert setup_digest(base) == setup_digest(tiny)
    change(base)
    assert (setup_digest(base) == setup_digest(tiny)) == same


def _config(**files: str) -> Config:
    return Config(
        "some",
        "mini",
        _NAMES,
        Data(files or {name: f"{name}.jsonl" for name in _NAMES}),
        training=Training(max_length=24),
        evaluation=Evaluation(test_rows=None, validation_rows=5),
    )


def _write(folder: Path, rows: list[tuple[str, str]]) -> None:
    for name in _NAMES:
        lines = [json.dumps({"question": q, "answer": f"{a} {name}"}) for q, a in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _many() -> list[tuple[str, str]]:
    words = [a + b + c for a in "bdfglm" for b in "aeiou" for c in "nrst"]
    return [(f"what is {word}", f"it is {at}") for at, word in enumerate(words)]


def test_the_base_that_was_used_is_told_by_its_name(tiny: Path, tmp_path: Path) -> None:
    _write(tmp_path, _many())
    base = tmp_path / "gpt2"
    shutil.copytree(tiny, base)
    found = Sources(_config(), str(base), tmp_path, tmp_path).inputs()
    assert found.base == "gpt2"
    assert not found.from_hub
    # A folder may be called so; what it holds are not the Hub's weights.
    assert not found.is_papers_base
    found.write(tmp_path / "inputs.json")
    assert read_inputs(tmp_path / "inputs.json") == found


@pytest.mark.parametrize("special_tokens", [True, False])
def test_rows_begin_as_the_bases_tokenizer_begins_a_text(
    tmp_path: Path, special_tokens: bool
) -> None:
    _write(tmp_path, _many())
    tokenizer = tokenizer_adding("<s>")
    base = save_base(tiny_gpt2(vocab_size=VOCABULARY + 1), tmp_path / "base", tokenizer)
    config = replace(_config(), training=Training(max_length=24, special_tokens=special_tokens))
    sources = Sources(config, str(base), tmp_path, tmp_path)
    found = sources.inputs()
    assert found.special_tokens == (("<s>",) if special_tokens else ())
    found.write(tmp_path / "inputs.json")
    assert read_inputs(tmp_path / "inputs.json") == found
    row = sources.rows("a", "test")[0]
    expected = tokenizer(f"{row.question} {row.answer}", add_special_tokens=special_tokens)
    (text, *_) = sources.texts("a", "test", "{q} {a}")
    assert text.ids == (*expected["input_ids"], tokenizer.eos_token_id)[:24]


def test_a_row_with_a_token_that_the_base_lacks_names_its_file(tmp_path: Path) -> None:
    _write(tmp_path, [(question, "[PAD]") for question, _ in _many()])
    tokenizer = tokenizer_adding()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    base = save_base(tiny_gpt2(), tmp_path / "base", tokenizer)
    sources = Sources(_config(), str(base), tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"b\.jsonl: a row holds token 257 \('\[PAD\]'\)"):
        sources.texts("b", "test", "{q} {a}")


def test_gpt2_from_the_hub_is_the_papers_base(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, _many())
    monkeypatch.setattr(inputs_module, "resolve_base", lambda name: tiny)
    for name, is_papers in {
        "openai-community/gpt2": True,
        "openai-community/gpt2-medium": False,
        "mini": False,
    }.items():
        assert Sources(_config(), name, tmp_path, tmp_path).inputs().is_papers_base == is_papers


def test_bases_of_the_same_tensors_have_adapters_of_their_own(tiny: Path, tmp_path: Path) -> None:
    _write(tmp_path, _many())
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    _other_word(base)
    config = _config()
    first, second = (
        Study(config, Sources(config, str(folder), tmp_path, tmp_path).inputs())
        for folder in (tiny, base)
    )
    assert first.inputs.base_digest == second.inputs.base_digest
    assert first.adapter_key(first.fundamental("a", 0)) != second.adapter_key(
        second.fundamental("a", 0)
    )


def test_twins_are_in_one_group(tiny: Path, tmp_path: Path) -> None:
    # Each question comes in four versions that differ in numbers, case or spaces.
    rows = [
        (version.format(q=question, n=n), answer)
        for n, version in enumerate(("{q} {n}?", "{q} {n},5?", "{q}  9{n}?", "{q} {n}?"))
        for question, answer in _many()
    ]
    _write(tmp_path, [(q.upper() if at % 3 else q, a) for at, (q, a) in enumerate(rows)])
    sources = Sources(_config(), str(tiny), tmp_path, tmp_path)
    answers = [row.answer for row in sources.rows("a", "test")]
    groups = sources.groups("a", "test")
    assert len(groups) == len(answers) == 4 * len(set(answers)) > 4
    for first, one in zip(groups, answers, strict=True):
        for second, other in zip(groups, answers, strict=True):
            assert (first == second) == (one == other)
