"""Names for mixes: what they stand for, how long, and what may not be a name."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    check_greedy,
    held,
    start,
)

from superpose_client import (
    AlreadyExistsError,
    InvalidArgumentError,
    NamedMix,
    NotFoundError,
)
from superpose_server.control.journal import Journal
from superpose_server.errors import StartupError

QA = {"a": 1.0, "b": -0.5}


def named(mixes: tuple[NamedMix, ...]) -> dict[str, dict[str, float]]:
    return {mix.name: mix.weights for mix in mixes}


def test_a_named_mix_is_the_mix_that_it_stands_for(served: Served, gpt2: Family) -> None:
    client = served.client
    assert client.name_mix("qa", QA).weights == QA
    spelled = client.score(["abc"], mix=QA)
    for asked in ("qa", "qa=1", {"qa": 1}, "qa=2;a=-1,b=0.5"):
        assert client.score(["abc"], mix=asked) == spelled
    assert client.score(["abc"], mix="qa=0.5").mix.weights == {"a": 0.5, "b": -0.25}
    assert client.analyze("qa,c").mix.weights == {**QA, "c": 1.0}
    whole = client.generate(PROMPT, mix="qa", temperature=0, max_new_tokens=8, ignore_eos=True)
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded(QA), ids, whole.token_ids)
    state = client.set("qa")
    assert (state.weights, state.digest) == (QA, whole.mix.digest)
    assert client.set(QA) == state


def test_a_name_may_be_given_to_the_default_mix_and_to_names(served: Served) -> None:
    client = served.client
    generation = client.set(QA).generation
    assert client.name_mix("now").weights == QA
    assert client.name_mix("half", "now=0.5").weights == {"a": 0.5, "b": -0.25}
    assert client.name_mix("now", "base").weights == {}
    assert named(client.named_mixes()) == {"half": {"a": 0.5, "b": -0.25}, "now": {}}
    assert client.score(["abc"], mix="now").mix.entries == ()
    client.unname_mix("now")
    with pytest.raises(NotFoundError, match=r"'now': push it first .*named mixes: half\)"):
        client.score(["abc"], mix="now")
    assert client.mix().generation == generation


def test_a_running_stream_keeps_its_mix_when_its_name_means_another(
    served: Served, gpt2: Family
) -> None:
    client = served.client
    client.name_mix("qa", QA)
    with held(served.recorder):
        running = client.stream(PROMPT, mix="qa", temperature=0, max_new_tokens=40, ignore_eos=True)
        served.recorder.submitted.get(timeout=PATIENCE)
        client.name_mix("qa", "c")
        assert client.mix().weights == {"a": 1.0}
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    chunks = list(running)
    tokens = tuple(token for chunk in chunks for token in chunk.token_ids)
    check_greedy(gpt2.folded(QA), ids, tokens)
    assert chunks[-1].mix is not None
    assert chunks[-1].mix.weights == QA
    assert client.score(["abc"], mix="qa").mix.weights == {"c": 1.0}
    client.unname_mix("qa")


def test_a_name_outlives_a_domain_and_is_refused_without_it(served: Served, gpt2: Family) -> None:
    client = served.client
    client.name_mix("qa", "a,b")
    client.delete("b")
    for use in (client.analyze, client.set):
        with pytest.raises(NotFoundError, match="named mix qa holds b, which is not loaded") as no:
            use("qa")
        assert no.value.reason == "DOMAIN_NOT_FOUND"
    client.push("b", gpt2.adapters["c"])
    digest = client.adapter("c").digest
    assert {entry.adapter_digest for entry in client.set("qa").entries} >= {digest}


def test_a_domain_and_a_mix_never_share_a_name(served: Served, gpt2: Family) -> None:
    client = served.client
    client.name_mix("qa", QA)
    with pytest.raises(AlreadyExistsError, match="a is a domain: choose another name") as no:
        client.name_mix("a", "b")
    assert no.value.reason == "NAME_TAKEN"
    for replace in (False, True):
        with pytest.raises(AlreadyExistsError, match="qa is a named mix: choose another") as no:
            client.push("qa", gpt2.adapters["c"], replace=replace)
        assert no.value.reason == "NAME_TAKEN"
    with pytest.raises(NotFoundError, match="qa is a named mix and no domain"):
        client.add("qa")
    assert named(client.named_mixes()) == {"qa": QA}
    client.unname_mix("qa")
    assert client.push("qa", gpt2.adapters["c"]).adapter.domain == "qa"


def test_what_cannot_be_a_named_mix_is_refused_and_nothing_is_named(served: Served) -> None:
    client = served.client
    for name in ("", "QA", "../qa", "a" * 65, "base", "default"):
        with pytest.raises(InvalidArgumentError) as no:
            client.name_mix(name, "a")
        assert no.value.reason == "INVALID_NAME"
        assert [violation.field for violation in no.value.field_violations] == ["name"]
    with pytest.raises(NotFoundError, match="no adapter is loaded as 'law'"):
        client.name_mix("qa", "law")
    with pytest.raises(InvalidArgumentError, match="weight of a is nan"):
        client.name_mix("qa", {"a": float("nan")})
    with pytest.raises(NotFoundError, match="no mix is named 'qa'"):
        client.unname_mix("qa")
    assert client.named_mixes() == ()


@pytest.mark.parametrize("word", ["base", "default"])
def test_a_word_of_the_syntax_is_no_domain(served: Served, gpt2: Family, word: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"'{word}' is reserved for .*another name"):
        served.client.push(word, gpt2.adapters["c"])
    with pytest.raises(InvalidArgumentError, match=f"'{word}' is reserved"):
        served.client.set({word: 1.0})


# Starts.


def test_names_survive_a_restart(loop: LoopThread, gpt2: Family, tmp_path: Path) -> None:
    first = start(loop, gpt2.base, tmp_path / "state")
    gpt2.push_all(first.client)
    first.client.name_mix("qa", QA)
    first.client.name_mix("gone", "a")
    first.client.name_mix("plain", "base")
    first.client.unname_mix("gone")
    bits = first.score_bits({"qa": 1.0})
    first.stop()

    second = start(loop, gpt2.base, tmp_path / "state")
    try:
        assert named(second.client.named_mixes()) == {"plain": {}, "qa": QA}
        assert second.score_bits({"qa": 1.0}) == bits
    finally:
        second.stop()

    file = tmp_path / "state" / "named_mixes.json"
    file.write_text(file.read_text().replace("-0.5", "-0.25"))
    with pytest.raises(StartupError, match=r"named_mixes\.json is damaged: .*; .*or delete it"):
        start(loop, gpt2.base, tmp_path / "state")


def test_a_folder_called_as_a_named_mix_is_refused_with_remedies_that_work(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    state, folders = tmp_path / "state", tmp_path / "adapters"
    served = start(loop, gpt2.base, state)
    served.client.name_mix("qa", "base")
    served.stop()
    shutil.copytree(gpt2.adapters["a"], folders / "qa")
    with pytest.raises(StartupError) as refused:
        start(loop, gpt2.base, state, adapter_dir=folders)
    assert str(refused.value) == (
        f"qa is both a domain and a named mix: rename the folder qa in --adapter-dir {folders}, "
        "or start without it and run adapterctl unname qa"
    )
    served = start(loop, gpt2.base, state)
    served.client.unname_mix("qa")
    served.stop()
    served = start(loop, gpt2.base, state, adapter_dir=folders)
    assert [adapter.domain for adapter in served.client.adapters()] == ["qa"]
    served.stop()


def test_a_folder_called_as_a_word_of_the_syntax_is_left_out(
    loop: LoopThread, gpt2: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "base", "default"):
        shutil.copytree(gpt2.adapters["a"], tmp_path / "adapters" / name)
    with caplog.at_level(logging.WARNING, "superpose_server.runtime"):
        served = start(loop, gpt2.base, tmp_path / "state", adapter_dir=tmp_path / "adapters")
    assert [adapter.domain for adapter in served.client.adapters()] == ["a"]
    served.stop()
    assert [record.getMessage().partition("adapters/")[2] for record in caplog.records] == [
        "base: 'base' is reserved for the base model: choose another name",
        "default: 'default' is reserved for the default mix: choose another name",
    ]
    with pytest.raises(StartupError, match=r"'base' is reserved for .*; without --strict it is"):
        start(
            loop,
            gpt2.base,
            tmp_path / "state",
            adapter_dir=tmp_path / "adapters",
            strict=True,
        )


def test_an_adapter_that_an_older_server_took_as_base_is_told_of_with_ways_out(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    served = start(loop, gpt2.base, state)
    served.client.push("b", gpt2.adapters["b"])
    served.client.add("b")
    served.stop()
    names = state / "adapters" / "names.json"
    names.write_text(names.read_text().replace('"b"', '"base"'))
    journal = Journal(state)
    record = journal.read()
    assert record is not None
    entries = tuple(dataclasses.replace(entry, domain="base") for entry in record.entries)
    journal.write(dataclasses.replace(record, entries=entries))

    with pytest.raises(StartupError, match=r"names\.json: pushed adapter base: .*in this file"):
        start(loop, gpt2.base, state)
    names.write_text(names.read_text().replace('"base"', '"basic"'))
    with pytest.raises(StartupError, match="holds base, which is reserved for the base model"):
        start(loop, gpt2.base, state)
    journal.path.unlink()
    served = start(loop, gpt2.base, state)
    assert served.client.add("basic").weights == {"basic": 1.0}
    served.stop()
