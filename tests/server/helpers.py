"""References in float64 and makers that the server's tests share.

A reference never calls the code under test: it forms every delta densely.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.base.checkpoint import load_checkpoint
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import Layout
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.engine.engine import Engine
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.runner import Runner
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.scheduler import Scheduler
from superpose_server.engine.sequence import Chunk, FinishReason, Sequence
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.model.batch import Span
from superpose_server.model.cache import SlotCache
from superpose_server.model.model import Model
from superpose_server.weights.resident import ResidentWeights

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"
)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)
# One of each way to choose, and of each way through it.
SAMPLING_KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "all": SamplingParams(),
    "cold": SamplingParams(temperature=0.3),
    "top_k": SamplingParams(top_k=50),
    "top_k of many": SamplingParams(temperature=2.0, top_k=3000),
    "top_k, top_p": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_p of many": SamplingParams(temperature=3.0, top_p=0.8),
    "top_p of few": SamplingParams(temperature=2.0, top_p=0.02),
    "min_p": SamplingParams(min_p=0.1),
}

# References are slow: a text that several tests want is made once.
_REFERENCE_TEXTS: dict[tuple[tuple[int, ...], str, int], list[int]] = {}


def open_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Model:
    """A model in `folder`; `options` are arguments of `Model`, `kernels=True` among them.

    With kernels it is not compiled unless `graphs=True`, since that takes its time.
    """
    values: dict[str, Any] = {"max_batch": 4, "max_length": None, "graphs": False}
    return Model(
        load_checkpoint(folder, dtype).to(device),
        base_digest=checkpoint_digest(folder),
        device=torch.device(device),
        **(values | options),
    )


def open_weights(model: Model, *, on_host: bool = False) -> ResidentWeights:
    return ResidentWeights(
        model.module, model.layout, model.base_digest, torch.device("cpu") if on_host else None
    )


def key_values(model: Model) -> tuple[Tensor, ...]:
    """What the cache holds, layer by layer."""
    assert isinstance(model.cache, SlotCache)
    return (*model.cache._keys, *model.cache._values)


def run_base(model: Model, spans: list[Span], wanted: SequenceOf[int]) -> Tensor:
    """Logits of a model that holds the base, for rows that want the base."""
    runner = Runner(model, open_weights(model))
    return runner.run(spans, wanted, [BoundMix(model.base_digest)] * len(spans))


def logits_of(runner: Runner, ids: Tensor, mixes: SequenceOf[BoundMix]) -> Tensor:
    """Logits (rows, tokens, vocabulary) of texts of one length, all in one pass.

    Each in a slot of its own, the last of them in the scratch slot.
    """
    first = runner.model.scratch_slot - len(ids) + 1
    spans = [Span(first + row, text, 0) for row, text in enumerate(ids.tolist())]
    logits = runner.run(spans, range(ids.numel()), mixes)
    return logits.view(*ids.shape, -1)


def make_factors(
    layout: Layout, module: str, generator: torch.Generator, rank: int, size: float
) -> Factors:
    """Random factors whose elements of scaling x B x A have a standard deviation of `size`."""
    shape = layout[module]
    a = torch.randn(rank, shape.in_features, generator=generator)
    b = torch.randn(shape.out_features, rank, generator=generator)
    return Factors(a, b * (size / (2.0 * rank**0.5)), scaling=2.0)


def random_adapter(
    layout: Layout,
    seed: int,
    *,
    modules: tuple[str, ...] = (),
    rank: int = 4,
    size: float = 0.05,
) -> Adapter:
    """An adapter of seeded random factors for `modules` (default: all but the head)."""
    names = modules or tuple(name for name in layout if name != "lm_head")
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        digest=hashlib.sha256(repr((seed, names, rank, size)).encode()).hexdigest(),
        modules={n: make_factors(layout, n, generator, rank, size) for n in sorted(names)},
    )


def bound(*terms: tuple[Adapter, float], base_digest: str = "base") -> BoundMix:
    """A mix of adapters under the names d0, d1, ..."""
    return BoundMix.of(base_digest, (BoundEntry(f"d{i}", a, w) for i, (a, w) in enumerate(terms)))


def dense_delta(factors: Factors, transposed: bool) -> Tensor:
    delta = factors.scaling * (factors.b.double() @ factors.a.double())
    return delta.T if transposed else delta


def dense_weights(base: Mapping[str, Tensor], mix: BoundMix, layout: Layout) -> dict[str, Tensor]:
    """{parameter: base + sum of weighted deltas} in float64, for every parameter of `base`."""
    result = {name: parameter.detach().double().clone() for name, parameter in base.items()}
    for entry in mix.entries:
        for module, factors in entry.adapter.modules.items():
            delta = dense_delta(factors, layout[module].transposed)
            result[f"{module}.weight"] += entry.weight * delta
    return result


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model of a checkpoint, whose parameters were rounded to `dtype`."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().requires_grad_(False)


def dense_model(base: nn.Module, mix: BoundMix, layout: Layout) -> Any:
    """A float64 copy of a model that holds the base, with `mix` summed in densely."""
    reference: Any = copy.deepcopy(base).double()
    parameters = dict(reference.named_parameters())
    with torch.no_grad():
        for name, value in dense_weights(parameters, mix, layout).items():
            parameters[name].copy_(value)
    return reference.eval()


def generate(reference: Any, prompt: list[int], tokens: int, **options: Any) -> list[int]:
    """The greedy continuation by transformers' own `generate`, which may not stop early."""
    ids = torch.tensor([prompt])
    values: dict[str, Any] = {"min_new_tokens": 0, "eos_token_id": None, "pad_token_id": 0}
    result = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        **(values | options),
    )
    return [int(token) for token in result[0, len(prompt) :]]


