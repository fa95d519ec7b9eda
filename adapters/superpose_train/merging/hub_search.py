"""LoRAHub's weights: searched for, by what rows lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

from superpose_adapters.merge.lorahub import BOUND, LoraHub
from superpose_adapters.merge.merge import Part, merge
from superpose_adapters.scoring import EncodedText
from superpose_adapters.weight_search import Point, Space, best_of, search
from superpose_train.merging.adapted_base import AdaptedBase


def search_weights(
    method: LoraHub,
    base: AdaptedBase,
    parts: Sequence[Part],
    rows: Mapping[str, Sequence[EncodedText]],
) -> LoraHub:
    """Return the method with the weights that lose least on all rows together, of those tried.

    Args:
        method: Without weights.
        base: Hooked for these parts.
        parts: In the order of the fold.
        rows: Of whatever they are called.

    Raises:
        MergeError: The adapters' ranks differ in a module.
    """
    texts = list(chain.from_iterable(rows.values()))
    # Of the mean of |v|, where the search has a sum.
    penalty = method.penalty / len(parts)
    space = Space(len(parts), -BOUND, BOUND, penalty)

    def lost(point: Point) -> float:
        with base.under(merge(parts, replace(method, weights=point))):
            return base.loss(texts).mean

    losses: dict[Point, float] = {}
    rounds = search(space, method.evaluations, method.seed)
    points = next(rounds)
    while points:
        losses.update((point, lost(point)) for point in points)
        try:
            points = rounds.send([losses[point] for point in points])
        except StopIteration:
            break
    return replace(method, weights=best_of(losses, space).point)
