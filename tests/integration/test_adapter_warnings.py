"""What is said of an adapter wherever it is met, and the caps that are flags."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import Family, LoopThread, Served, start
from tests.makers import (
    VOCABULARY,
    make_adapter,
    peft_model,
    save_base,
    tiny_llama,
    tokenizer_adding,
)

from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.peft.training_record import training_warnings
from superpose_client import AdapterFiles
from superpose_client.errors import AdapterFolderError, FailedPreconditionError

OTHER = "elsewhere/quite-another"


@pytest.fixture(scope="module")
def served(
    loop: LoopThread, llama: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("warnings") / "state"
    server = start(loop, llama.base, state, max_rank=300, max_adapter_mib=2)
    yield server
    server.stop()


def warned(model: Family, folder: Path) -> Path:
    make_adapter(model.model, folder, 1)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": OTHER}))
    return folder


def test_a_warning_is_in_the_reply_the_log_and_what_is_shown(
    served: Served, llama: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pushed = served.client.push("other", warned(llama, tmp_path / "other"))
    (warning,) = pushed.adapter.warnings
    assert OTHER in warning
    assert f"adapter other: {warning}" in caplog.messages
    assert served.client.adapter("other").warnings == (warning,)
    assert served.client.push("plain", llama.adapters["a"]).adapter.warnings == ()


def test_a_warning_outlives_the_server(
    loop: LoopThread, llama: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(loop, llama.base, tmp_path / "state")
    try:
        # Of one effect: the store keeps the files of the first alone.
        first.client.push("plain", make_adapter(llama.model, tmp_path / "plain", 1))
        (warning,) = first.client.push("other", warned(llama, tmp_path / "other")).adapter.warnings
    finally:
        first.stop()
    with caplog.at_level(logging.WARNING):
        again = start(
            loop,
            llama.base,
            tmp_path / "state",
            adapter_dir=warned(llama, tmp_path / "d" / "dir").parent,
        )
    try:
        for domain in ("other", "dir"):
            assert again.client.adapter(domain).warnings == (warning,)
            assert f"adapter {domain}: {warning}" in caplog.messages
        assert again.client.adapter("plain").warnings == ()
    finally:
        again.stop()


def test_a_push_that_mends_what_was_warned_of_ends_the_warning(
    served: Served, llama: Family, tmp_path: Path
) -> None:
    bad = served.client.push("mended", warned(llama, tmp_path / "bad"))
    assert bad.adapter.warnings
    served.client.set("mended=0.5")
    good = served.client.push("mended", make_adapter(llama.model, tmp_path / "good", 1))
    assert good.adapter.warnings == served.client.adapter("mended").warnings == ()
    assert good.adapter.digest == bad.adapter.digest
    assert good.generation == served.client.mix().generation
    assert served.client.mix().weights == {"mended": 0.5}
    served.client.set("base")


def test_the_caps_are_those_of_the_flags(served: Served, llama: Family, tmp_path: Path) -> None:
    limits = served.client.info().limits
    assert (limits.max_rank, limits.max_adapter_bytes) == (300, 2 << 20)
    high = make_adapter(llama.model, tmp_path / "high", r=300, target_modules=["v_proj"])
    assert served.client.push("high", high).adapter.rank == 300
    higher = make_adapter(llama.model, tmp_path / "higher", r=301, target_modules=["v_proj"])
    with pytest.raises(FailedPreconditionError, match=r"rank 301: the limit is 300.*--max-rank"):
        served.client.push("higher", higher)


@pytest.mark.parametrize(
    ("size", "error"),
    [((2 << 20) + 1, FailedPreconditionError), (40 << 20, AdapterFolderError)],
    ids=["a little", "more than a message holds"],
)
def test_too_many_bytes_are_refused_with_the_flags_name(
    served: Served, size: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"2097152.*--max-adapter-mib"):
        served.client.push("large", AdapterFiles(b"{}", bytes(size)))


def test_parameters_of_the_base_that_were_saved_along_change_nothing(
    served: Served, llama: Family, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "lm_head"]}
    wrapped = peft_model(llama.model, 5, **fields)
    wrapped.save_pretrained(tmp_path / "with", save_embedding_layers=True)  # type: ignore[operator]
    make_adapter(llama.model, tmp_path / "without", 5, **fields)
    with_copy = served.client.push("with", tmp_path / "with").adapter
    without = served.client.push("without", tmp_path / "without").adapter
    assert with_copy.digest == without.digest
    assert with_copy.bytes > without.bytes + 257 * 32 * 4


# How training rows began, and how texts do here.


def trained(path: Path, **fields: Any) -> None:
    """Write what of superpose-train's record matters."""
    record = {"base_digest": "b", "data": [], "parameters": {}, **fields}
    (path / "training.json").write_text(json.dumps(record), "utf-8")


