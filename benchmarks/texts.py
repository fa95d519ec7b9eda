"""Greedy texts that must be the same whatever else happens on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.report import Cell, Check, Report, Table
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


def report_texts(
    report: Report,
    found: Mapping[str, Texts],
    client: Client,
    prompts: Sequence[Sequence[int]],
    dtype: str,
) -> None:
    """Say in a report whether every text, {variant: texts}, was that of the run without changes."""
    rows: list[list[Cell]] = []
    margins: list[float] = []
    for variant, texts in found.items():
        apart = texts.margins(client, prompts)
        margins += apart
        worst = max(apart, default=None)
        rows.append([variant, texts.texts, texts.tokens, len(apart), worst, texts.unknown])
    columns = (
        "variant",
        "texts compared",
        "tokens compared",
        "texts that differ",
        "widest margin of the two tokens, nat",
        "without reference",
    )
    report.tables.append(Table("Greedy texts with changes against those without", columns, rows))
    if dtype == "float32":
        ties = sum(value < TIE for value in margins)
        report.checks.append(
            Check(
                f"no token differs in float32, but for ties closer than {TIE:g} nat ({ties})",
                all(value < TIE for value in margins),
            )
        )
    else:
        report.notes.append(
            "In bfloat16 greedy texts part where two tokens are nearly as likely; the table says "
            "how near they were (by Score)."
        )
