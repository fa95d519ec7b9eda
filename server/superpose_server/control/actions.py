"""What operators do: change the default mix, name mixes, push and delete adapters, analyse a mix.

Everything here runs on one thread, one action after the other, so that no two changes meet.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, nullcontext

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.geometry import Analysis
from superpose_adapters.mix import BoundEntry, BoundMix, Mix
from superpose_adapters.mix_syntax import check_name, check_weight, format_mix
from superpose_adapters.peft.folder import Limits, parse_adapter
from superpose_adapters.shared_objects import SharedStoreError
from superpose_adapters.store import AdapterStore, Named
from superpose_adapters.store_error import StoreError
from superpose_server.control.audit import Audit
from superpose_server.control.default_mix import DefaultMix, MixState
from superpose_server.control.merger import Merged
from superpose_server.control.mix_file import MixFile
from superpose_server.control.named_mixes import NamedMix
from superpose_server.control.registry import Registered, Registry, Source
from superpose_server.engine.executor import Executor, ServedBase
from superpose_server.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from superpose_server.weights.resident import PreparedMix

# Of adapters that are read only.
_ORIGINS = {
    Source.BUNDLED: "comes with the bundled base",
    Source.DIRECTORY: "is served from --adapter-dir",
}
_log = logging.getLogger(__name__)


class Operator:
    """The actions of operators; not safe for more than one thread at a time."""

    def __init__(
        self,
        registry: Registry,
        default_mix: DefaultMix,
        store: AdapterStore,
        engine: Executor,
        base: ServedBase,
        limits: Limits,
        audit: Audit,
        follows: str = "",
    ) -> None:
        """Act on these; `audit` is told what was changed.

        `follows` is what to call the file that the server follows; "" if it follows none.
        """
        self._registry = registry
        self._default = default_mix
        self._store = store
        self._engine = engine
        self._base = base
        self._limits = limits
        self._audit = audit
        self._follows = follows
        # What that file said last, whether or not it could be reached.
        self._wanted = MixFile({})

    def add(self, domain: str, weight: float, expected_generation: int | None) -> MixState:
        """Add a domain to the default mix.

        Raises:
            AlreadyExists: It is in it.
            NotFound: It names no adapter.
            InvalidArgument: The weight is 0 or no weight at all.
            GenerationMismatch: The default mix has changed.
            FailedPrecondition: A file says what the default mix is.
        """
        self._check_free("what the default mix is")
        self._default.check_generation(expected_generation)
        _check_name(domain)
        try:
            check_weight(domain, weight)
        except ValueError as error:
            raise InvalidArgument(str(error), "INVALID_WEIGHT", field="weight") from error
        if weight == 0:
            raise InvalidArgument(
                f"weight of {domain} is 0, which means absent: use another weight, or remove it",
                "INVALID_WEIGHT",
                field="weight",
            )
        now = self._default.state.mix
        registered = self._registry.get(domain)
        if _holds(now, domain):
            raise AlreadyExists(
                f"{domain} is in the default mix already: to change its weight, set the whole mix "
                "or remove it first",
                "DOMAIN_IN_MIX",
            )
        self._registry.check_size(len(now.entries) + 1, field="domain")
        entry = BoundEntry(domain, registered.adapter, weight)
        mix = BoundMix.of(now.base_digest, (*now.entries, entry))
        return self._change(f"add {format_mix({domain: weight})}", mix)

    def remove(self, domain: str, expected_generation: int | None) -> MixState:
        """Remove a domain from the default mix.

        Raises:
            NotFound: It is not in it.
            GenerationMismatch: The default mix has changed.
            FailedPrecondition: A file says what the default mix is.
        """
        self._check_free("what the default mix is")
        self._default.check_generation(expected_generation)
        now = self._default.state.mix
        if not _holds(now, domain):
            held = ", ".join(sorted(e.domain for e in now.entries)) or "no domain"
            raise NotFound(
                f"{domain[:80]!r} is not in the default mix, which holds {held}",
                "DOMAIN_NOT_IN_MIX",
            )
        rest = (entry for entry in now.entries if entry.domain != domain)
        return self._change(f"remove {domain}", BoundMix.of(now.base_digest, rest))

    def set(self, mix: Mix, expected_generation: int | None) -> MixState:
        """Make `mix` the default mix.

        Raises:
            NotFound: It names a domain that is not loaded.
            GenerationMismatch: The default mix has changed.
            FailedPrecondition: A file says what the default mix is.
        """
        self._check_free("what the default mix is")
        self._default.check_generation(expected_generation)
        return self._change(f"set {format_mix(dict(mix.entries))}", self._registry.bind(mix))

    def reach(self, wanted: MixFile) -> MixState:
        """Go to what a followed file says: all of it or, if that cannot be, nothing.

        What it says by digest, and what is not here under its domain, is taken from the store, if
        that has it. The same again changes nothing.

        Raises:
            NotFound: A domain is not loaded.
            AlreadyExists: A mix is to have the name of a domain.
            InvalidArgument: A mix has too many domains, or holds a mix.
            FailedPrecondition: A domain names another adapter, and the store has not the one that
                it is to name, or one that is unfit; the fold would not be finite, there are too
                many names, or the store or the disk refuses.
            Internal: The fold failed.
        """
        self._wanted = wanted
        loaded = self._load(wanted.adapters)
        registry = self._registry.having(loaded)
        mix = _of_domains(registry, wanted.mix)
        what, bound = f"set {format_mix(dict(mix.entries))}", registry.bind(mix)
        named: dict[str, Mix] | None = None
        if wanted.named_mixes is not None:
            named = {n: _of_domains(registry, mix) for n, mix in wanted.named_mixes.items()}
        for name in named or ():
            if registry.find(name) is not None:
                raise AlreadyExists(f"{name} is a domain: choose another name", "NAME_TAKEN")
        before = {each.name: each.mix for each in self._registry.named_mixes.all()}
        with self._registry.named_mixes.replacing(before if named is None else named):
            with self._naming(loaded):
                state = self._change(what, bound)
            self._registry.put(*loaded)
        for registered in loaded:
            self._note(f"load {registered.domain} {registered.adapter.digest}")
            registered.log_warnings()
        if named is not None:
            for name in sorted(before.keys() - named.keys()):
                self._note(f"unname {name}")
            for name, mix_of_name in sorted(named.items()):
                if before.get(name) != mix_of_name:
                    self._note(f"name {name} {format_mix(dict(mix_of_name.entries))}")
        if loaded:
            self.collect()
        return state

    def _load(self, wanted: Mapping[str, str]) -> list[Registered]:
        """Return those of the adapters {domain: digest} that their domains do not name yet.

        They are read from the store, and named by nobody yet.

        Raises:
            NotFound: A domain names nothing, and the store has not that adapter.
            InvalidArgument: A mix has that name.
            FailedPrecondition: A domain names another one, and the store has not that adapter, or
                the domain is read only; the adapter is unfit, or the store cannot be read.
        """
        loaded = []
        for domain, digest in wanted.items():
            before = self._registry.find(domain)
            if before is not None and before.adapter.digest == digest:
                continue
            if before is None:
                _check_no_mix(self._registry, domain)
            elif before.source is not Source.PUSHED:
                raise FailedPrecondition(
                    f"{domain} is adapter {before.adapter.digest[:12]} here, which "
                    f"{_ORIGINS[before.source]} and is read only, and is to be {digest[:12]}: let "
                    "the file say another name, and push that one under it",
                    "ADAPTER_READ_ONLY",
                )
            try:
                adapter = self._store.load(
                    digest, self._base.layout, self._limits, base=self._base.facts
                )
            except KeyError:
                here = self._registry.get(domain).adapter.digest
                raise FailedPrecondition(
                    f"{domain} is adapter {here[:12]} here, and is to be {digest[:12]}: push that "
                    "one in its place, or change the file",
                    "ADAPTER_DIFFERS",
                ) from None
            except StoreError as error:
                raise _store_failed(error) from error
            except AdapterError as error:
                raise FailedPrecondition(f"{domain}: {error}", error.reason) from error
            self._engine.keep(adapter)
            loaded.append(Registered(domain, adapter, Source.PUSHED))
        return loaded

    @contextmanager
    def _naming(self, registered: Iterable[Registered]) -> Generator[None]:
        """Name stored adapters durably; not if what is done meanwhile raises.

        Raises:
            FailedPrecondition: The disk refuses.
        """
        named = {each.domain: _named(each.adapter) for each in registered}
        try:
            with self._store.naming(named) if named else nullcontext():
                yield
        except StoreError as error:
            raise _store_failed(error) from error

    def _check_free(self, what: str) -> None:
        """Refuse a call that changes what a followed file says.

        Raises:
            FailedPrecondition: There is such a file.
        """
        if self._follows:
            raise FailedPrecondition(
                f"this server follows {self._follows}, which says {what}: change {self._follows} "
                "instead",
                "FOLLOWS_FILE",
            )

    def _change(self, what: str, mix: BoundMix) -> MixState:
        before = self._default.state
        state = self._default.change(mix)
        if state.generation != before.generation:
            self._audit.note(what, before, state)
        return state

    def name_mix(self, name: str, mix: Mix | None) -> NamedMix:
        """Let `name` stand for the domains of `mix` (None: the default mix) as it is now.

        Raises:
            AlreadyExists: It names a domain.
            NotFound: The mix names a domain that is not loaded.
            FailedPrecondition: Too many mixes have names, the disk refuses, or a file says which
                there are.
        """
        self._check_names_free()
        _check_name(name, "name")
        if self._registry.find(name) is not None:
            raise AlreadyExists(f"{name} is a domain: choose another name", "NAME_TAKEN")
        bound = self._default.state.mix if mix is None else self._registry.bind(mix)
        named = NamedMix(name, Mix.of((entry.domain, entry.weight) for entry in bound.entries))
        if self._registry.named_mixes.find(name) != named.mix:
            self._registry.named_mixes.put(named)
            self._note(f"name {name} {format_mix(dict(named.mix.entries))}")
        return named

    def unname_mix(self, name: str) -> None:
        """Take the name of a mix away.

        Raises:
            NotFound: No mix has this name.
            FailedPrecondition: The disk refuses, or a file says which there are.
        """
        self._check_names_free()
        self._registry.named_mixes.remove(name)
        self._note(f"unname {name}")

    def _check_names_free(self) -> None:
        if self._wanted.named_mixes is not None:
            self._check_free("which mixes have names")

    def _note(self, what: str, before: MixState | None = None) -> None:
        """Record a change that has left the default mix alone, or came to it from `before`."""
        now = self._default.state
        self._audit.note(what, before or now, now)

    def check_domain(self, domain: str) -> None:
        """Refuse a name that no adapter may have, whatever the adapter.

        Raises:
            InvalidArgument: It is no name.
            AlreadyExists: It names a mix.
        """
        _check_name(domain)
        if self._registry.named_mixes.find(domain) is not None:
            raise AlreadyExists(
                f"{domain} is a named mix: choose another name, or unname the mix first",
                "NAME_TAKEN",
            )

    def push(
        self, domain: str, config: bytes, tensors: bytes, replace: bool, training: bytes = b""
    ) -> tuple[Registered, MixState]:
        """Check an adapter, store it and let `domain` name it.

        The same bytes again change nothing, and other files of the same effect no more than what
        is said of them. If the default mix holds the domain, it is bound anew. For `training` see
        `parse_adapter`.

        Raises:
            FailedPrecondition: The adapter is unfit, the domain is read only, a followed file says
                that it is another one, or the disk refuses.
            AlreadyExists: The domain names other bytes, and `replace` is false; or it names a mix.
        """
        return self._keep("push", domain, config, tensors, replace, training=training)

    def keep_merged(
        self, domain: str, merged: Merged, replace: bool
    ) -> tuple[Registered, MixState]:
        """Store what was merged, and let `domain` name it, as `push` does."""
        made = merged.provenance
        options = "".join(f" {name}={value}" for name, value in made.options.items())
        mix = format_mix({source.domain: source.weight for source in made.sources})
        return self._keep(
            "merge",
            domain,
            merged.config,
            merged.tensors,
            replace,
            how=f" method={made.method}{options} of {mix}",
        )

    def _keep(
        self,
        verb: str,
        domain: str,
        config: bytes,
        tensors: bytes,
        replace: bool,
        *,
        training: bytes = b"",
        how: str = "",
    ) -> tuple[Registered, MixState]:
        """See `push`; `verb` and `how` are for the record of changes."""
        self.check_domain(domain)
        try:
            adapter = parse_adapter(
                config,
                tensors,
                self._base.layout,
                self._limits,
                base=self._base.facts,
                training=training,
            )
        except AdapterError as error:
            raise FailedPrecondition(f"{domain}: {error}", error.reason) from error
        before = self._registry.find(domain)
        same = before is not None and before.adapter == adapter
        if before is not None and same:
            if before.source is not Source.PUSHED:
                return before, self._default.state
            if _named(before.adapter) == _named(adapter):
                self._put(config, tensors)  # It may be lost or damaged there, or never have been.
                return before, self._default.state
        if before is not None and not same:
            _check_writable(before)
            if not replace:
                raise AlreadyExists(
                    f"{domain} names another adapter ({before.adapter.digest[:12]}): "
                    "ask to replace it, or choose another name",
                    "ADAPTER_EXISTS",
                )
        registered = Registered(domain, adapter, Source.PUSHED)
        if not same:
            self._check_wanted(registered)
        mix_before = self._default.state
        self._put(config, tensors)
        self._engine.keep(adapter)  # Where rows run elsewhere, they read it from the store.
        with self._naming([registered]):
            state = self._rebind(registered)
        self._registry.put(registered)
        self._note(f"{verb} {domain} {adapter.digest}{how}", mix_before)
        registered.log_warnings()
        self.collect()
        return registered, state

    def _put(self, config: bytes, tensors: bytes) -> None:
        """Let the store have an adapter, whole.

        Raises:
            FailedPrecondition: It refuses.
        """
        try:
            self._store.put(config, tensors)
        except StoreError as error:
            raise _store_failed(error) from error

    def _rebind(self, registered: Registered) -> MixState:
        """Let the default mix hold the new adapter where it held the old one."""
        state = self._default.state
        if not _holds(state.mix, registered.domain):
            return state
        return self._default.change(_rebound(state.mix, registered))

    def _check_wanted(self, registered: Registered) -> None:
        """Refuse an adapter where a followed file says that its domain is another one.

        The one that it says may come in the place of another, unless the default mix would then be
        what neither the file says now nor any said before.

        Raises:
            FailedPrecondition: The file says otherwise.
        """
        domain, digests = registered.domain, self._wanted.adapters
        if domain not in digests:
            return
        if digests[domain] != registered.adapter.digest:
            self._check_free(f"that {domain} is adapter {digests[domain][:12]}")
        now = self._default.state.mix
        entries = _rebound(now, registered).entries
        reached = Mix.of(self._wanted.mix) == Mix.of((e.domain, e.weight) for e in entries) and all(
            digests.get(e.domain, e.adapter.digest) == e.adapter.digest for e in entries
        )
        if _holds(now, domain) and not reached:
            raise FailedPrecondition(
                f"{domain} is in the default mix, and with this adapter alone in it that would not "
                f"be what {self._follows} says: push it under another name, and let "
                f"{self._follows} say that",
                "FOLLOWS_FILE",
            )

    def delete(self, domain: str) -> None:
        """Forget a pushed adapter; running rows keep it to their end.

        Raises:
            NotFound: The domain names nothing.
            FailedPrecondition: The default mix holds it, or it is read only.
        """
        registered = self._registry.get(domain)
        if _holds(self._default.state.mix, domain):
            raise FailedPrecondition(
                f"{domain} is in the default mix: remove it from the mix first", "ADAPTER_IN_USE"
            )
        _check_writable(registered)
        try:
            self._store.delete_name(domain)
        except StoreError as error:
            raise _store_failed(error) from error
        self._registry.remove(domain)
        self._note(f"delete {domain}")
        self.collect()

    def collect(self) -> None:
        """Remove stored adapters that nothing names any more.

        After every push and delete, and at the start, since a kill may have come before.
        """
        in_use = {registered.adapter.digest for registered in self._registry.all()}
        in_use |= {entry.adapter.digest for entry in self._default.state.mix.entries}
        try:
            self._store.collect(in_use)
        except OSError:
            # What is left takes space and no more; the next push or delete tries again.
            _log.warning("adapters that are no longer used could not be removed", exc_info=True)

    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Make what a fold (merge) of `mix` needs; see `Executor.prepare`."""
        return self._engine.prepare(mix)

    def analyze(self, prepared: PreparedMix) -> Analysis:
        """Return the geometry of a mix; see `geometry.analyze`."""
        return self._engine.analyze(prepared)


