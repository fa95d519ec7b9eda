"""Peer: llama.cpp by llama-cpp-python's low-level interface, a whole batch in one llama_decode.

The high-level class of llama-cpp-python runs one text at a time; llama.cpp itself batches, and
that is what is measured here: every row is a sequence of its own, a step decodes one token of each.
"""

from __future__ import annotations

import ctypes
import importlib
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.peer import Answer, Prompts, Settings, converted
from benchmarks.peers.to_gguf import convert_adapter, convert_model

# Tokens of one physical pass over a prompt: llama.cpp's own default.
PASS = 512


class LlamaCpp:
    """One context with `rows` sequences.

    Cache and attention are as llama.cpp has them by default: keys and values in float16, whatever
    the weights are. With float32 there, its attention takes several times as long.
    """

    def __init__(self, settings: Settings) -> None:
        self.api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self.package: Any = importlib.import_module("llama_cpp")
        # What llama.cpp says while it loads is of no use here, but its errors are.
        self.quiet = self.api.llama_log_callback(self.log)
        self.api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        self.version = f"llama-cpp-python {self.package.__version__}"
        self.weights_bits = {"float32": 32, "float16": 16}[settings.dtype]
        self.rows = settings.rows

        file = converted(
            settings.model,
            settings.cache,
            f"{settings.dtype}.gguf",
            lambda target: convert_model(settings.model, target, settings.dtype),
        )
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the converted model")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

        context = self.api.llama_context_default_params()
        # Cells of the cache come in blocks of 256 a sequence.
        context.n_ctx = settings.rows * -(-settings.length // 256) * 256
        context.n_seq_max = settings.rows
        context.n_batch = settings.rows * settings.length
        context.n_ubatch = PASS
        context.n_threads = context.n_threads_batch = settings.threads
        context.no_perf = True
        self.context = self.api.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        if settings.adapter is not None:
            self.use_adapter(settings)

        self.batch = self.api.llama_batch_init(context.n_batch, 0, 1)
        shape = (context.n_batch,)
        self.token = np.ctypeslib.as_array(self.batch.token, shape)
        self.position = np.ctypeslib.as_array(self.batch.pos, shape)
        self.wanted = np.ctypeslib.as_array(self.batch.logits, shape)
        np.ctypeslib.as_array(self.batch.n_seq_id, shape)[:] = 1

    @staticmethod
    def log(level: int, text: bytes, _user: Any) -> None:
        if level == 4:  # an error
            print(text.decode(errors="replace"), end="", flush=True)

    def use_adapter(self, settings: Settings) -> None:
        assert settings.adapter is not None
        source = settings.adapter
        file = converted(
            source, settings.cache, "lora.gguf", lambda target: convert_adapter(source, target)
        )
        adapter = self.api.llama_adapter_lora_init(self.model, str(file).encode())
        if not adapter:
            raise RuntimeError("llama.cpp cannot load the converted adapter")
        adapters = (self.api.llama_adapter_lora_p_ctypes * 1)(adapter)
        if self.api.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0)):
            raise RuntimeError("llama.cpp cannot use the converted adapter")

    def decode(self, count: int, rows: int) -> NDArray[np.int64]:
        """Run the first `count` tokens of the batch; return the likeliest next token of a row."""
        self.batch.n_tokens = count
        status = self.api.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(
            self.api.llama_get_logits(self.context), (rows, self.vocabulary)
        )
        chosen: NDArray[np.int64] = logits.argmax(axis=1)
        return chosen

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        if len(prompts) > self.rows:
            raise ValueError(f"the context was made for {self.rows} rows")
        started = perf_counter()
        rows = len(prompts)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        lengths = np.array([len(row) for row in prompts])
        count = int(lengths.sum())
        self.token[:count] = np.concatenate([np.array(row) for row in prompts])
        self.position[:count] = np.concatenate([np.arange(length) for length in lengths])
        for place, row in enumerate(np.repeat(np.arange(rows), lengths).tolist()):
            self.batch.seq_id[place][0] = row
        self.wanted[:count] = 0
        self.wanted[np.cumsum(lengths) - 1] = 1
        chosen = self.decode(count, rows)
        first = perf_counter() - started

        steps = [chosen]
        for row in range(rows):
            self.batch.seq_id[row][0] = row
        self.wanted[:rows] = 1
        for step in range(new_tokens - 1):
            self.token[:rows] = chosen
            self.position[:rows] = lengths + step
            chosen = self.decode(rows, rows)
            steps.append(chosen)
        tokens: list[list[int]] = np.stack(steps, axis=1).tolist()
        return Answer(tokens, first, perf_counter() - started)


def load(settings: Settings) -> LlamaCpp:
    return LlamaCpp(settings)
