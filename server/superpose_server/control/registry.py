"""Which adapter each domain names, and how a mix of names becomes a bound mix."""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundEntry, BoundMix, Mix
from superpose_server.control.named_mixes import NamedMixes
from superpose_server.errors import InvalidArgument, NotFound

_log = logging.getLogger(__name__)


class Source(enum.Enum):
    """Where an adapter came from."""

    BUNDLED = "bundled"
    DIRECTORY = "directory"
    PUSHED = "pushed"


@dataclass(frozen=True)
class Registered:
    """An adapter under the domain that names it."""

    domain: str
    adapter: Adapter
    source: Source

    def log_warnings(self) -> None:
        """Write to the log what an operator should know of the adapter."""
        for warning in self.adapter.warnings:
            _log.warning("adapter %s: %s", self.domain, warning)


class Registry:
    """Domains and their adapters. Any thread may read; one thread at a time may change it."""

    def __init__(self, base_digest: str, max_domains: int, named_mixes: NamedMixes) -> None:
        """Begin without domains; a mix may hold `max_domains`, and may be named as these are."""
        self.base_digest = base_digest
        self.max_domains = max_domains
        self.named_mixes = named_mixes
        self._registered: Mapping[str, Registered] = {}

    def __len__(self) -> int:
        """Return the number of domains."""
        return len(self._registered)

    def all(self) -> list[Registered]:
        """Return everything, in ascending order of domain."""
        return sorted(self._registered.values(), key=lambda registered: registered.domain)

    def find(self, domain: str) -> Registered | None:
        """Return what `domain` names, or None."""
        return self._registered.get(domain)

    def get(self, domain: str) -> Registered:
        """Return what `domain` names.

        Raises:
            NotFound: Nothing, or a mix; the message lists what is there.
        """
        found = self._registered.get(domain)
        if found is None:
            if self.named_mixes.find(domain) is None:
                why = f"no adapter is loaded as {domain[:80]!r}: push it first"
            else:
                why = f"{domain} is a named mix and no domain: use one of its domains"
            raise self._not_found(domain, why)
        return found

    def _not_found(self, domain: str, why: str) -> NotFound:
        loaded = ", ".join(sorted(self._registered)[:20]) or "none"
        named = ", ".join(named.name for named in self.named_mixes.all()[:20])
        return NotFound(
            f"{why} (loaded: {loaded}" + (f"; named mixes: {named})" if named else ")"),
            "DOMAIN_NOT_FOUND",
            metadata={"domain": domain[:80]},
        )

    def put(self, *registered: Registered) -> None:
        """Let domains name adapters, in place of what they named before."""
        # Readers hold the old mapping or the new one, never a half-changed one.
        self._registered = {**self._registered, **{each.domain: each for each in registered}}

    def having(self, registered: Iterable[Registered]) -> Registry:
        """Return another registry: this one as it would be after `put`."""
        other = Registry(self.base_digest, self.max_domains, self.named_mixes)
        other._registered = self._registered
        other.put(*registered)
        return other

    def remove(self, domain: str) -> None:
        """Forget a domain; rows that hold its adapter keep it."""
        self._registered = {d: r for d, r in self._registered.items() if d != domain}

    def bind(self, mix: Mix) -> BoundMix:
        """Resolve the names of `mix` now, those of mixes and those of domains.

        Raises:
            NotFound: A name that stands for nothing, or for a mix that cannot be had now.
            InvalidArgument: More domains than a mix may hold, or a weight out of range.
        """
        domains = self._spell_out(mix)
        self.check_size(len(domains))
        return BoundMix.of(
            self.base_digest,
            (
                BoundEntry(domain, self.get(domain).adapter, weight)
                for domain, weight in domains.entries
            ),
        )

    def _spell_out(self, mix: Mix) -> Mix:
        """Return a mix of domains alone: deltas add, so mixes do, each times its weight."""
        terms: dict[str, list[float]] = {}
        for name, weight in mix.entries:
            named = self.named_mixes.find(name)
            if named is None:
                terms.setdefault(name, []).append(weight)
                continue
            for domain, part in named.entries:
                if self.find(domain) is None:
                    raise self._not_found(
                        domain, f"named mix {name} holds {domain}, which is not loaded: push it"
                    )
                terms.setdefault(domain, []).append(weight * part)
        try:
            # An exact sum, rounded once: the order of the names does not matter.
            return Mix.of({domain: math.fsum(parts) for domain, parts in terms.items()})
        except ValueError as error:
            raise InvalidArgument(str(error), "INVALID_MIX", field="mix") from error

    def check_size(self, domains: int, field: str = "mix") -> None:
        """Refuse a mix of too many domains.

        Raises:
            InvalidArgument: More than `max_domains`.
        """
        if domains > self.max_domains:
            raise InvalidArgument(
                f"the mix has {domains} domains: use at most {self.max_domains}",
                "TOO_MANY_DOMAINS",
                field=field,
            )
