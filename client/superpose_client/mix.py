"""The MIX syntax: `math=1,medicine=0.5`. The client owns it; the server receives entries."""

import math
import re
from collections.abc import Mapping

from superpose_client.errors import MixSyntaxError

MixLike = str | Mapping[str, float]
"""A mix as callers write it: MIX syntax, or {domain: weight}."""

MAX_WEIGHT = 1e4
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# Narrower than float(), which also takes underscores and the digits of other scripts.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf(inity)?)", re.I)


def parse_mix(text: str) -> dict[str, float]:
    """Return the {domain: weight} that `text` names.

    A domain without a weight has weight 1, and the single word `base` is the empty mix, the base
    model. A domain that is itself called base is written with its weight, `base=1`. Weights of 0
    are kept: they mean absent to the server, which still says whether it knows the domain.

    Raises:
        MixSyntaxError: One line that names the part at fault and the remedy.
    """
    if text.strip() == "base":
        return {}
    if not text.strip():
        raise MixSyntaxError("the mix is empty; write 'base' for the base model")
    mix: dict[str, float] = {}
    for number, part in enumerate(text.split(","), start=1):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            raise MixSyntaxError(f"part {number} of mix {text!r} is empty; remove the extra comma")
        if not _NAME.fullmatch(name):
            raise MixSyntaxError(
                f"bad domain name {name!r} in mix {text!r}; use 1 to 64 of a-z, 0-9, '.', '_' "
                "and '-', beginning with a letter or digit, with a weight as in math=-0.5"
            )
        if name == "base" and not equals:
            raise MixSyntaxError(
                f"'base' in mix {text!r} means the base model and stands alone; "
                "write base=1 for a domain of that name"
            )
        if name in mix:
            raise MixSyntaxError(f"domain {name!r} appears twice in mix {text!r}; name it once")
        mix[name] = _parse_weight(weight, name, text) if equals else 1.0
    return mix


def format_mix(mix: Mapping[str, float]) -> str:
    """Return `mix` in MIX syntax, to the last bit: parse_mix(format_mix(mix)) == mix."""
    return ",".join(f"{name}={format_weight(weight)}" for name, weight in mix.items()) or "base"


def format_weight(weight: float) -> str:
    """Return the shortest text that reads back as the same double, without a trailing `.0`."""
    return repr(float(weight)).removesuffix(".0")


def _parse_weight(text: str, name: str, mix: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise MixSyntaxError(
            f"bad weight {text!r} of domain {name!r} in mix {mix!r}; write a number, as {name}=0.5"
        )
    weight = float(text)
    if math.isnan(weight) or abs(weight) > MAX_WEIGHT:
        raise MixSyntaxError(
            f"weight {text} of domain {name!r} in mix {mix!r} is out of range; "
            f"use a number from -{MAX_WEIGHT:.0f} to {MAX_WEIGHT:.0f}"
        )
    return weight
