from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from superpose_adapters.layout import ModuleLayout
from superpose_adapters.peft.folder import parse_adapter
from superpose_adapters.provenance import (
    MAX_BYTES,
    METADATA_KEY,
    Provenance,
    ProvenanceError,
    Source,
    read_provenance,
)
from superpose_adapters.store import AdapterStore
from superpose_adapters.store_error import StoreError

DIGEST = "0123456789abcdef" * 4
LAYOUT = {"m": ModuleLayout(3, 2, transposed=False)}
MERGED = Provenance(
    "core-ties",
    {"density": 0.2, "mean": True, "seed": 7, "space": "core"},
    (Source("math", DIGEST, 1.0), Source("medicine", "f" * 64, -0.5)),
)
FIELDS: dict[str, Any] = {
    "method": "core-ties",
    "options": {"density": 0.2, "mean": True, "seed": 7, "space": "core"},
    "sources": [
        {"domain": "math", "digest": DIGEST, "weight": 1},
        {"domain": "medicine", "digest": "f" * 64, "weight": -0.5},
    ],
}


def files(provenance: str | None, *, seed: float = 1.0) -> tuple[bytes, bytes]:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]}
    tensors = {
        "base_model.model.m.lora_A.weight": torch.full((1, 3), seed),
        "base_model.model.m.lora_B.weight": torch.ones(2, 1),
    }
    metadata = {"format": "pt"} if provenance is None else {METADATA_KEY: provenance}
    return json.dumps(config).encode(), save(tensors, metadata)


def test_a_text_as_anybody_would_write_it_is_read() -> None:
    assert read_provenance(json.dumps(FIELDS, indent=2)) == MERGED


WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True).filter(
    lambda word: word not in ("base", "default")
)
VALUES = (
    st.booleans()
    | st.integers(1 - 2**53, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20).filter(str.isprintable)
)
WEIGHTS = st.floats(-1e4, 1e4).filter(bool)
SOURCES = st.builds(Source, WORDS, st.from_regex("[0-9a-f]{64}", fullmatch=True), WEIGHTS)


@given(WORDS, st.dictionaries(WORDS, VALUES, max_size=4), st.lists(SOURCES, min_size=1, max_size=4))
def test_what_is_written_is_read(method: str, options: Any, sources: list[Source]) -> None:
    written = Provenance(method, options, tuple(sources))
    assert written.text.isascii()
    assert written.text.isprintable()
    assert read_provenance(written.text) == written
    assert repr(read_provenance(written.text).options) == repr(dict(sorted(options.items())))


def source(**fields: Any) -> dict[str, Any]:
    return FIELDS | {"sources": [FIELDS["sources"][0] | fields]}


