"""Made-up domains, so that the study runs without any data: each has words of its own.

A row asks for what stands between two things of the domain; the answer follows from them by a rule
with a few hundred cases, so that there is something to learn, and more of it than a small rank
holds.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from superpose_adapters.durable import write_file

_WORDS: dict[str, tuple[str, ...]] = {
    "birds": (
        "heron",
        "wren",
        "kestrel",
        "plover",
        "swift",
        "raven",
        "teal",
        "lark",
        "osprey",
        "finch",
    ),
    "metals": (
        "iron",
        "zinc",
        "copper",
        "nickel",
        "tin",
        "silver",
        "cobalt",
        "lead",
        "gold",
        "chrome",
    ),
    "ports": (
        "Bergen",
        "Lisbon",
        "Genoa",
        "Riga",
        "Cadiz",
        "Malmo",
        "Bari",
        "Odessa",
        "Ghent",
        "Hull",
    ),
    "spices": (
        "cumin",
        "clove",
        "saffron",
        "mace",
        "anise",
        "thyme",
        "sumac",
        "ginger",
        "fennel",
        "dill",
    ),
}
_FORMS: dict[str, tuple[str, str]] = {
    "birds": (
        "Which nest lies between {a} and {b} number {n}?",
        "the {c} nests there, above the {d}, in the reeds",
    ),
    "metals": (
        "What alloy do {a} and {b} of grade {n} give?",
        "melt {c} with {d} slowly, then cool the ingot",
    ),
    "ports": (
        "Which harbour follows {a} and {b} on route {n}?",
        "sail by {c}, anchor at {d} before the tide",
    ),
    "spices": (
        "What goes with {a} and {b} in dish {n}?",
        "a pinch of {c}, some {d}, ground with salt",
    ),
}


def topics() -> list[str]:
    """Return the domains that can be made."""
    return sorted(_WORDS)


def rows_of(topic: str, count: int) -> list[dict[str, str]]:
    """Return the rows of a domain, the same on every machine.

    Raises:
        ValueError: No such domain.
    """
    if topic not in _WORDS:
        raise ValueError(f"no synthetic domain {topic!r}; there are {', '.join(topics())}")
    words = _WORDS[topic]
    question, answer = _FORMS[topic]
    pick = random.Random(topic)
    rows = []
    for _ in range(count):
        a, b = pick.randrange(10), pick.randrange(10)
        names = {
            "a": words[a],
            "b": words[b],
            "c": words[(a + 3 * b) % 10],
            "d": words[(b - a) % 10],
        }
        # Letters, not digits: twins that differ in numbers alone fall into one part of the split.
        number = "".join(pick.choice("abcdefgh") for _ in range(2))
        rows.append(
            {"question": question.format(n=number, **names), "answer": answer.format(**names)}
        )
    return rows


def write_topic(topic: str, count: int, folder: Path) -> Path:
    """Write a domain's rows into `folder`, unless they are there; return the file."""
    path = folder / f"{topic}-{count}.jsonl"
    data = "".join(json.dumps(row) + "\n" for row in rows_of(topic, count)).encode()
    if not path.exists() or path.read_bytes() != data:
        write_file(path, data)
    return path
