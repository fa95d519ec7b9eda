"""Peer: OpenVINO GenAI's continuous batching, on the model as `to_openvino.py` writes it.

An adapter is beside the weights, in GenAI's dynamic mode: it can be given another weight or taken
away between two calls of `generate`, for all requests at once.
"""

from __future__ import annotations

import importlib
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.peers.gpt2_checkpoint import read_adapter_config
from benchmarks.peers.peer import Answer, Prompts, Settings, converted
from benchmarks.peers.to_openvino import convert_model

BLOCK = 32  # tokens of a block of the cache on a processor
# What the plugin computes in. Keys and values are kept in the same: its default, 8 bits, is for
# int8 alone, whose arithmetic is left to the plugin too.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoGenAI:
    """One pipeline; a step runs every row, all prompts in the first."""

    def __init__(self, settings: Settings) -> None:
        self.openvino: Any = importlib.import_module("openvino")
        self.package: Any = importlib.import_module("openvino_genai")
        self.version = f"openvino-genai {self.package.__version__}"
        self.weights_bits = {"float32": 32, "bfloat16": 16, "int8": 8}[settings.dtype]
        self.rows = settings.rows
        abilities = self.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if settings.dtype == "bfloat16" and "BF16" not in abilities:
            raise ValueError("this processor has no arithmetic in bfloat16")

        stored = "int8" if settings.dtype == "int8" else "float32"
        folder = converted(
            settings.model,
            settings.cache,
            f"openvino-{stored}",
            lambda target: convert_model(settings.model, target, stored),
        )
        properties: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": settings.threads,
            "sampler_num_threads": settings.threads,
        }
        if settings.dtype in PRECISIONS:
            precision = PRECISIONS[settings.dtype]
            properties |= {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
        if settings.adapter is not None:
            properties["adapters"] = self.adapters(settings)
        scheduler = self.package.SchedulerConfig()
        scheduler.max_num_batched_tokens = settings.rows * settings.length
        scheduler.max_num_seqs = settings.rows
        scheduler.num_kv_blocks = settings.rows * (-(-settings.length // BLOCK) + 1)
        self.pipeline = self.package.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", properties
        )
        # Requests that are added take the adapters that the last call of `generate` had.
        self.pipeline.generate([self.tensor([0])], [self.greedy(1)])

    def adapters(self, settings: Settings) -> Any:
        """Return the adapter with weight 1; GenAI does not read its scale from its config."""
        assert settings.adapter is not None
        config = read_adapter_config(settings.adapter)
        adapters = self.package.AdapterConfig(self.package.AdapterConfig.Mode.MODE_DYNAMIC)
        adapter = self.package.Adapter(str(settings.adapter / "adapter_model.safetensors"))
        return adapters.add(adapter, config["lora_alpha"] / config["r"])

    def tensor(self, prompt: list[int]) -> Any:
        return self.openvino.Tensor(np.array([prompt], dtype=np.int64))

    def greedy(self, new_tokens: int) -> Any:
        return self.package.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False
        )

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        if len(prompts) > self.rows:
            raise ValueError(f"the pipeline was made for {self.rows} rows")
        started = perf_counter()
        first = 0.0
        config = self.greedy(new_tokens)
        handles = [
            self.pipeline.add_request(row, self.tensor(prompt), config)
            for row, prompt in enumerate(prompts)
        ]
        waiting = handles
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if waiting:
                waiting = [handle for handle in waiting if not handle.can_read()]
                first = perf_counter() - started
        seconds = perf_counter() - started
        tokens = [handle.read_all()[0].generated_ids for handle in handles]
        return Answer(tokens, first, seconds)


def load(settings: Settings) -> OpenVinoGenAI:
    return OpenVinoGenAI(settings)