MALFORMED: dict[str, tuple[Any, str]] = {
    "another object": ({"merged": True}, "it is no object of method, options, sources"),
    "one field more": (FIELDS | {"by": "me"}, "it is no object of method, options, sources"),
    "a method's number": (FIELDS | {"method": 3}, "method is no word"),
    "a method's line": (FIELDS | {"method": "sum\nof all"}, r'method is "sum\\nof all"'),
    "options as pairs": (FIELDS | {"options": []}, "options are no object"),
    "many options": (FIELDS | {"options": {f"o{n}": 0 for n in range(65)}}, "has 65 options"),
    "an option's name": (FIELDS | {"options": {"a b": 1}}, 'an option is called "a b"'),
    "nested": (FIELDS | {"options": {"density": [0.2]}}, "option density is no number"),
    "null": (FIELDS | {"options": {"density": None}}, "option density is no number"),
    "a huge number": (FIELDS | {"options": {"seed": 2**53}}, "option seed is no number"),
    "a long text": (FIELDS | {"options": {"space": "x" * 201}}, "option space is no number"),
    "two lines": (FIELDS | {"options": {"space": "x\ny"}}, "option space is no number"),
    "one source": (FIELDS | {"sources": FIELDS["sources"][0]}, "sources are no list"),
    "no source": (FIELDS | {"sources": []}, "names no sources"),
    "a name": (FIELDS | {"sources": ["math"]}, "a source is no object of domain, digest, weight"),
    "a bad name": (source(domain="../math"), "'../math' is not a valid name"),
    "a word of MIX": (source(domain="base"), "'base' is reserved for the base model"),
    "a name's number": (source(domain=1), "of a source is no text"),
    "a short digest": (source(digest="abc"), "digest of math is no sha256 in hex"),
    "a weight's text": (source(weight="1"), 'weight of "math" is no number'),
    "a truth value": (source(weight=True), 'weight of "math" is no number'),
    "a large weight": (source(weight=1e5), "weight of math is 100000.0: use a number between"),
    "an endless weight": (source(weight=10**400), 'weight of "math" is out of range'),
    "no weight": (source(weight=0), "weight of math is 0"),
    "too long": (FIELDS | {"sources": FIELDS["sources"] * 400}, f"at most {MAX_BYTES}"),
}
TEXTS = {
    "nothing": ("", "is not JSON"),
    "a list": ("[]", "is not a JSON object"),
    "not a number": (json.dumps(FIELDS).replace("0.2", "NaN"), "holds NaN"),
    "beyond a float": (json.dumps(FIELDS).replace("0.2", "1e999"), "option density is no number"),
    "twice": (json.dumps(FIELDS)[:-1] + ', "method": "sum"}', 'names "method" twice'),
    "half a character": (json.dumps(FIELDS | {"method": "\ud800"}), "half a character"),
    "deep": ('{"a":' * 5000 + "1" + "}" * 5000, "is not JSON|is nested"),
}
ALL = {name: (json.dumps(value), why) for name, (value, why) in MALFORMED.items()} | TEXTS


@pytest.mark.parametrize(("text", "why"), ALL.values(), ids=ALL)
def test_what_is_malformed_is_a_warning_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ProvenanceError, match=why) as caught:
        read_provenance(text)
    assert str(caught.value).isprintable()
    adapter = parse_adapter(*files(text), LAYOUT)
    assert adapter.provenance is None
    (warning,) = adapter.warnings
    assert f"{METADATA_KEY} of adapter_model.safetensors cannot be read" in warning
    assert "what the adapter was merged from is not known" in warning
    assert warning.isprintable()
    assert len(warning) < 500


def test_an_adapter_says_where_it_comes_from_and_its_digest_does_not_depend_on_it() -> None:
    plain, merged, broken = (
        parse_adapter(*files(text), LAYOUT) for text in (None, MERGED.text, "{")
    )
    assert (plain.provenance, merged.provenance) == (None, MERGED)
    assert plain.warnings == merged.warnings == ()
    assert plain.digest == merged.digest == broken.digest


def test_a_store_keeps_it_with_the_name(tmp_path: Path) -> None:
    other = Provenance("sum", {}, (Source("law", DIGEST, 1.0),))
    with AdapterStore(tmp_path) as store:
        digest = store.put(*files(MERGED.text))
        assert store.put(*files(other.text)) == digest  # One effect, and so one object.
        store.set_name("one", digest, (), MERGED)
        store.set_name("two", digest, ["said"], other)
        store.set_name("three", digest, ["said"])
        store.set_name("four", digest)
    written = json.loads((tmp_path / "names.json").read_bytes())
    assert written["four"] == digest
    assert written["three"] == [digest, "said"]
    assert written["one"] == {"digest": digest, "warnings": [], "provenance": FIELDS}
    with AdapterStore(tmp_path) as store:
        assert store.names == dict.fromkeys(("one", "two", "three", "four"), digest)
        assert [store.named(name).provenance for name in ("one", "two", "three", "four")] == [
            MERGED,
            other,
            None,
            None,
        ]
        assert store.named("two").warnings == store.named("three").warnings == ("said",)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"sources": []}, "one: names no sources"),
        ({"method": None}, "one: method is no word"),
    ],
)
def test_a_store_that_lost_it_is_damaged(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    with AdapterStore(tmp_path) as store:
        store.set_name("one", store.put(*files(MERGED.text)), (), MERGED)
    index = tmp_path / "names.json"
    written = json.loads(index.read_bytes())
    written["one"]["provenance"] |= fields
    index.write_text(json.dumps(written))
    with pytest.raises(StoreError, match=rf"names\.json: damaged \({why}\)"):
        AdapterStore(tmp_path)
