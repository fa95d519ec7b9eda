"""How requests ask for tokens: greedily, or as people do."""

from __future__ import annotations

from argparse import ArgumentTypeError

from benchmarks.shapes import SIZES
from superpose_client import GenerateOptions

GREEDY = "greedy"
# By the name that tables and --sampling use; the fields are those of the wire.
SAMPLINGS: dict[str, GenerateOptions] = {
    GREEDY: {"temperature": 0.0},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
}


def samplings(text: str) -> list[str]:
    """Read a list such as greedy,top_p.

    Raises:
        ArgumentTypeError: A name that is none of SAMPLINGS.
    """
    names = text.split(",")
    unknown = [name for name in names if name not in SAMPLINGS]
    if unknown:
        raise ArgumentTypeError(f"{unknown[0]} is none of {', '.join(SAMPLINGS)}")
    return names


def describe(model: str) -> str:
    """Return what a report says of the sampled figures of a model."""
    asked = "; ".join(
        f"{name}: {', '.join(f'{field} {value}' for field, value in options.items())}"
        for name, options in SAMPLINGS.items()
        if name != GREEDY
    )
    whose = "The logits are those of trained weights."
    if model in SIZES:
        whose = (
            "The logits are those of random weights, of which top_p keeps far more tokens than of "
            "a trained base's: compare with --model mini."
        )
    return f"Sampled: {asked}. {whose}"