@pytest.mark.parametrize(
    ("before", "record", "words"),
    [
        ("<s>", {}, "rows began with no special token, and here every text begins with '<s>'"),
        ("<s>", {"special_tokens": []}, "rows began with no special token"),
        ("<s>", {"special_tokens": ["<s>"]}, None),
        ("", {"special_tokens": ["<s>"]}, "began with '<s>', and .* with no special token"),
        ("", {"special_tokens": []}, None),
        ("", {}, None),
    ],
)
def test_rows_that_began_otherwise_than_texts_are_warned_of(
    loop: LoopThread,
    llama: Family,
    tmp_path: Path,
    before: str,
    record: dict[str, Any],
    words: str | None,
) -> None:
    model = tiny_llama(vocab_size=VOCABULARY + 1)
    base = save_base(model, tmp_path / "base", tokenizer_adding(before) if before else None)
    folder = make_adapter(model, tmp_path / "dir" / "told")
    trained(folder, **record)
    for name in ("state", "again"):
        served = start(loop, base, tmp_path / "state", adapter_dir=folder.parent)
        try:
            if name == "state":
                served.client.push("pushed", folder)
            for domain in ("told", "pushed"):
                warnings = served.client.adapter(domain).warnings
                assert len(warnings) == (words is not None)
                assert not words or re.search(words, warnings[0])
        finally:
            served.stop()


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[1]", b'{"loss": 1}', b"[" * 10**5, b" " * (2**20 + 1)]
)
def test_a_record_of_another_trainer_says_nothing(
    served: Served, llama: Family, tmp_path: Path, content: bytes
) -> None:
    folder = make_adapter(llama.model, tmp_path / "other")
    (folder / "training.json").write_bytes(content)
    assert served.client.push("foreign", folder, replace=True).adapter.warnings == ()
    files = AdapterFiles.read(folder)._replace(training=content)
    assert served.client.push("foreign", files).adapter.warnings == ()


# What was trained in a sum.


def test_an_adapter_that_was_trained_in_a_sum_is_warned_of(
    served: Served, llama: Family, tmp_path: Path
) -> None:
    folder = make_adapter(llama.model, tmp_path / "half")
    past = [{"domain": "math", "digest": "0123456789abcdef"}, {"domain": "law\nx", "digest": 5}]
    trained(folder, orthogonal_to=past)
    assert served.client.push("half", folder).adapter.warnings == (
        r"it was trained in a sum with math (digest 0123456789ab), law\nx (digest 5), each at "
        "weight 1: serve it in a mix that holds them so",
    )


@pytest.mark.parametrize("past", [None, [], 5, "math", {}, [None] * 9, [{}] * 1000])
def test_a_sum_with_anything_is_told_in_a_short_line(past: object) -> None:
    facts = BaseFacts("base", Path(), backbone="", modules={}, parameters={})
    record = {"base_digest": "b", "data": [], "parameters": {}, "orthogonal_to": past}
    warnings = training_warnings(json.dumps(record).encode(), facts)
    assert len(warnings) == (isinstance(past, list) and past != [])
    assert all(len(warning) < 400 for warning in warnings)
