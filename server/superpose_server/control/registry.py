"""Which adapter each domain names, and how a mix of names becomes a bound mix."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundEntry, BoundMix, Mix
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

    def __init__(self, base_digest: str, max_domains: int) -> None:
        """Begin without domains; a mix may hold `max_domains`."""
        self.base_digest = base_digest
        self.max_domains = max_domains
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
            NotFound: Nothing; the message lists what is there.
        """
        found = self._registered.get(domain)
        if found is None:
            names = ", ".join(sorted(self._registered)[:20]) or "none"
            raise NotFound(
                f"no adapter is loaded as {domain[:80]!r}: push it first (loaded: {names})",
                "DOMAIN_NOT_FOUND",
                metadata={"domain": domain[:80]},
            )
        return found

    def put(self, registered: Registered) -> None:
        """Let a domain name an adapter, in place of what it named before."""
        # Readers hold the old mapping or the new one, never a half-changed one.
        self._registered = {**self._registered, registered.domain: registered}

    def remove(self, domain: str) -> None:
        """Forget a domain; rows that hold its adapter keep it."""
        self._registered = {d: r for d, r in self._registered.items() if d != domain}

    def bind(self, mix: Mix) -> BoundMix:
        """Resolve the names of `mix` now.

        Raises:
            NotFound: A domain that names nothing.
            InvalidArgument: More domains than a mix may hold.
        """
        self.check_size(len(mix))
        return BoundMix.of(
            self.base_digest,
            (
                BoundEntry(domain, self.get(domain).adapter, weight)
                for domain, weight in mix.entries
            ),
        )

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
