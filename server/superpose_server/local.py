"""An engine in this process, on a base that was read, with what looks after its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from superpose_adapters.text_encoder import logits_of, vocabulary_of
from superpose_server.config import PREFILL_TOKENS_CPU, PREFILL_TOKENS_GPU
from superpose_server.control.guard import Guard
from superpose_server.control.integrity import Integrity
from superpose_server.engine.engine import Engine
from superpose_server.engine.executor import ServedBase
from superpose_server.engine.observer import EngineObserver, Observers
from superpose_server.engine.residency import Residency
from superpose_server.engine.scheduler import Scheduler
from superpose_server.engine.weights_check import check_weights
from superpose_server.loading import ReadBase
from superpose_server.weights.resident import ResidentWeights


@dataclass(frozen=True)
class LocalEngine:
    """An engine that runs nothing yet.

    Attributes:
        base: What it serves.
        engine: Runs the rows, once it is started.
        weights: What it folds.
        integrity: What is found of its weights.
        guard: Checks and mends them, once it is started.
        cache_nbytes: Bytes of its key-value cache.
    """

    base: ServedBase
    engine: Engine
    weights: ResidentWeights
    integrity: Integrity
    guard: Guard
    cache_nbytes: int


def make_local_engine(
    read: ReadBase, metrics: EngineObserver, observer: EngineObserver
) -> LocalEngine:
    """Make a model of what was read, check its weights, and give it an engine.

    Args:
        read: The base.
        metrics: Are told of the engine's events first.
        observer: Is told of them last.

    Raises:
        Exception: As `read_base`.
    """
    config = read.config
    # Both before anything in the module is replaced.
    vocabulary, logits = vocabulary_of(read.module), logits_of(read.module)
    model, expected = read.make_model()
    weights = ResidentWeights(
        model.module,
        model.layout,
        model.base_digest,
        torch.device("cpu") if config.base_copy == "host" else None,
    )
    integrity = Integrity(weights)
    on_gpu = model.device.type == "cuda"
    engine = Engine(
        model,
        weights,
        Scheduler(model.max_batch, config.max_queue, model.switch),
        Observers(metrics, integrity, observer),
        prefill_tokens=config.prefill_tokens
        or (PREFILL_TOKENS_GPU if on_gpu else PREFILL_TOKENS_CPU),
        residency=Residency() if config.residency == "auto" else None,
    )
    if expected is not None:
        check_weights(engine.runner, expected)
    base = ServedBase(
        digest=model.base_digest,
        layout=model.layout,
        facts=read.facts,
        vocabulary=vocabulary,
        logits=logits,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        context_length=model.context_length,
        max_batch=model.max_batch,
    )
    guard = Guard(engine, integrity, config.verify_every)
    return LocalEngine(base, engine, weights, integrity, guard, model.cache.nbytes)
