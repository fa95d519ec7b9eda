"""The peer in OpenVINO GenAI, on a pipeline that stands in for GenAI's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks.peers import openvino_genai
from benchmarks.peers.peer import Settings


class Handle:
    """A request: each step gives it its next token, those of its prompt plus 1, 2, ..."""

    def __init__(self, prompt: list[int], config: SimpleNamespace, delay: int) -> None:
        self.prompt = prompt
        self.wanted = config.max_new_tokens
        self.delay = delay
        self.tokens: list[int] = []

    def step(self) -> None:
        if self.delay:
            self.delay -= 1
        elif len(self.tokens) < self.wanted:
            self.tokens.append(self.prompt[-1] + len(self.tokens) + 1)

    def can_read(self) -> bool:
        return bool(self.tokens)

    def read_all(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(generated_ids=self.tokens)]


class Pipeline:
    """`ContinuousBatchingPipeline`, in which the prompt of row n is read in step n + 1."""

    def __init__(self, folder: str, scheduler: Any, device: str, properties: dict[str, Any]):
        self.scheduler = scheduler
        self.device = device
        self.properties = properties
        self.handles: list[Handle] = []
        self.calls: list[str] = []
        self.clock = 0.0

    def generate(self, tensors: list[Any], configs: list[Any]) -> None:
        self.calls.append("generate")

    def add_request(self, row: int, tensor: Any, config: SimpleNamespace) -> Handle:
        assert config.ignore_eos
        assert not config.do_sample
        assert tensor.dtype == np.int64
        self.calls.append("add")
        self.handles.append(Handle(tensor[0].tolist(), config, delay=row))
        return self.handles[-1]

    def has_non_finished_requests(self) -> bool:
        return any(len(handle.tokens) < handle.wanted for handle in self.handles)

    def step(self) -> None:
        self.clock += 1
        for handle in self.handles:
            handle.step()


class AdapterConfig:
    """`AdapterConfig`, which remembers what is added."""

    Mode = SimpleNamespace(MODE_DYNAMIC="dynamic")

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.added: list[tuple[str, float]] = []

    def add(self, adapter: str, alpha: float) -> AdapterConfig:
        self.added.append((adapter, alpha))
        return self


@pytest.fixture
def abilities(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put stand-ins in the place of GenAI; return what the processor can do, to be changed."""
    found = ["FP32", "BF16", "INT8"]
    package = SimpleNamespace(
        __version__="1.2",
        Adapter=lambda path: path,
        AdapterConfig=AdapterConfig,
        ContinuousBatchingPipeline=Pipeline,
        GenerationConfig=SimpleNamespace,
        SchedulerConfig=SimpleNamespace,
    )
    core = SimpleNamespace(get_property=lambda device, name: found)
    openvino = SimpleNamespace(Core=lambda: core, Tensor=lambda array: array)
    monkeypatch.setitem(sys.modules, "openvino_genai", package)
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setattr(
        openvino_genai, "convert_model", lambda folder, target, dtype: target.mkdir()
    )
    return found


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    return Settings(model=tiny, rows=4, length=40, cache=tmp_path)


def test_tokens_and_when_every_row_has_its_first(
    abilities: list[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = openvino_genai.load(settings)
    pipeline = peer.pipeline
    monkeypatch.setattr(openvino_genai, "perf_counter", lambda: pipeline.clock)
    answer = peer.generate([[7, 10], [20], [30, 40, 50]], 5)
    assert answer.tokens == [list(range(11, 16)), list(range(21, 26)), list(range(51, 56))]
    # The last row begins in the third step, and ends in the seventh.
    assert (answer.first_token_seconds, answer.seconds) == (3, 7)
    # Adapters take effect by `generate`: it comes before what is added.
    assert pipeline.calls == ["generate", "add", "add", "add"]


def test_the_cache_holds_all_rows_and_more_are_refused(
    abilities: list[str], settings: Settings
) -> None:
    peer = openvino_genai.load(settings)
    scheduler = peer.pipeline.scheduler
    assert scheduler.num_kv_blocks * 32 >= 4 * 40
    assert scheduler.max_num_batched_tokens >= 4 * 40  # all prompts in one step
    with pytest.raises(ValueError, match="made for 4 rows"):
        peer.generate([[1]] * 5, 2)


@pytest.mark.parametrize(
    ("dtype", "hint", "bits"), [("float32", "f32", 32), ("bfloat16", "bf16", 16), ("int8", None, 8)]
)
def test_a_dtype_is_what_is_computed_in_and_kept(
    abilities: list[str], settings: Settings, dtype: str, hint: str | None, bits: int
) -> None:
    peer = openvino_genai.load(Settings(**vars(settings) | {"dtype": dtype}))
    properties = peer.pipeline.properties
    assert peer.weights_bits == bits
    assert properties.get("INFERENCE_PRECISION_HINT") == hint
    assert properties.get("KV_CACHE_PRECISION") == hint
    assert "adapters" not in properties


def test_bfloat16_is_refused_where_the_processor_lacks_it(
    abilities: list[str], settings: Settings
) -> None:
    abilities.remove("BF16")
    with pytest.raises(ValueError, match="no arithmetic in bfloat16"):
        openvino_genai.load(Settings(**vars(settings) | {"dtype": "bfloat16"}))


def test_an_adapter_is_given_the_scale_that_its_config_says(
    abilities: list[str], settings: Settings, adapters: Path
) -> None:
    adapter = adapters / "wide-000"  # rank 8, alpha 16
    peer = openvino_genai.load(Settings(**vars(settings) | {"adapter": adapter}))
    config = peer.pipeline.properties["adapters"]
    assert config.mode == "dynamic"
    assert config.added == [(str(adapter / "adapter_model.safetensors"), 2.0)]
