"""Prometheus metrics: names shaped like vLLM's, and those that only this server has."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from superpose_adapters.mix import BoundMix
from superpose_server.control.default_mix import MixState
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.weights.resident import Findings

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_FOLD_SECONDS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics(EngineObserver):
    """Keeps the metrics of one server, in a registry of its own.

    Attributes:
        registry: What is scraped.
        generated_tokens: Tokens generated since the start; only the engine's thread counts.
    """

    def __init__(self) -> None:
        """Make all metrics at their start values."""
        self.registry = CollectorRegistry()
        self.generated_tokens = 0
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were run")
        self._generated = self._counter("generation_tokens", "Tokens that were generated")
        self._success = self._counter("request_success", "Requests that ended", "finish_reason")
        self._failure = self._counter("request_failure", "Requests refused or failed", "reason")
        self._first = self._histogram("time_to_first_token_seconds", "From accepted to first token")
        self._each = self._histogram("time_per_output_token_seconds", "Mean of a request")
        self._whole = self._histogram("e2e_request_latency_seconds", "From accepted to the end")
        self._queued = self._histogram("request_queue_time_seconds", "From accepted to running")
        self._weight = self._gauge("domain_weight", "Weight of a resident domain", "domain")
        self._generation = self._gauge("mix_generation", "Number of the default mix")
        self._info = self._gauge("mix_info", "1 for the digest of the default mix", "digest")
        self._fold = self._histogram("fold_duration_seconds", "Time of a fold", _FOLD_SECONDS)
        self._folds = self._counter("folds", "Folds of the resident weights", "result")
        self._corrected = self._counter("corrected_rows", "Rows decoded with a correction")
        self._verified = self._gauge("weights_verified", "0 while weights are known to be damaged")
        self._verified.set(1)
        self._checks = self._counter("weight_checks", "Checks of the weights", "result")
        self._mended = self._counter("weights_mended", "Times that damaged weights became whole")
        self._damaged = False

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"superpose_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"superpose_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"superpose_{name}", text, buckets=buckets, registry=self.registry)

    def follow(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read the number of running and waiting rows whenever metrics are asked for."""
        for name, text, read in (
            ("num_requests_running", "Rows in the batch", running),
            ("num_requests_waiting", "Requests in the queue", waiting),
            ("kv_slots_used", "Slots of the key-value cache in use", running),
        ):
            self._gauge(name, text).set_function(read)

    def following(self, reached: Callable[[], bool]) -> None:
        """Tell whether the server is at what a followed file says, whenever metrics are read."""
        gauge = self._gauge("follow_reached", "1 while at what the followed file says")
        gauge.set_function(reached)

    def stepped(self, rows: tuple[Sequence, ...], waiting: int, corrected: int) -> None:
        """Count a decode step, and its rows that were corrected (served as unmerged LoRA)."""
        self._count_generated(len(rows))
        self._corrected.inc(corrected)

    def prefilled(self, sequence: Sequence) -> None:
        """Count a row's first token."""
        self._prompt.inc(len(sequence.prompt))
        self._count_generated(1)
        self._first.observe(sequence.first_token - sequence.accepted)
        self._queued.observe(sequence.started - sequence.accepted)

    def _count_generated(self, tokens: int) -> None:
        self._generated.inc(tokens)
        self.generated_tokens += tokens

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """Count a row that ended."""
        times = sequence.times()
        count = len(sequence.tokens)
        self._success.labels(reason.value).inc()
        self._whole.observe(times.finished - times.accepted)
        if count > 1:
            self._each.observe((times.finished - times.first_token) / (count - 1))

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        """Count a fold (a merge into the weights) and show what is resident."""
        self._folds.labels("ok" if succeeded else "failed").inc()
        self._fold.observe(seconds)
        self.resident(resident)

    def resident(self, mix: BoundMix) -> None:
        """Show what is in the weights."""
        self._weight.clear()
        for entry in mix.entries:
            self._weight.labels(entry.domain).set(entry.weight)

    def request_failed(self, reason: str) -> None:
        """Count a request that ended in an error status."""
        self._failure.labels(reason).inc()

    def mix_changed(self, state: MixState) -> None:
        """Show the default mix."""
        self._generation.set(state.generation)
        self._info.clear()
        self._info.labels(state.mix.digest).set(1)

    def checked(self, found: Findings) -> None:
        """Count a check of the weights."""
        self._checks.labels("ok" if found.ok else "damaged").inc()
        if found.ok and self._damaged:
            self._mended.inc()
        self._damaged = not found.ok

    def intact(self, intact: bool) -> None:
        """Show whether the weights can be served."""
        self._verified.set(intact)
