"""Every parser that strangers' bytes reach: how it is asked, and what it may answer.

A parser gives a value or raises one of its own errors. Beyond that a value is held against somebody
else's reading where there is one: the safetensors library, Python's own JSON, the writer of MIX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from google.protobuf.message import DecodeError, Message
from safetensors.torch import load, save
from tests.chaos.mutation import (
    json_bytes,
    message_bytes,
    mutate_text,
    safetensors_bytes,
)
from tests.chaos.server import CHAT_TEMPLATE
from tests.chaos.valid_requests import HTTP, every_rpc
from tests.makers import make_adapter, save_base, tiny_gpt2, tiny_tokenizer

from superpose_adapters.adapter import AdapterError
from superpose_adapters.base.facts import BaseFacts, read_facts
from superpose_adapters.digest import canonical_digest
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.mix_syntax import format_mix, mix_from_json, parse_mix
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, parse_adapter
from superpose_adapters.peft.training_record import training_warnings
from superpose_adapters.provenance import (
    METADATA_KEY,
    Provenance,
    ProvenanceError,
    Source,
    read_provenance,
)
from superpose_adapters.store import AdapterStore
from superpose_adapters.store_error import StoreError
from superpose_adapters.strict_json import StrictJsonError, read_object
from superpose_adapters.tensorfile import with_metadata
from superpose_adapters.text_encoder import TextEncoder
from superpose_proto.v1 import inference_pb2, mix_pb2
from superpose_server.control.checked_file import FileDamaged
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.journal import Journal, JournalEntry, Record
from superpose_server.control.mix_file import MixFileError
from superpose_server.control.named_mixes import NamedMixes
from superpose_server.door.contract.convert import (
    fit_from_wire,
    generate_from_wire,
    mix_from_wire,
    score_from_wire,
)
from superpose_server.door.http import chat, completions, score
from superpose_server.door.http.mix import requested_mix
from superpose_server.door.http.sampling import max_tokens, sampling_params
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.errors import ServerError
from superpose_server.inference.encoding import Encoder

CONTEXT = 64
VOCABULARY = 257
_TRAINING = {
    "base_digest": "0" * 64,
    "parameters": {"rank": 4, "alpha": 8},
    "data": [{"file": "law.jsonl", "sha256": "1" * 64}],
    "special_tokens": ["<s>"],
    "losses": [3.5, 3.25],
}
_MERGED = Provenance(
    "core-ties",
    {"density": 0.2, "seed": 7, "scale": True, "space": "core"},
    (Source("math", "0" * 64, 1.0), Source("law", "1" * 64, -0.5)),
)
_MIXES = (
    *("math=1,medicine=0.5", "math;medicine", "base", "default", " math = -0.25 ; a.b-c_d = 1e-3 "),
    *("a=+.5,b=1.e2", "math", "m0=0", "z=-10000,y=10000"),
)


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: Its own.
        seeds: Valid inputs.
        mutate: Makes an input of one that was read.
        read: Asks the parser; raises one of `errors`, or AssertionError for a value that is wrong.
        errors: What it may raise.
        names_files: Whether its errors are for operators, and name files of theirs.
    """

    name: str
    seeds: tuple[bytes, ...]
    mutate: Callable[[Random, bytes], bytes]
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    names_files: bool = False


