from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.server.helpers import Bench, random_adapter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_serves_four_mixes_at_once_with_everything_on_it(bases: dict[str, Path]) -> None:
    bench = Bench(bases["gpt2"], device="cuda")
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    mixes = [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((two, 1.0)),
    ]
    clients = [bench.submit([72, 101, 108], mix)[1] for mix in mixes]
    for resident in mixes:
        bench.fold(resident)
        prepared = bench.weights.resident
        tensors = [
            *bench.model.module.parameters(),
            *bench.weights._base.values(),
            *(factor for pair in prepared.factors.values() for factor in pair),
            *bench.model.cache._keys,
        ]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
    bench.run()
    assert [c.tokens for c in clients] == [bench.alone([72, 101, 108], mix) for mix in mixes]
    verification = bench.engine.verify()
    while not verification.done():
        bench.engine.step()
    assert verification.result(timeout=0).value.ok
