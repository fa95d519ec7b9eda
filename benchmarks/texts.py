"""Greedy texts that must be the same whatever else happens on the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.target import Weights
from superpose_client import Client

# Log-probabilities of two tokens that are this near are a tie, which rounding may break either way.
TIE = 1e-4

# Index of the prompt, and the mix: what a greedy text depends on.
Key = tuple[int, tuple[tuple[str, float], ...]]


def key_of(index: int, mix: Weights) -> Key:
    """Return what the greedy text of a prompt under a mix is known by."""
    return index, tuple(sorted(mix.items()))


@dataclass(frozen=True)
class Difference:
    """The first token of a text that is not that of the reference."""

    key: Key
    position: int
    wanted: int
    found: int


@dataclass
class Texts:
    """Greedy texts by prompt and mix.

    Attributes:
        reference: The longest text of each that was made without changes.
        texts: Number of texts that were compared.
        tokens: Number of tokens that were compared.
        differences: What was found.
        unknown: Number of texts for which there is no reference.
    """

    reference: dict[Key, list[int]] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0
    differences: list[Difference] = field(default_factory=list)
    unknown: int = 0

    def learn(self, key: Key, tokens: list[int]) -> None:
        """Keep a text that was made without changes."""
        if len(tokens) > len(self.reference.get(key, [])):
            self.reference[key] = tokens

    def compare(self, key: Key, tokens: list[int]) -> None:
        """Compare as much of a text as the reference has."""
        reference = self.reference.get(key)
        if reference is None:
            self.unknown += 1
            return
        self.texts += 1
        for position, (wanted, found) in enumerate(zip(reference, tokens, strict=False)):
            self.tokens += 1
            if wanted != found:
                self.differences.append(Difference(key, position, wanted, found))
                break

    def margins(self, client: Client, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Return for each difference how far the log-probabilities of its two tokens are apart."""
        # The same text parts the same way round after round.
        known = {
            difference: self._margin(client, prompts, difference)
            for difference in dict.fromkeys(self.differences)
        }
        return [known[difference] for difference in self.differences]

    def _margin(
        self, client: Client, prompts: Sequence[Sequence[int]], difference: Difference
    ) -> float:
        index, mix = difference.key
        before = [*prompts[index], *self.reference[difference.key][: difference.position]]
        candidates = [[*before, token] for token in (difference.wanted, difference.found)]
        scored = client.score(candidates, mix=dict(mix), logprobs=True)
        first, second = (item.logprobs[-1] for item in scored.items)
        return abs(first - second)
