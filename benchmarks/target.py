"""What is put under load: a server (`servertarget`), or its engine alone (`inprocess`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.sampling import GREEDY, SAMPLINGS
from superpose_client import GenerateOptions

Weights = Mapping[str, float]


@dataclass
class Streamed:
    """One request and what came back; times are those of `time.perf_counter`.

    Attributes:
        prompt: Token ids.
        mix: The mix that it names; None: the default mix.
        length: New tokens that it asks for.
        sampling: How they are to be chosen.
        due: When it should have been sent: what its user waits from.
        arrivals: (time, number of tokens) of each chunk.
        tokens: All of them.
        used: The mix that the answer was made with, if it said so.
        status: "" while it runs, then OK or the name of a status code.
        ended: When it ended.
    """

    prompt: Sequence[int]
    mix: Weights | None
    length: int
    sampling: GenerateOptions = field(default_factory=lambda: SAMPLINGS[GREEDY])
    due: float = field(default_factory=time.perf_counter)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    used: Weights | None = None
    status: str = ""
    ended: float = 0.0

    def add(self, tokens: Sequence[int]) -> None:
        """Note tokens that arrive now."""
        if tokens:
            self.arrivals.append((time.perf_counter(), len(tokens)))
            self.tokens.extend(tokens)

    def end(self, status: str) -> None:
        """Note the end."""
        self.status = status
        self.ended = time.perf_counter()

    @property
    def first_token(self) -> float:
        """Seconds from `due` to the first token."""
        return self.arrivals[0][0] - self.due

    @property
    def latency(self) -> float:
        """Seconds from `due` to the end."""
        return self.ended - self.due

    def gaps(self, since: float, until: float) -> list[float]:
        """Return the gap before each token that arrived between two times.

        A chunk of several tokens counts as that many gaps, each as long as the wait for the chunk.
        """
        return [
            now - before
            for (before, _), (now, count) in zip(self.arrivals, self.arrivals[1:], strict=False)
            if before >= since and now <= until
            for _ in range(count)
        ]

    def tokens_between(self, since: float, until: float) -> int:
        """Return how many tokens arrived between two times."""
        return sum(count for at, count in self.arrivals if since < at <= until)


class Target(Protocol):
    """Something that streams texts and whose default mix can be changed."""

    async def stream(self, request: Streamed) -> None:
        """Run a request to its end, noting in it what comes; cancellation cancels it."""

    async def change(self, mix: Weights) -> str:
        """Change the default mix; return OK or the name of a status code."""

    async def generation(self) -> int:
        """Return the generation of the default mix."""
