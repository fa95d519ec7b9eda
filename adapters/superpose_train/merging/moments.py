"""RegMean's moments: what each module's inputs are like, on each part's own rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from superpose_adapters.merge.merge import Part, merge
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.regmean import Moments, RegMean
from superpose_adapters.scoring import EncodedText
from superpose_train.merging.adapted_base import AdaptedBase
from superpose_train.schedule import EVALUATION_BATCH


def learn_moments(
    method: RegMean,
    base: AdaptedBase,
    parts: Sequence[Part],
    rows: Mapping[str, Sequence[EncodedText]],
) -> RegMean:
    """Return the method with the moments of each part's inputs.

    Inputs are those of the base with that part alone, at its weight, on that part's rows, at all
    their tokens: nothing is predicted, answers are text as any. They take 4 in^2 bytes a module and
    part.

    Args:
        method: Without moments.
        base: Hooked for these parts.
        parts: In the order of the fold.
        rows: Of each part's domain.

    Raises:
        ValueError: A module is not shown every token.
    """
    by_part = [_moments(base, part, rows[part.domain]) for part in parts]
    moments: Moments = {module: [found[module] for found in by_part] for module in base.modules}
    return replace(method, moments=moments)


@torch.no_grad()
def _moments(base: AdaptedBase, part: Part, rows: Sequence[EncodedText]) -> dict[str, Tensor]:
    """Return {module: E[x x^T]}, float32 (in, in), over the tokens of rows."""
    seen = _Seen({name: inputs for name, (inputs, _) in base.modules.items()})
    with base.under(merge([part], PlainSum())), seen.watching(base.model):
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = base.padded(rows[start : start + EVALUATION_BATCH])
            seen.tokens = batch["attention_mask"].bool()
            base.logits(batch)
    return seen.moments()


class _Seen:
    """Sums over the inputs of some modules while a model runs.

    Attributes:
        tokens: Of the batch that runs, (rows, longest): where there is a token and no padding.
    """

    tokens: Tensor

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._sums = {name: torch.zeros(width, width) for name, width in widths.items()}
        self._counts: Counter[str] = Counter()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(self._see, name))
            for name in self._sums
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:-1] != self.tokens.shape:
            raise ValueError(
                f"regmean: {name} is not shown every token of a text, so that its inputs say "
                "little: use another method"
            )
        x = inputs[0][self.tokens]
        self._sums[name] += (x.T @ x).to(self._sums[name])
        self._counts[name] += len(x)

    def moments(self) -> dict[str, Tensor]:
        means = {name: total / max(1, self._counts[name]) for name, total in self._sums.items()}
        # Not every processor's product with itself is symmetric to the last bit.
        return {name: (mean + mean.T) / 2 for name, mean in means.items()}