class Workspace:
    """A tiny base, real adapters for it, and folders that parsers read from."""

    def __init__(self, folder: Path) -> None:
        """Make all that in `folder`, which exists."""
        model = tiny_gpt2()
        self.folder = folder
        self._model = model
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        self.base = save_base(model, folder / "base", tokenizer)
        self.layout: Layout = read_layout(model)
        self.facts: BaseFacts = read_facts("tiny", self.base, model)
        self.adapters = [
            make_adapter(model, folder / "adapters" / name, seed, **fields)
            for seed, (name, fields) in enumerate(_ADAPTERS.items())
        ]
        self.encoder = Encoder(
            TextEncoder(tokenizer, VOCABULARY), Tokenizer(self.base), CONTEXT, 256, 2048
        )

    def files(self, adapter: Path) -> tuple[bytes, bytes]:
        """Return an adapter's config and tensors."""
        return (adapter / CONFIG_NAME).read_bytes(), (adapter / TENSORS_NAME).read_bytes()

    def others(self) -> list[tuple[bytes, bytes]]:
        """Return one adapter as it is known to be saved: renamed, with copies beside, merged."""
        config, tensors = self.files(self.adapters[0])
        factors = load(tensors)
        copied = {
            f"base_model.model.{n}": t for n, t in self._model.state_dict().items() if "wte" in n
        }
        return [
            (config, save({f"base_model.model._orig_mod.{n[17:]}": t for n, t in factors.items()})),
            (
                config,
                save({n[17:].replace(".weight", ".law.weight"): t for n, t in factors.items()}),
            ),
            (config, save(factors | copied)),
            (config, save({n.replace("transformer.", ""): t for n, t in factors.items()})),
            (json.dumps(json.loads(config) | {"task_type": "SEQ_2_SEQ_LM"}).encode(), tensors),
            (config, with_metadata(tensors, _MERGED.metadata)),
        ]


# Of every way to name targets, ranks and scalings.
_ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2},
    "patterns": {
        "target_modules": r".*\.(c_attn|c_proj)",
        "rank_pattern": {r".*\.0\..*": 2},
        "alpha_pattern": {"c_attn": 4},
        "use_rslora": True,
    },
    "layers": {"layers_to_transform": [1], "layers_pattern": ["h"], "r": 1},
    "linear": {"target_modules": "all-linear", "r": 1, "dtype": torch.float16},
}


def make_targets(workspace: Workspace) -> list[Target]:
    """Return all of them."""
    return [
        *_files_of_strangers(workspace),
        *_files_of_state(workspace),
        *_mixes(),
        _followed(workspace),
        *(_rpc(workspace, kind, seeds) for kind, seeds in _requests().items()),
        *_bodies(workspace),
    ]


# Files that come with an adapter.


def _files_of_strangers(workspace: Workspace) -> list[Target]:
    files = [*map(workspace.files, workspace.adapters), *workspace.others()]
    all_tensors = [tensors for _, tensors in files]

    def read_config(config: bytes) -> None:
        for tensors in all_tensors:  # It may be right, and that of others.
            try:
                _check_adapter(config, tensors)
                return
            except AdapterError as error:
                refused = error
                if error.reason == "CONFIG_INVALID":
                    raise
        raise refused

    def read_tensors(tensors: bytes) -> None:
        for config, _ in files:
            try:
                _check_adapter(config, tensors)
                return
            except AdapterError as error:
                refused = error
        raise refused

    def _check_adapter(config: bytes, tensors: bytes) -> None:
        adapter = parse_adapter(config, tensors, workspace.layout, base=workspace.facts)
        _check_lines(*adapter.warnings)
        # What is accepted is what the format's own library reads, to the last byte.
        theirs = load(tensors)
        for name, factors in adapter.modules.items():
            assert math.isfinite(factors.scaling), name
            for factor, found in (("A", factors.a), ("B", factors.b)):
                stored = theirs.get(f"base_model.model.{name}.lora_{factor}.weight")
                assert stored is None or torch.equal(stored.float(), found)
                assert bool(torch.isfinite(found).all()), name

    def read_training(record: bytes) -> None:
        _check_lines(*training_warnings(record, workspace.facts))

    def read_merged(text: bytes) -> None:
        # As a header of a tensor file has it: JSON too, and so whatever JSON can spell.
        found = read_provenance(text.decode(errors="surrogateescape"))
        assert found.text.isprintable()
        assert read_provenance(found.text) == found
        for source in found.sources:
            assert parse_mix(format_mix({source.domain: source.weight}))
        assert all(isinstance(value, int | float | str) for value in found.options.values())

    return [
        Target(
            "adapter_config.json",
            tuple(config for config, _ in files),
            json_bytes,
            read_config,
            (AdapterError,),
        ),
        Target(
            "adapter_model.safetensors",
            tuple(tensors for _, tensors in files),
            safetensors_bytes,
            read_tensors,
            (AdapterError,),
        ),
        Target("training.json", (_json(_TRAINING),), json_bytes, read_training, ()),
        Target(
            METADATA_KEY,
            (_MERGED.text.encode(),),
            json_bytes,
            read_merged,
            (ProvenanceError,),
        ),
    ]


