"""What changes a row's logits before a token is chosen: penalties, bias, what is forbidden.

A row remembers which tokens its text has, each once, so that a step costs no more than these: a row
that asks for nothing has no history and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Penalties:
    """How much less likely a token becomes for standing in the text, or more if below 0 or 1.

    Attributes:
        repetition: What a token of prompt or answer is penalised by: a positive logit is divided by
            it, a negative one multiplied (Keskar et al., CTRL, 2019, arXiv 1909.05858). 1: nothing.
        frequency: Taken off the logit for each time that the token stands in the answer.
        presence: Taken off the logit of a token that stands in the answer.
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    def __bool__(self) -> bool:
        """True if they change anything."""
        return self != Penalties()


class History:
    """The tokens that penalties look at: each once, with how often it stands in the answer."""

    def __init__(self, penalties: Penalties, prompt: Sequence[int], most: int) -> None:
        """Begin with a prompt, which the repetition penalty alone looks at.

        Args:
            penalties: What they are for.
            prompt: Token ids.
            most: Tokens that the answer has at most.
        """
        self.penalties = penalties
        known = dict.fromkeys(prompt) if penalties.repetition != 1 else {}
        self._places = {token: place for place, token in enumerate(known)}
        self._ids = torch.empty(len(known) + most, dtype=torch.int64)
        self._ids[: len(known)] = torch.tensor([*known], dtype=torch.int64)
        self._counts = torch.zeros(len(known) + most)

    def append(self, token: int) -> None:
        """Add a token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        self._ids[place] = token
        self._counts[place] += 1

    @property
    def ids(self) -> Tensor:
        """The tokens, int64."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """How often each of `ids` stands in the answer, float32."""
        return self._counts[: len(self._places)]


def adjusted(
    logits: Tensor,
    histories: Sequence[History | None],
    biases: Sequence[Mapping[int, float]],
    forbidden: Sequence[AbstractSet[int]],
) -> Tensor:
    """Return logits (rows, vocabulary) with penalties, then bias; what is forbidden is -inf.

    A copy, or `logits` themselves if nobody asks for anything. Ids that the base has no logits for,
    as some tokenizers hold them, no row can be given anyway.

    Args:
        logits: float32 (rows, vocabulary).
        histories: One a row; None: no penalties.
        biases: What is added to the logits of tokens, one mapping a row.
        forbidden: Tokens that a row may not be given, one set a row.
    """
    penalised = [(row, history) for row, history in enumerate(histories) if history is not None]
    biased = [(row, *pair) for row, bias in enumerate(biases) for pair in bias.items()]
    barred = [(row, token, -torch.inf) for row, tokens in enumerate(forbidden) for token in tokens]
    if not (penalised or biased or barred):
        return logits
    logits = logits.clone()
    if penalised:
        _penalise(logits, penalised)
    for terms in (biased, barred):
        _add(logits, [term for term in terms if term[1] < logits.shape[1]])
    return logits


def _penalise(logits: Tensor, rows: Sequence[tuple[int, History]]) -> None:
    sizes = torch.tensor([len(history.ids) for _, history in rows])
    ids = torch.cat([history.ids for _, history in rows])
    terms = torch.tensor(
        [
            (history.penalties.repetition, history.penalties.frequency, history.penalties.presence)
            for _, history in rows
        ]
    ).repeat_interleave(sizes, dim=0)
    counts = torch.cat([history.counts for _, history in rows])
    less = terms[:, 1] * counts + terms[:, 2] * (counts > 0)
    places = torch.tensor([row for row, _ in rows]).repeat_interleave(sizes)
    there = ids < logits.shape[1]
    at = (places[there].to(logits.device), ids[there].to(logits.device))
    repetition = terms[there, 0].to(logits.device)
    values = logits[at]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[at] = values - less[there].to(logits.device)


def _add(logits: Tensor, terms: Sequence[tuple[int, int, float]]) -> None:
    if terms:
        rows, ids, amounts = zip(*terms, strict=True)
        at = torch.tensor((rows, ids), device=logits.device)
        added = torch.tensor(amounts, dtype=logits.dtype, device=logits.device)
        logits[at[0], at[1]] += added