def flip_bit(parameter: Tensor, element: int = 0) -> None:
    """Flip the lowest bit of one element, in place."""
    view = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
    parameter.detach().view(-1)[element : element + 1].view(view).bitwise_xor_(1)


class Client:
    """Collects what a row is told."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def __call__(self, chunk: Chunk) -> None:
        assert not self.ended, "nothing may follow the last chunk"
        self.chunks.append(chunk)

    @property
    def ended(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].last

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def logprobs(self) -> list[float]:
        return [value for chunk in self.chunks for value in chunk.logprobs]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def reason(self) -> FinishReason | None:
        return self.chunks[-1].finish_reason if self.chunks else None

    @property
    def error(self) -> Exception | None:
        return self.chunks[-1].error if self.chunks else None


class Recorder(EngineObserver):
    """Notes (running rows, corrected rows) of every decode step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.folds: list[bool] = []

    def stepped(self, rows: tuple[Sequence, ...], waiting: int, corrected: int) -> None:
        self.steps.append((len(rows), corrected))

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        self.folds.append(succeeded)


class Bench:
    """An engine that is stepped by hand, without its thread."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        slots: int = 4,
        max_queue: int = 8,
        kernels: bool = False,
        graphs: bool = False,
        on_host: bool = False,
        prefill_tokens: int = 128,
    ) -> None:
        self.model = open_model(
            folder, dtype, device, max_batch=slots, kernels=kernels, graphs=graphs
        )
        self.layout = self.model.layout
        self.pristine = load_reference(folder, dtype)
        self.weights = open_weights(self.model, on_host=on_host)
        self.scheduler = Scheduler(slots, max_queue, self.model.switch)
        self.observer = Recorder()
        self.engine = Engine(
            self.model,
            self.weights,
            self.scheduler,
            self.observer,
            prefill_tokens=prefill_tokens,
        )
        self.tokenizer = Tokenizer(folder)

    def mix(self, *terms: tuple[Adapter, float]) -> BoundMix:
        return bound(*terms, base_digest=self.model.base_digest)

    def row(
        self, prompt: list[int], mix: BoundMix, params: SamplingParams = GREEDY
    ) -> tuple[Sequence, Client]:
        client = Client()
        return Sequence(prompt, mix, params, client, self.tokenizer), client

    def submit(
        self, prompt: list[int], mix: BoundMix, params: SamplingParams = GREEDY
    ) -> tuple[Sequence, Client]:
        sequence, client = self.row(prompt, mix, params)
        self.engine.submit(sequence)
        return sequence, client

    def fold(self, mix: BoundMix) -> None:
        """Make `mix` resident at once."""
        future = self.engine.fold(self.weights.prepare(mix))
        self.engine.step()
        future.result(timeout=0)

    def run(self, limit: int = 200) -> None:
        """Step until nothing runs or waits."""
        for _ in range(limit):
            if self.scheduler.idle:
                return
            self.engine.step()
        raise AssertionError(f"still busy after {limit} steps")

    def reference(self, mix: BoundMix) -> Any:
        return dense_model(self.pristine, mix, self.layout)

    def alone(self, prompt: list[int], mix: BoundMix, tokens: int = 8) -> list[int]:
        """The reference text of a request."""
        key = (tuple(prompt), mix.digest, tokens)
        if key not in _REFERENCE_TEXTS:
            _REFERENCE_TEXTS[key] = generate(self.reference(mix), prompt, tokens)
        return _REFERENCE_TEXTS[key]