# Files of the state folder, as a failing disk or a hand might leave them.


def _files_of_state(workspace: Workspace) -> list[Target]:
    folder = workspace.folder / "state"
    folder.mkdir()
    digest = "0123456789abcdef" * 4
    record = Record(
        7, digest, digest, (JournalEntry("math", digest, 0.5), JournalEntry("law", digest, -1.0))
    )
    journal = Journal(folder)
    journal.write(record)
    (folder / "named_mixes.json").write_bytes(
        _checked({"qa": {"math": 1.0, "law": 0.5}, "both": {"math": -1.0}})
    )
    names = folder / "named_mixes.json"
    store = workspace.folder / "store"
    with AdapterStore(store) as opened:
        for adapter in workspace.adapters[:2]:
            digest_of = opened.put(*workspace.files(adapter))
            opened.set_name(adapter.name, digest_of, [f"of {adapter.name}"])
        opened.set_name("merged", digest_of, (), _MERGED)
    index = store / "names.json"

    def read_journal(data: bytes) -> None:
        journal.path.write_bytes(data)
        found = journal.read()
        assert isinstance(found, Record)
        assert type(found.generation) is int
        assert found.generation >= 0
        for text in (found.base_digest, found.mix_digest):
            assert isinstance(text, str)
        for entry in found.entries:
            assert isinstance(entry.domain, str)
            assert isinstance(entry.adapter_digest, str)
            assert math.isfinite(entry.weight)

    def read_names(data: bytes) -> None:
        names.write_bytes(data)
        NamedMixes(folder)

    def read_index(data: bytes) -> None:
        index.write_bytes(data)
        AdapterStore(store).close()

    damaged = (FileDamaged,)
    seeds = journal.path.read_bytes(), names.read_bytes(), index.read_bytes()
    return [
        Target("mix.json", seeds[:1], _checked_bytes, read_journal, damaged, names_files=True),
        Target(
            "named_mixes.json", seeds[1:2], _checked_bytes, read_names, damaged, names_files=True
        ),
        Target("names.json", seeds[2:], json_bytes, read_index, (StoreError,), names_files=True),
    ]


def _checked(body: Any) -> bytes:
    return _json({"format": 1, "body": body, "checksum": canonical_digest(body)})


