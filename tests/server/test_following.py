"""Following a file, against a model of it; with everything of an operator's but the weights.

The model is written without the product's code: mixes are dicts, and adapters numbers.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.makers import make_adapter, save_base, tiny_gpt2

from superpose_adapters.adapter import Adapter
from superpose_adapters.base.facts import BaseFacts, read_facts
from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.mix import BoundEntry, BoundMix, Mix
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, Limits, parse_adapter
from superpose_adapters.shared_objects import SharedObjects
from superpose_adapters.store import AdapterStore
from superpose_server.control.actions import Operator
from superpose_server.control.audit import Audit
from superpose_server.control.default_mix import DefaultMix, MixState
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.following import Following
from superpose_server.control.journal import Journal
from superpose_server.control.mix_file import MixFile
from superpose_server.control.named_mixes import NamedMixes
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.engine.executor import ServedBase
from superpose_server.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    NotFound,
    ServerError,
    StartupError,
)

DOMAINS, NAMES, VERSIONS = ("a", "b", "c"), ("qa", "both"), (0, 1)
HUGE = 9000.0  # A weight with which no fold is finite here.
BASE = "0" * 64


@dataclass(frozen=True)
class Made:
    """A tiny base, and some adapters for it."""

    layout: Layout
    facts: BaseFacts
    files: dict[tuple[str, int], tuple[bytes, bytes]]
    digests: dict[tuple[str, int], str]


def make(folder: Path) -> Made:
    model = tiny_gpt2()
    layout = read_layout(model)
    facts = read_facts("tiny", save_base(model, folder / "base"), model)
    files, digests = {}, {}
    for seed, key in enumerate(itertools.product(DOMAINS, VERSIONS)):
        made = make_adapter(model, folder / f"{seed}", seed + 1)
        files[key] = ((made / CONFIG_NAME).read_bytes(), (made / TENSORS_NAME).read_bytes())
        digests[key] = parse_adapter(*files[key], layout, base=facts).digest
    assert len(set(digests.values())) == len(digests)
    return Made(layout, facts, files, digests)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


class Engine:
    """In the place of the engine: folds at once, or fails."""

    def __init__(self) -> None:
        self.fails = False

    def keep(self, adapter: Adapter) -> None:
        pass

    def prepare(self, mix: BoundMix) -> BoundMix:
        if any(abs(entry.weight) >= HUGE for entry in mix.entries):
            raise FailedPrecondition("the fold would not be finite", "FOLD_NOT_FINITE")
        return mix

    def commit(self, mix: BoundMix, generation: int) -> Future[BoundMix]:
        future: Future[BoundMix] = Future()
        if self.fails:
            future.set_exception(Internal("the fold failed", "FOLD_FAILED"))
        else:
            future.set_result(mix)
        return future


class World:
    """A server's parts that a followed file has to do with, over one state folder."""

    def __init__(
        self, made: Made, folder: Path, location: Path, shared: Path | None = None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.made, self.folder = made, folder
        self.names = NamedMixes(folder)
        self.registry = Registry(BASE, 8, self.names)
        self.store = AdapterStore(
            folder / "adapters", None if shared is None else SharedObjects(str(shared))
        )
        limits = Limits()
        for domain, digest in self.store.names.items():
            adapter = self.store.load(digest, made.layout, limits, base=made.facts)
            self.registry.put(Registered(domain, adapter, Source.PUSHED))
        self.engine = Engine()
        self.journal = Journal(folder)
        engine: Any = self.engine
        self.default = DefaultMix(self.journal, engine, self._restored())
        self.audit = Audit(folder)
        file = FollowedFile(str(location))
        self.operator = Operator(
            self.registry,
            self.default,
            self.store,
            engine,
            ServedBase(BASE, made.layout, made.facts, 9, 9, "float32", "cpu", 64, 4),
            limits,
            self.audit,
            file.short_name,
        )
        self.following = Following(file, 3600, self.operator.reach)

    def _restored(self) -> MixState:
        record = self.journal.read()
        if record is None:
            return MixState(0, BoundMix(BASE))
        entries = [
            BoundEntry(e.domain, self.registry.get(e.domain).adapter, e.weight)
            for e in record.entries
        ]
        assert [e.adapter_digest for e in record.entries] == [e.adapter.digest for e in entries]
        return MixState(record.generation, BoundMix.of(BASE, entries))

    def push(self, domain: str, version: int) -> None:
        self.operator.push(domain, *self.made.files[domain, version], replace=True)

    def close(self) -> None:
        self.following.close()
        self.store.close()


def write(path: Path, body: object) -> None:
    path.write_text(json.dumps(body))


# Mostly such as can be reached: else nothing moves. One in some is not, in one way.
weights = st.sampled_from([1.0, -0.5, 0.25, 0.0])
mixes = st.dictionaries(st.sampled_from(DOMAINS), weights, max_size=3)
default_mixes = st.one_of(*[mixes] * 6, st.just({"a": HUGE}))
some_pins = st.dictionaries(
    st.sampled_from(DOMAINS), st.sampled_from(VERSIONS), min_size=1, max_size=2
)
pins = st.one_of(st.builds(dict[str, int]), some_pins)
named = st.one_of(
    st.none(),
    *[st.dictionaries(st.sampled_from(NAMES), mixes, max_size=2)] * 4,
    st.just({"qa": {}, "a": {}}),
)


@dataclass(frozen=True)
class Said:
    """A file, as the model has it."""

    mix: dict[str, float]
    names: dict[str, dict[str, float]] | None
    pins: dict[str, int]


files = st.builds(Said, default_mixes, named, pins)


def without_zeros(mix: dict[str, float]) -> dict[str, float]:
    return {domain: weight for domain, weight in mix.items() if weight}


class FollowingAgainstModel(RuleBasedStateMachine):
    """What is served is what some file said last that could be, whatever happens meanwhile.

    Attributes:
        here: Which version each domain is.
        said: What the file says; None: nothing that can be followed.
        known: What was read last of it, whether or not it could be reached.
        served: The default mix; `digests` are those of its adapters.
        stored: Domains and versions whose adapters the shared store has, whoever put them there.
    """

    made: Made  # Once for all.
    shares: bool  # A store, in which what is pinned may be.

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.shared = self.root / "shared" if self.shares else None
        self.stored: set[tuple[str, int]] = set()
        if self.shared is not None:
            self.shared.mkdir()
        self.path = self.root / "mixes.json"
        self.here: dict[str, int] = {}
        self.said: Said | None = Said({}, None, {})
        self.known = self.said
        self.served: dict[str, float] = {}
        self.digests: dict[str, str] = {}
        self.names: dict[str, dict[str, float]] = {}
        self.generation = 0
        self.problem = False
        self._write()
        self.world = World(self.made, self.root / "state", self.path, self.shared)
        for domain in DOMAINS:
            self.push(domain, 0)
        self._start()

    def _write(self) -> None:
        if self.said is None:
            return
        body: dict[str, Any] = {"mix": self.said.mix}
        if self.said.names is not None:
            body["named_mixes"] = self.said.names
        if self.said.pins:
            body["adapters"] = {d: self.made.digests[d, v] for d, v in self.said.pins.items()}
        write(self.path, body)

    def _start(self) -> None:
        self.world.following.start()
        # Looks are made by hand; the thread's own come once an hour.

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self.root)

    # What the file may become.

    @rule(said=files)
    def say(self, said: Said) -> None:
        self.said = said
        self._write()

    @rule(text=st.sampled_from(["", "{", "[]", '{"mix": {"a": "1"}}', '{"mix": {}, "more": 1}']))
    def damage(self, text: str) -> None:
        self.said = None
        self.path.write_text(text)

    @rule()
    def take_away(self) -> None:
        self.said = None
        self.path.unlink(missing_ok=True)

    # What the server makes of it.

    def _expect(self, folds: bool = True) -> None:
        """Bring the model to where a look should bring the server."""
        self.problem = True
        if self.said is None:
            return
        self.known = said = self.said
        every_mix = [said.mix, *(said.names or {}).values()]
        wanted, adapters = without_zeros(said.mix), dict[str, str]()
        here = self.here | {
            d: v for d, v in said.pins.items() if (d, v) in self.stored and d not in self.names
        }
        if not all(
            (
                set().union(*every_mix, said.pins) <= set(here),
                not set(said.names or ()) & set(here),
                all(here.get(d) == version for d, version in said.pins.items()),
            )
        ):
            return
        adapters = {domain: self.made.digests[domain, here[domain]] for domain in wanted}
        changes = (wanted, adapters) != (self.served, self.digests)
        if changes and (not folds or HUGE in wanted.values()):
            return
        self.problem = False
        self.here = here
        self.generation += changes
        self.served, self.digests = wanted, adapters
        if said.names is not None:
            self.names = {name: without_zeros(mix) for name, mix in said.names.items()}

    @rule(said=files)
    def say_and_look(self, said: Said) -> None:
        self.say(said)
        self.look()

    @rule(said=files)
    def say_and_look_while_folds_fail(self, said: Said) -> None:
        self.say(said)
        self.look_while_folds_fail()

    @rule()
    def look(self) -> None:
        self._expect()
        self.world.following.look()

    @rule()
    def look_while_folds_fail(self) -> None:
        self._expect(folds=False)
        self.world.engine.fails = True
        self.world.following.look()
        self.world.engine.fails = False

    @rule()
    def start_again(self) -> None:
        self._expect()
        self.world.close()
        self.world = World(self.made, self.root / "state", self.path, self.shared)
        while self.problem:  # No start before the file can be reached; it changes nothing.
            with pytest.raises(StartupError, match=r"^--follow \S+/mixes\.json: .+") as caught:
                self._start()
            assert len(str(caught.value).splitlines()) == 1
            self.agrees()
            self.said = Said(dict.fromkeys(self.here, 1.0), None, {})
            self._write()
            self._expect()
        self._start()

    # What operators do meanwhile.

    @rule(domain=st.sampled_from(DOMAINS), version=st.sampled_from(VERSIONS))
    def push(self, domain: str, version: int) -> None:
        if self.here.get(domain) == version and domain not in self.names:
            self.world.push(domain, version)  # The same again.
            self.stored |= {(domain, version)} if self.shares else set()
            return
        digest, pinned = self.made.digests[domain, version], self.known.pins
        digests = self.digests | {d: digest for d in self.served if d == domain}
        at_the_file = without_zeros(self.known.mix) == self.served and all(
            digests[d] == self.made.digests[d, v] for d, v in pinned.items() if d in self.served
        )
        if domain in self.names:
            kind: type[ServerError] | None = AlreadyExists
        elif domain in pinned and (
            pinned[domain] != version or (domain in self.served and not at_the_file)
        ):
            kind = FailedPrecondition
        else:
            kind = None
        if kind is not None:
            with pytest.raises(kind):
                self.world.push(domain, version)
            return
        self.world.push(domain, version)
        self.stored |= {(domain, version)} if self.shares else set()
        self.here[domain] = version
        self.generation += domain in self.served
        self.digests = digests

    @precondition(lambda self: self.shares)
    @rule(domain=st.sampled_from(DOMAINS), version=st.sampled_from(VERSIONS))
    def another_server_is_pushed_to(self, domain: str, version: int) -> None:
        SharedObjects(str(self.shared)).put(*self.made.files[domain, version])
        self.stored.add((domain, version))

    @precondition(lambda self: self.known.pins)
    @rule(data=st.data())
    def push_what_is_to_be(self, data: st.DataObject) -> None:
        self.push(*data.draw(st.sampled_from(sorted(self.known.pins.items()))))

    @rule(domain=st.sampled_from(DOMAINS))
    def delete(self, domain: str) -> None:
        if domain in self.here and domain not in self.served:
            self.world.operator.delete(domain)
            del self.here[domain]
        else:
            with pytest.raises((NotFound, FailedPrecondition)):
                self.world.operator.delete(domain)

    @rule(domain=st.sampled_from(DOMAINS))
    def change_the_mix(self, domain: str) -> None:
        operator = self.world.operator
        changes: list[Callable[[], object]] = [
            lambda: operator.add(domain, 1.0, None),
            lambda: operator.remove(domain, None),
            lambda: operator.set(Mix.of({domain: 1.0}), None),
            lambda: operator.set(Mix(), None),
        ]
        for change in changes:
            with pytest.raises(FailedPrecondition, match=r"change mixes\.json instead$") as caught:
                change()
            assert caught.value.reason == "FOLLOWS_FILE"

    @precondition(lambda self: bool(self.here))
    @rule(name=st.sampled_from(NAMES), data=st.data())
    def name(self, name: str, data: st.DataObject) -> None:
        domain = data.draw(st.sampled_from(sorted(self.here)))
        if self.known.names is None:
            self.world.operator.name_mix(name, Mix.of({domain: 2.0}))
            self.names[name] = {domain: 2.0}
            return
        with pytest.raises(FailedPrecondition, match=r"follows mixes\.json") as caught:
            self.world.operator.name_mix(name, Mix.of({domain: 2.0}))
        assert caught.value.reason == "FOLLOWS_FILE"

    @precondition(lambda self: self.names)
    @rule()
    def unname(self) -> None:
        name = min(self.names)
        if self.known.names is None:
            self.world.operator.unname_mix(name)
            del self.names[name]
            return
        with pytest.raises(FailedPrecondition, match=r"follows mixes\.json"):
            self.world.operator.unname_mix(name)

    @invariant()
    def agrees(self) -> None:
        state = self.world.default.state
        assert {e.domain: e.weight for e in state.mix.entries} == self.served
        assert {e.domain: e.adapter.digest for e in state.mix.entries} == self.digests
        assert state.generation == self.generation
        assert {n.name: dict(n.mix.entries) for n in self.world.names.all()} == self.names
        here = {domain: self.made.digests[domain, v] for domain, v in self.here.items()}
        assert {r.domain: r.adapter.digest for r in self.world.registry.all()} == here
        assert self.world.store.names == here

    @invariant()
    def is_on_disk(self) -> None:
        record = self.world.journal.read()
        found = {} if record is None else {e.domain: e.weight for e in record.entries}
        assert found == self.served
        assert (record.generation if record else 0) == self.generation
        again = NamedMixes(self.root / "state")
        assert {n.name: dict(n.mix.entries) for n in again.all()} == self.names

    @invariant()
    def says_whether_it_is_there(self) -> None:
        told = self.world.following.state
        assert (told.reached, bool(told.problem)) == (not self.problem, self.problem)
        assert len(told.problem.splitlines()) <= 1


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shared store"])
def test_what_is_served_is_what_a_file_said_last_that_could_be(
    made: Made, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FollowingAgainstModel, "made", made, raising=False)
    monkeypatch.setattr(FollowingAgainstModel, "shares", shares, raising=False)
    run_state_machine_as_test(
        FollowingAgainstModel,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mixes.json"
    write(path, {"mix": {}})
    return path


@pytest.fixture
def world(made: Made, tmp_path: Path, path: Path) -> Any:
    world = World(made, tmp_path / "state", path)
    for domain in DOMAINS:
        world.push(domain, 0)
    yield world
    world.close()


def test_changes_are_recorded_as_made_by_following(world: World, path: Path) -> None:
    world.following.start()
    write(path, {"mix": {"a": 1, "b": 0.5}, "named_mixes": {"qa": {"c": 2}, "none": {}}})
    world.following.look()
    write(path, {"mix": {"a": 1, "b": 0.5}, "named_mixes": {"qa": {"c": 3}}})
    world.following.look()
    world.following.look()  # Which changes nothing, and so is no line.
    changes = world.audit.newest(100)[len(DOMAINS) :]
    assert [(c.what, c.generation_before, c.generation) for c in changes] == [
        ("set a=1,b=0.5", 0, 1),
        ("name none base", 1, 1),
        ("name qa c=2", 1, 1),
        ("unname none", 1, 1),
        ("name qa c=3", 1, 1),
    ]
    assert {(c.who, c.peer) for c in changes} == {("follow", str(path))}


def test_the_log_has_a_line_where_failing_begins_and_one_where_it_ends(
    world: World, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "superpose_server.control.following")
    world.following.start()
    said: list[list[str]] = []
    for text in ("{", "{", '{"mix": {"nope": 1}}', '{"mix": {}}', '{"mix": {"a": 1}}', "["):
        caplog.clear()
        path.write_text(text)
        world.following.look()
        said.append([record.getMessage() for record in caplog.records])
    assert [len(each) for each in said] == [1, 0, 0, 1, 0, 1]
    assert said[0] == [
        f"not at what {path} says, and serving what was: it is not JSON (JSONDecodeError)"
    ]
    assert said[3] == [f"at what {path} says again"]


def test_a_fault_of_ours_is_a_problem_and_no_end(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.following.start()
    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "having", lambda registered: 1 / 0)
        world.following.look()
        assert world.following.state.problem == "internal error: the log says more"
    world.following.look()
    assert world.following.state.reached


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"mix": {"nope": 1}}, "no adapter is loaded as 'nope': push it first"),
        ({"mix": {}, "named_mixes": {"qa": {"nope": 1}}}, "no adapter is loaded as 'nope'"),
        ({"mix": {}, "adapters": {"nope": BASE}}, "no adapter is loaded as 'nope'"),
        ({"mix": {}, "named_mixes": {"a": {}}}, "a is a domain: choose another name"),
        ({"mix": {"mine": 1}}, "mine is a named mix and no domain: use one of its domains"),
        (
            {"mix": {"mine": 1}, "named_mixes": {"mine": {"a": 1}}},
            "mine is a named mix and no domain",
        ),
        ({"mix": {}, "adapters": {"a": BASE}}, "and is to be 000000000000: push that one"),
        ({"mix": {"a": HUGE}}, "the fold would not be finite"),
        (
            {"mix": {}, "named_mixes": {f"n{n}": {} for n in range(1001)}},
            "1001 mixes are to have names, and 1000 is the most: name fewer",
        ),
    ],
)
def test_what_cannot_be_reached_says_why(
    world: World, path: Path, body: object, words: str
) -> None:
    world.operator.name_mix("mine", Mix.of({"b": 1}))
    write(path, body)
    with pytest.raises(StartupError, match=words):
        world.following.start()
    assert [each.name for each in world.names.all()] == ["mine"]
    assert world.default.state.generation == 0


