"""Tiny bases of many kinds, and what transformers' own passes say of a row: the reference.

Nothing here calls the code under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.makers import EOS_ID, save_base
from tests.server.helpers import Bench, Client, random_adapter
from tests.zoo import build
from torch import Tensor

from superpose_adapters.mix import BoundMix
from superpose_server.engine.score import ScoreRow


def save_tiny(folder: Path, model_type: str, seed: int = 0, **fields: Any) -> Path:
    """Save a model of the zoo with other fields, as `save_base` does."""
    return save_base(build(model_type, seed, **fields), folder)


def ids_of(seed: int, count: int) -> list[int]:
    """A seeded text without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    # 0 and 1 pad in some families.
    ids: list[int] = torch.randint(2, EOS_ID, (count,), generator=generator).tolist()
    return ids


def three_mixes(bench: Bench) -> list[BoundMix]:
    """The base, an adapter, and a sum with a negative weight: large enough to change texts."""
    one = random_adapter(bench.layout, 1, size=0.1)
    two = random_adapter(bench.layout, 2, rank=2, size=0.1)
    return [bench.mix(), bench.mix((one, 1.0)), bench.mix((one, -0.7), (two, 0.8))]


@contextmanager
def in_float64() -> Iterator[None]:
    """Some classes make positions in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Exact:
    """transformers' own passes in float64 under the mixes of a bench, all uncached.

    Attributes:
        bench: Whose base and layout it is.
        growing: True if earlier logits depend on how long the text is.
    """

    bench: Bench
    growing: bool = False

    @torch.no_grad()
    def __call__(self, mix: BoundMix, ids: list[int]) -> Tensor:
        """Log-probabilities (tokens, vocabulary) of a whole text."""
        with in_float64():
            logits: Tensor = self._model(mix)(input_ids=torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1)

    def _model(self, mix: BoundMix) -> Any:
        models: dict[str, Any] = vars(self.bench).setdefault("exact_models", {})
        if mix.digest not in models:
            models[mix.digest] = self.bench.reference(mix)
            if hasattr(models[mix.digest].config, "num_local_experts"):
                # The default has no float64.
                models[mix.digest].set_experts_implementation("eager")
        return models[mix.digest]

    def check_text(self, prompt: list[int], mix: BoundMix, client: Client, count: int) -> None:
        """Check a greedy row that asked for log-probabilities, token by token."""
        assert client.error is None
        assert len(client.tokens) == count
        text = prompt + client.tokens
        ends = range(len(prompt), len(text))
        if self.growing:
            following = torch.stack([self(mix, text[:end])[-1] for end in ends])
        else:
            following = self(mix, text)[len(prompt) - 1 : -1]
        chosen = following[torch.arange(count), client.tokens]
        found = torch.tensor(client.logprobs, dtype=torch.float64)
        assert torch.allclose(found, chosen, rtol=0, atol=5e-4), (found - chosen).abs().max()
        # The likeliest, but for what float32 cannot tell apart.
        assert bool((chosen >= following.amax(-1) - 1e-4).all())

    def check_scores(self, found: list[list[float]], rows: list[ScoreRow], mix: BoundMix) -> None:
        """Check what Score says of texts, each by one pass over the whole of it."""
        assert len(found) == len(rows)
        for values, row in zip(found, rows, strict=True):
            all_of_it = self(mix, list(row.ids))[:-1]
            exact = all_of_it.gather(1, torch.tensor(row.ids[1:])[:, None])[row.first - 1 :, 0]
            assert len(values) == len(exact)
            of_row = torch.tensor(values, dtype=torch.float64)
            assert torch.allclose(of_row, exact, rtol=0, atol=5e-4), (of_row - exact).abs().max()


def score(bench: Bench, rows: list[ScoreRow], mix: BoundMix) -> list[list[float]]:
    """Score by the engine, a step at a time."""
    future = bench.engine.score(rows, [mix] * len(rows))
    for _ in range(500):
        if future.done():
            return [row.logprobs for row in future.result().value]
        bench.engine.step()
    raise AssertionError("the score does not end")