def _checked_bytes(random: Random, data: bytes) -> bytes:
    """Mutate a checked file; mostly its body, under a checksum that is right."""
    changed = json_bytes(random, data)
    if random.random() < 0.3:
        return changed
    try:
        return _checked(json.loads(changed)["body"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return changed


# Mixes as people write them.


def _mixes() -> list[Target]:
    def read_mix(data: bytes) -> None:
        weights = parse_mix(data.decode(errors="replace"))
        if weights is not None:
            assert parse_mix(format_mix(weights)) == weights

    def mutate(random: Random, data: bytes) -> bytes:
        return mutate_text(random, data.decode(errors="replace")).encode("utf-8", "replace")

    def read_json_mix(data: bytes) -> None:
        read = read_object(data)
        assert repr(read) == repr(json.loads(data))
        weights = mix_from_json(read)
        assert parse_mix(format_mix(weights)) == weights

    return [
        Target("MIX", tuple(mix.encode() for mix in _MIXES), mutate, read_mix, (ValueError,)),
        Target(
            "a mix in JSON",
            (_json({"math": 1, "medicine": 0.5}), b"{}"),
            json_bytes,
            read_json_mix,
            (ValueError,),
        ),
    ]


# The file that servers follow.


def _followed(workspace: Workspace) -> Target:
    path = workspace.folder / "mixes.json"
    followed = FollowedFile(str(path))
    digest = "0123456789abcdef" * 4

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found, theirs = followed.read(), json.loads(data)
        assert set(theirs) <= {"mix", "named_mixes", "adapters"}
        assert parse_mix(format_mix(found.mix)) == theirs["mix"]
        assert (found.named_mixes is None) == ("named_mixes" not in theirs)
        for name, mix in (found.named_mixes or {}).items():
            assert parse_mix(format_mix({name: 1.0})) == {name: 1.0}
            assert parse_mix(format_mix(mix)) == theirs["named_mixes"][name]
        assert found.adapters == theirs.get("adapters", {})
        for domain, named in found.adapters.items():
            assert parse_mix(format_mix({domain: 1.0})) == {domain: 1.0}
            assert len(bytes.fromhex(named)) == 32

    seeds = (
        _json({"mix": {}}),
        _json({"mix": {"math": 1, "law": -0.5}, "named_mixes": {}}),
        _json(
            {
                "mix": {"math": 0.5},
                "named_mixes": {"qa": {"math": 1, "law": 0.5}, "none": {}},
                "adapters": {"math": digest, "law": digest[::-1]},
            }
        ),
    )
    return Target("a file to follow", seeds, json_bytes, read, (MixFileError,), names_files=True)


# Requests.


def _requests() -> dict[type[Message], tuple[bytes, ...]]:
    """Return valid messages of every kind that is sent to a server."""
    seeds: dict[type[Message], tuple[bytes, ...]] = {}
    for call in every_rpc():
        kind = type(call.message)
        seeds[kind] = (*seeds.get(kind, ()), call.message.SerializeToString())
    return seeds


def _rpc(workspace: Workspace, kind: type[Message], seeds: Sequence[bytes]) -> Target:
    encoder = workspace.encoder

    def read(data: bytes) -> None:
        message: Any = kind.FromString(data)
        match message:
            case inference_pb2.GenerateRequest() | inference_pb2.GenerateStreamRequest():
                asked = generate_from_wire(message)
                encoder.check(asked, len(encoder.prompt(asked.prompt)))
                asked.options.within(CONTEXT - 1)
            case inference_pb2.ScoreRequest():
                encoder.score_rows(score_from_wire(message))
            case inference_pb2.FitMixRequest():
                encoder.rows(fit_from_wire(message))
            case mix_pb2.SetMixRequest() | mix_pb2.AnalyzeMixRequest() | mix_pb2.NameMixRequest():
                mix_from_wire(message.mix)

    return Target(
        kind.__name__, tuple(seeds), message_bytes(kind), read, (ServerError, DecodeError)
    )


def _bodies(workspace: Workspace) -> list[Target]:
    def reader(form: Any) -> Callable[[bytes], None]:
        def read(body: bytes) -> None:
            asked = form.read(read_object(body))
            requested_mix(asked)
            if form is not score.FORM:
                sampling_params(
                    asked,
                    max_new_tokens=max_tokens(asked),
                    logprobs=bool(asked.get("logprobs")),
                    top_logprobs=asked.get("top_logprobs", 0),
                )

        return read

    return [
        Target(
            f"body of {path}",
            tuple(call.body for call in HTTP if call.path == path),
            json_bytes,
            reader(form),
            (ServerError, StrictJsonError),
        )
        for path, form in (
            ("/v1/completions", completions.FORM),
            ("/v1/chat/completions", chat.FORM),
            ("/v1/score", score.FORM),
        )
    ]


def _check_lines(*lines: str) -> None:
    for line in lines:
        assert "\n" not in line, line
        assert len(line) < 2000, line[:200]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