def test_names_that_the_disk_refuses_leave_the_mix_too(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.following.start()
    write(path, {"mix": {"a": 1}, "named_mixes": {"qa": {"b": 1}}})

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.names._file, "write", refuse)
        world.following.look()
        assert "the names of mixes cannot be written" in world.following.state.problem
        assert world.default.state.generation == 0
    with monkeypatch.context() as patch:
        patch.setattr(world.journal, "write", refuse)
        world.following.look()
        assert "the journal cannot be written" in world.following.state.problem
        assert world.names.all() == NamedMixes(world.folder).all() == []
    world.following.look()
    assert world.following.state.reached
    assert [each.name for each in world.names.all()] == ["qa"]
    assert world.default.state.generation == 1


def test_an_adapter_that_is_pinned_comes_in_the_place_of_another(
    world: World, path: Path, made: Made
) -> None:
    old, new = (made.digests["a", version] for version in VERSIONS)
    write(path, {"mix": {"a": 1, "b": 1}, "adapters": {"a": old}})
    world.following.start()
    with pytest.raises(FailedPrecondition, match=rf"says that a is adapter {old[:12]}: change"):
        world.push("a", 1)
    write(path, {"mix": {"a": 1, "b": 1}, "adapters": {"a": new}})
    world.following.look()
    assert not world.following.state.reached
    assert world.default.state.generation == 1
    world.push("a", 1)
    assert world.default.state.generation == 2
    world.following.look()
    assert (world.following.state.reached, world.default.state.generation) == (True, 2)
    # Weights that change with it would be a mix that no file has said.
    write(path, {"mix": {"a": 2, "b": 1}, "adapters": {"a": old}})
    world.following.look()
    with pytest.raises(FailedPrecondition, match="push it under another name"):
        world.push("a", 0)
    assert world.default.state.generation == 2


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_a_new_server_takes_what_is_pinned_from_the_shared_store(
    made: Made, tmp_path: Path, path: Path, shared: Path
) -> None:
    keys = [("a", 1), ("b", 0), ("c", 0)]
    for key in keys:
        SharedObjects(str(shared)).put(*made.files[key])
    pins = {domain: made.digests[domain, version] for domain, version in keys}
    write(path, {"mix": {"a": 1, "b": 2}, "named_mixes": {"qa": {"c": 1}}, "adapters": pins})
    world = World(made, tmp_path / "state", path, shared)
    world.following.start()
    state = world.default.state
    assert state.generation == 1
    assert [(e.domain, e.adapter.digest) for e in state.mix.entries] == [
        ("a", pins["a"]),
        ("b", pins["b"]),
    ]
    assert [change.what for change in world.audit.newest(9)] == [
        "set a=1,b=2",
        *(f"load {domain} {digest}" for domain, digest in pins.items()),
        "name qa c=1",
    ]
    world.close()
    # By the next start they are its own.
    again = World(made, tmp_path / "state", path)
    again.following.start()
    assert again.default.state == state
    again.close()


