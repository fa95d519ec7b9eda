"""Peer: CTranslate2's Generator, on the model as converted by its own converter."""

from __future__ import annotations

import importlib
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.peers.peer import Answer, Prompts, Settings, converted


def word(token: int) -> str:
    """Return the name of a token id in the converted vocabulary."""
    return f"<{token}>"


class Numbers:
    """Stands in for a tokenizer: every token is named after its id.

    CTranslate2 takes prompts as words; so they map to ids one to one, whatever the checkpoint's
    tokenizer is, and none is needed.
    """

    bos_token = eos_token = unk_token = word(0)

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {word(token): token for token in range(self.size)}


def convert(source: Path, target: Path) -> None:
    """Convert a transformers checkpoint, in float32; the Generator quantizes when it loads."""
    converters: Any = importlib.import_module("ctranslate2.converters")
    transformers: Any = importlib.import_module("transformers")
    size = transformers.AutoConfig.from_pretrained(source).vocab_size

    class Converter(converters.TransformersConverter):  # type: ignore[misc]
        def load_tokenizer(self, *_args: Any, **_kwargs: Any) -> Numbers:
            return Numbers(size)

    Converter(str(source)).convert(str(target), quantization="float32")


class CTranslate2:
    """One Generator with all threads to one batch."""

    def __init__(self, settings: Settings) -> None:
        package: Any = importlib.import_module("ctranslate2")
        folder = converted(
            settings.model,
            settings.cache,
            "ctranslate2",
            lambda target: convert(settings.model, target),
        )
        self.generator = package.Generator(
            str(folder),
            device=settings.device,
            compute_type=settings.dtype,
            inter_threads=1,
            intra_threads=settings.threads,
        )
        self.version = f"ctranslate2 {package.__version__}"
        self.weights_bits = {"float32": 32, "bfloat16": 16, "int16": 16, "int8": 8}[settings.dtype]

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        started = perf_counter()
        first = 0.0
        waiting = set(range(len(prompts)))

        def note(step: Any) -> bool:
            # Called for every new token of every row.
            nonlocal first
            if waiting:
                waiting.discard(step.batch_id)
                first = perf_counter() - started
            return False

        results = self.generator.generate_batch(
            [[word(token) for token in row] for row in prompts],
            beam_size=1,
            sampling_topk=1,
            max_length=new_tokens,
            min_length=0,
            end_token=[],  # none
            include_prompt_in_result=False,
            callback=note,
        )
        tokens = [result.sequences_ids[0] for result in results]
        return Answer(tokens, first, perf_counter() - started)


def load(settings: Settings) -> CTranslate2:
    if settings.adapter is not None:
        raise ValueError("this peer runs the base model only")
    return CTranslate2(settings)
