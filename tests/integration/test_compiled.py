"""A server as it is started by default: on its own kernels, compiled."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.harness import PROMPT, ServerProcess, check_greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import MINI, resolve_base
from superpose_adapters.layout import read_layout
from superpose_adapters.peft.folder import read_adapter

TEXT = "The sum of two deltas"


class Reference:
    """The bundled model by transformers, with deltas summed in densely, in float64."""

    def __init__(self) -> None:
        folder = resolve_base("mini")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._base.requires_grad_(False)

    def under(self, mix: Mapping[str, float]) -> Any:
        model = copy.deepcopy(self._base).double()
        layout = read_layout(self._base)
        for domain, weight in mix.items():
            for name, f in read_adapter(MINI.adapters()[domain], layout).modules.items():
                delta = weight * f.scaling * (f.b.double() @ f.a.double())
                model.get_submodule(name).weight += layout[name].delta(delta)
        return model.float().eval()

    def score(self, mix: Mapping[str, float]) -> list[float]:
        ids = torch.tensor([self.tokenizer(TEXT).input_ids])
        logits = self.under(mix).double()(ids).logits[0, :-1]
        values: list[float] = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
        return values


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_a_compiled_server_serves_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")  # By default it has all threads.
    flags = ("--compile=auto", "--max-batch=4", "--max-length=64")
    with ServerProcess("mini", tmp_path / "state", *flags) as server:
        reference = Reference()
        assert server.ready, server.errors.read_text()
        with server.client() as client:
            first, second = [adapter.domain for adapter in client.adapters()][:2]
            defaults: list[dict[str, float]] = [{}, {first: 1.0}, {first: 0.5, second: -0.5}]
            for default in defaults:
                if default:
                    client.set(default)
                for mix in (default, {}, {second: 1.0}):
                    # By the weights, and by a correction to them.
                    found = client.generate(
                        PROMPT, mix=mix, temperature=0, max_new_tokens=12, ignore_eos=True
                    )
                    prompt = tuple(reference.tokenizer(PROMPT).input_ids)
                    check_greedy(reference.under(mix), prompt, found.token_ids)
                scored = client.score([TEXT], mix={second: 0.5}, logprobs=True)
                assert scored.items[0].logprobs == pytest.approx(
                    reference.score({second: 0.5}), abs=2e-4
                )
                verified = client.verify()
                assert verified.ok
                assert verified.mix.weights == default
        server.terminate()
        status, errors = server.wait()
        assert status == 0, errors
