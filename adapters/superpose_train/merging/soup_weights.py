"""LoRA Soups' weights: learned by gradient, the base and the adapters frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from superpose_adapters.merge.merge import Part, terms_of
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.soups import Soups
from superpose_adapters.scoring import EncodedText
from superpose_train.loss import check_finite
from superpose_train.merging.adapted_base import AdaptedBase


def learn_weights(
    method: Soups,
    base: AdaptedBase,
    parts: Sequence[Part],
    rows: Mapping[str, Sequence[EncodedText]],
) -> Soups:
    """Return the method with the weights that lose less on all rows together.

    Args:
        method: Without weights.
        base: Hooked for these parts.
        parts: In the order of the fold.
        rows: Of whatever they are called: of the tasks, or of one that needs them all.

    Raises:
        NotFinite: A loss is not.
    """
    terms = {module: terms_of(parts, module) for module in base.modules}
    # (modules, parts): who adapts what.
    present = torch.zeros(len(terms), len(parts), dtype=torch.bool)
    for at, of_module in enumerate(terms.values()):
        present[at, [term.part for term in of_module]] = True
    owners = [
        torch.cat([torch.full((term.rank,), term.part) for term in of_module])
        for of_module in terms.values()
    ]
    summed = [
        tuple(factor.float() for factor in PlainSum().merge(module, len(parts), of_module))
        for module, of_module in terms.items()
    ]
    count = present.sum(1, keepdim=True)
    start = torch.zeros(present.shape) if method.softmax else present / count
    learned = start.requires_grad_()

    def weights() -> Tensor:
        if method.softmax:
            return learned.masked_fill(~present, -torch.inf).softmax(1)
        return learned * present

    optimizer = torch.optim.AdamW([learned], lr=method.learning_rate, weight_decay=0.0)
    texts = list(chain.from_iterable(rows.values()))
    for step, batch in enumerate(_batches(texts, method), start=1):
        gates = weights()
        pairs = {
            module: (a, b * gates[at, owners[at]])
            for at, (module, (a, b)) in enumerate(zip(terms, summed, strict=True))
        }
        with base.under(pairs):
            loss = base.mean_loss(batch)
        check_finite(loss.item(), "loss", step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = weights().detach().double()
    return replace(method, weights=dict(zip(terms, found.tolist(), strict=True)))


def _batches(texts: Sequence[EncodedText], method: Soups) -> Iterator[list[EncodedText]]:
    """Yield the rows of each step: all in a random order, then all in another one."""
    random = torch.Generator().manual_seed(method.seed)
    order: list[int] = []
    for _ in range(method.steps):
        while len(order) < method.batch_size:
            order += torch.randperm(len(texts), generator=random).tolist()
        yield [texts[index] for index in order[: method.batch_size]]
        del order[: method.batch_size]