def test_what_is_pinned_in_place_comes_from_the_shared_store_in_one_change(
    made: Made, tmp_path: Path, path: Path, shared: Path
) -> None:
    old, new = (made.digests["a", version] for version in VERSIONS)
    write(path, {"mix": {"a": 1}, "adapters": {"a": old}})
    SharedObjects(str(shared)).put(*made.files["a", 0])
    world = World(made, tmp_path / "state", path, shared)
    world.following.start()
    write(path, {"mix": {"a": 0.5}, "adapters": {"a": new}})
    world.following.look()
    assert f"a is adapter {old[:12]} here, and is to be {new[:12]}" in world.following.state.problem
    assert world.default.state.generation == 1
    SharedObjects(str(shared)).put(*made.files["a", 1])
    world.engine.fails = True
    world.following.look()
    assert world.following.state.problem == "the fold failed"
    assert world.store.names == {"a": old}
    assert world.registry.get("a").adapter.digest == old
    world.engine.fails = False
    world.following.look()
    assert world.following.state.reached
    assert world.default.state.generation == 2
    assert world.store.names == {"a": new}
    world.close()


def test_a_disk_that_refuses_names_leaves_everything(
    made: Made, tmp_path: Path, path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(made, tmp_path / "state", path, shared)
    world.following.start()
    SharedObjects(str(shared)).put(*made.files["a", 0])
    write(
        path,
        {
            "mix": {"a": 1},
            "named_mixes": {"qa": {"a": 1}},
            "adapters": {"a": made.digests["a", 0]},
        },
    )

    def refuse(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.store._file, "write", refuse)
        world.following.look()
    assert "free space or mend --state-dir" in world.following.state.problem
    assert world.default.state.generation == 0
    assert world.registry.all() == []
    assert world.names.all() == NamedMixes(world.folder).all() == []
    world.following.look()
    assert world.following.state.reached
    world.close()


def test_a_shared_store_that_is_away_is_asked_only_for_what_is_not_here(
    made: Made, tmp_path: Path, path: Path, shared: Path
) -> None:
    world = World(made, tmp_path / "state", path, shared)
    world.push("a", 0)
    shared.rename(tmp_path / "elsewhere")
    write(path, {"mix": {"a": 1}, "adapters": {"a": made.digests["a", 0]}})
    world.following.start()
    write(path, {"mix": {"b": 1}, "adapters": {"b": made.digests["b", 0]}})
    world.following.look()
    problem = world.following.state.problem
    assert problem.startswith("the shared store of adapters cannot be used (it is not there")
    assert str(shared) not in problem
    world.close()


def test_an_adapter_that_does_not_fit_is_not_loaded(
    made: Made, tmp_path: Path, path: Path, shared: Path
) -> None:
    model = tiny_gpt2(n_layer=3)
    other = make_adapter(model, tmp_path / "other", 1)
    files = [(other / name).read_bytes() for name in (CONFIG_NAME, TENSORS_NAME)]
    digest = SharedObjects(str(shared)).put(*files)
    write(path, {"mix": {"a": 1}, "adapters": {"a": digest}})
    world = World(made, tmp_path / "state", path, shared)
    with pytest.raises(StartupError, match=r"^--follow \S+: a: .*") as caught:
        world.following.start()
    assert "start without" not in str(caught.value)
    assert world.registry.all() == []
    world.close()


@pytest.mark.parametrize("source", [Source.BUNDLED, Source.DIRECTORY])
def test_what_is_read_only_is_never_another_adapter(
    made: Made, tmp_path: Path, path: Path, shared: Path, source: Source
) -> None:
    SharedObjects(str(shared)).put(*made.files["a", 1])
    world = World(made, tmp_path / "state", path, shared)
    adapter = parse_adapter(*made.files["a", 0], made.layout, base=made.facts)
    world.registry.put(Registered("a", adapter, source))
    write(path, {"mix": {"a": 1}, "adapters": {"a": made.digests["a", 1]}})
    with pytest.raises(StartupError, match=r"read only, .*: let the file say another name"):
        world.following.start()
    assert world.registry.get("a").adapter == adapter
    world.close()


@pytest.mark.parametrize(
    "body",
    [
        {"mix": {"nope": 1}},
        {"mix": {}, "adapters": {"nope": BASE}},
        {"mix": {}, "adapters": {"a": BASE}},
    ],
)
def test_a_start_says_how_to_push_what_only_a_running_server_takes(
    world: World, path: Path, body: object
) -> None:
    write(path, body)
    with pytest.raises(StartupError, match=r"; start without --follow, push it, and start again$"):
        world.following.start()


def test_nothing_is_reached_after_the_end(made: Made, tmp_path: Path, path: Path) -> None:
    world = World(made, tmp_path / "state", path)
    world.push("a", 0)
    world.following.start()
    world.following.stop()
    write(path, {"mix": {"a": 1}})
    world.following.look()
    assert world.default.state.generation == 0
    assert world.following.state.reached  # As of the last look while it served.
    world.close()


def test_a_thread_looks_now_and_then(path: Path) -> None:
    seen: list[MixFile] = []
    following: list[Following] = []

    def reach(file: MixFile) -> None:
        seen.append(file)
        if len(seen) == 5:
            following[0].stop()

    following.append(Following(FollowedFile(str(path)), 0.001, reach))
    following[0].start()
    following[0]._thread.join(60)
    assert seen == [MixFile({})] * 5