def _check_name(name: str, field: str = "domain") -> None:
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidArgument(
            str(error), "INVALID_NAME" if field == "name" else "INVALID_DOMAIN", field=field
        ) from error


def _store_failed(error: StoreError) -> FailedPrecondition:
    """Return what a client is told; where on the disk it is, is for the log alone."""
    _log.error("%s", error)
    if isinstance(error, SharedStoreError):
        return FailedPrecondition(
            f"the shared store of adapters cannot be used ({error.why}): mend it or --store, and "
            "try again",
            "STORE_WRITE_FAILED",
        )
    why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else None
    return FailedPrecondition(
        f"the store of pushed adapters cannot be written or read ({why or 'see the log'}): free "
        "space or mend --state-dir, and try again",
        "STORE_WRITE_FAILED",
    )


def _named(adapter: Adapter) -> Named:
    return Named(adapter.digest, adapter.warnings, adapter.provenance)


def _of_domains(registry: Registry, weights: Mapping[str, float]) -> Mix:
    """Return a mix of a followed file, which is up to the file alone and so names no mixes."""
    for domain in weights:
        _check_no_mix(registry, domain)
        registry.get(domain)
    mix = Mix.of(weights)
    registry.check_size(len(mix))
    return mix


def _check_no_mix(registry: Registry, domain: str) -> None:
    if registry.named_mixes.find(domain) is not None:
        raise InvalidArgument(
            f"{domain} is a named mix and no domain: use one of its domains",
            "INVALID_MIX",
            field="mix",
        )


def _check_writable(registered: Registered) -> None:
    if registered.source is not Source.PUSHED:
        raise FailedPrecondition(
            f"{registered.domain} {_ORIGINS[registered.source]} and is read only: choose another "
            "name",
            "ADAPTER_READ_ONLY",
        )


def _rebound(mix: BoundMix, registered: Registered) -> BoundMix:
    """Return a mix with another adapter under one of its names."""
    return BoundMix.of(
        mix.base_digest,
        (
            BoundEntry(e.domain, registered.adapter, e.weight)
            if e.domain == registered.domain
            else e
            for e in mix.entries
        ),
    )


def _holds(mix: BoundMix, domain: str) -> bool:
    return any(entry.domain == domain for entry in mix.entries)
