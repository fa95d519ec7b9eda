from __future__ import annotations

from pathlib import Path

from prometheus_client import generate_latest
from tests.server.helpers import GREEDY, Bench, random_adapter

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.control.default_mix import MixState
from superpose_server.engine.engine import Engine
from superpose_server.metrics import Metrics
from superpose_server.weights.resident import Findings


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"superpose_{name}", labels)


NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "request_failure_total",
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "kv_slots_used",
    "domain_weight",
    "mix_generation",
    "mix_info",
    "fold_duration_seconds",
    "folds_total",
    "corrected_rows_total",
    "weights_verified",
]


def test_every_metric_of_the_design_is_exposed() -> None:
    metrics = Metrics()
    metrics.follow(lambda: 0, lambda: 0)
    text = generate_latest(metrics.registry).decode()
    types = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {f"superpose_{name}" for name in NAMES} <= types


def test_an_engine_s_work_is_counted(bases: dict[str, Path]) -> None:
    bench = Bench(bases["gpt2"])
    metrics = Metrics()
    bench.engine = Engine(bench.model, bench.weights, bench.scheduler, metrics)
    metrics.follow(lambda: bench.engine.running, lambda: bench.engine.waiting)
    mix = bench.mix((random_adapter(bench.layout, 1), -0.5))
    bench.submit([1, 2, 3], mix)
    row, _ = bench.submit([4, 5], bench.mix())
    assert value(metrics, "num_requests_waiting") == 2
    bench.engine.step()
    assert value(metrics, "num_requests_running") == value(metrics, "kv_slots_used") == 2
    assert value(metrics, "num_requests_waiting") == 0
    bench.engine.step()  # Two tokens have a time between them.
    row.cancelled = True
    bench.run()
    bench.fold(mix)
    tokens = GREEDY.limit
    assert value(metrics, "prompt_tokens_total") == 5
    assert value(metrics, "generation_tokens_total") == tokens + 2
    assert value(metrics, "corrected_rows_total") == tokens - 1  # prefill is no decode step
    assert value(metrics, "request_success_total", finish_reason="length") == 1
    assert value(metrics, "request_success_total", finish_reason="aborted") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 2
    assert value(metrics, "request_queue_time_seconds_count") == 2
    assert value(metrics, "e2e_request_latency_seconds_count") == 2
    assert value(metrics, "time_per_output_token_seconds_count") == 2
    assert value(metrics, "folds_total", result="ok") == 1
    assert value(metrics, "fold_duration_seconds_count") == 1
    assert value(metrics, "domain_weight", domain="d0") == -0.5
    bench.fold(bench.mix())
    assert value(metrics, "domain_weight", domain="d0") is None


def test_a_failed_fold_is_counted_as_failed() -> None:
    metrics = Metrics()
    metrics.folded(0.1, False, BoundMix("base"))
    assert value(metrics, "folds_total", result="failed") == 1
    assert value(metrics, "folds_total", result="ok") is None


def test_the_default_mix_has_one_digest_at_a_time() -> None:
    metrics = Metrics()
    first = BoundMix("base")
    second = BoundMix.of("base", [BoundEntry("math", Adapter("a" * 64, {}), 1.0)])
    metrics.mix_changed(MixState(0, first))
    metrics.mix_changed(MixState(1, second))
    assert value(metrics, "mix_generation") == 1
    assert value(metrics, "mix_info", digest=second.digest) == 1
    assert value(metrics, "mix_info", digest=first.digest) is None


def test_checks_of_the_weights_are_counted() -> None:
    metrics = Metrics()
    assert value(metrics, "weights_verified") == 1
    for intact in (True, False, False, True):
        metrics.checked(Findings() if intact else Findings(damaged_resident=("a",)))
        metrics.intact(intact)
        assert value(metrics, "weights_verified") == intact
    assert value(metrics, "weight_checks_total", result="ok") == 2
    assert value(metrics, "weight_checks_total", result="damaged") == 2
    assert value(metrics, "weights_mended_total") == 1


def test_refused_requests_are_counted_by_reason() -> None:
    metrics = Metrics()
    metrics.request_failed("QUEUE_FULL")
    assert value(metrics, "request_failure_total", reason="QUEUE_FULL") == 1
