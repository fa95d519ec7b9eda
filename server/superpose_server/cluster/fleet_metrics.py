"""What is scraped of a fleet: each replica's series under its name, beside the server's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Of the server itself: what it counts at its doors, and the mix that it wants replicas to hold.
_OWN = {
    "superpose_request_failure",
    "superpose_mix_generation",
    "superpose_mix_info",
    "superpose_follow_reached",
}


def fleet_registry(
    own: CollectorRegistry, replicas: Callable[[], Mapping[str, str]]
) -> CollectorRegistry:
    """Return what is scraped in place of `own`.

    Args:
        own: Of the server, whose rows are run by its replicas.
        replicas: Returns {replica: its metrics as Prometheus reads them} of those that answer.
    """
    registry = CollectorRegistry()
    registry.register(_FleetCollector(own, replicas))
    return registry


class _FleetCollector(Collector):
    def __init__(self, own: CollectorRegistry, replicas: Callable[[], Mapping[str, str]]) -> None:
        self._own = own
        self._replicas = replicas

    def describe(self) -> list[Metric]:
        """Name none: nothing else is registered beside these."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return every family once, with the series of all."""
        families = {family.name: family for family in self._own.collect() if family.name in _OWN}
        for replica, text in sorted(self._replicas().items()):
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    merged.samples.append(sample._replace(labels=labels))
        yield from families.values()
