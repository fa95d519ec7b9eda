"""How a mix is written: names, weights, the MIX syntax, and the one form in JSON.

    math=1,medicine=0.5                 `;` separates as well as `,`
    math                                weight 1
    base                                the empty mix, which is the base model
    default                             the default mix
    {"math": 1, "medicine": 0.5}        in JSON; {} is the base model

Client and doors share this file, so it needs nothing but Python: no torch, no grpc, and no other
file of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
RESERVED_NAMES: Mapping[str, str] = {"base": "the base model", "default": "the default mix"}
"""Words of the MIX syntax, which name neither a domain nor a mix, and what they mean."""
MAX_ABS_WEIGHT = 1e4

_SEPARATOR = re.compile("[,;]")
# Narrower than float(), which also takes underscores and the digits of other scripts.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf(inity)?)", re.I)
# Characters of what somebody wrote, as a part of a line of ours.
_LONGEST = 80


def check_name(name: str) -> str:
    """Return `name` if it may name a domain, or a mix.

    Raises:
        ValueError: It does not match `[a-z0-9][a-z0-9._-]{0,63}`, or is a word of the MIX syntax.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"{_quoted(name)} is not a valid name: use 1 to 64 characters of a-z 0-9 . _ -, "
            "the first a letter or digit"
        )
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is reserved for {RESERVED_NAMES[name]}: choose another name")
    return name


def check_weight(name: str, weight: float) -> float:
    """Return `weight` if it may weigh what is called `name`.

    Raises:
        ValueError: It is not finite, or its absolute value is above `MAX_ABS_WEIGHT`.
    """
    if not abs(weight) <= MAX_ABS_WEIGHT:  # so that NaN is refused too
        raise ValueError(
            f"weight of {name} is {_quoted(weight)}: use a number between "
            f"-{MAX_ABS_WEIGHT:g} and {MAX_ABS_WEIGHT:g}"
        )
    return weight


def check_weights(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return pairs of name and weight as a mapping, in their order.

    Raises:
        ValueError: A bad name, a bad weight, or a name that comes twice.
    """
    weights: dict[str, float] = {}
    for name, weight in pairs:
        check_name(name)
        check_weight(name, weight)
        if name in weights:
            raise ValueError(f"{name} is named twice: name each domain once")
        weights[name] = float(weight)
    return weights


def parse_mix(text: str) -> dict[str, float] | None:
    """Return the {name: weight} that `text` writes in MIX syntax; None is the default mix.

    A name is that of a domain or of a named mix: which of them, the server knows. Weights of 0 are
    kept: they mean absent to the server.

    Raises:
        ValueError: One line that names the part at fault and the remedy.
    """
    match text.strip():
        case "base":
            return {}
        case "default":
            return None
        case "":
            raise ValueError("the mix is empty: write base, or default for the default mix")
        case written:
            try:
                return check_weights(
                    _parse_part(number, part)
                    for number, part in enumerate(_SEPARATOR.split(written), start=1)
                )
            except ValueError as error:
                raise ValueError(f"mix {_quoted(text)}: {error}") from None


def mix_from_json(value: Any) -> dict[str, float]:
    """Return the {name: weight} that a value read from JSON means; {} is the base model.

    Such a value has lost a key that its text names twice, so whoever reads the text must refuse
    that: `strict_json` does.

    Raises:
        ValueError: It is no object of names and finite numbers; one line that names what is wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f"{_quoted(value)} is no mix in JSON: write an object of names and weights, such as "
            '{"math": 1, "medicine": 0.5}'
        )
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"weight of {check_name(name)} is {_quoted(weight)}: write a number")
    return check_weights(value.items())


def format_mix(mix: Mapping[str, float]) -> str:
    """Return `mix` in MIX syntax, to the last bit: parse_mix(format_mix(mix)) == mix."""
    return ",".join(f"{name}={format_weight(weight)}" for name, weight in mix.items()) or "base"


def format_weight(weight: float) -> str:
    """Return the shortest text that reads back as the same double, without a trailing `.0`."""
    return repr(float(weight)).removesuffix(".0")


def _parse_part(number: int, part: str) -> tuple[str, float]:
    if not part.strip():
        raise ValueError(f"part {number} is empty: remove the extra separator")
    name, equals, weight = (piece.strip() for piece in part.partition("="))
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} means {RESERVED_NAMES[name]}: write it alone, or leave it out")
    if not equals:
        return name, 1.0
    if not _NUMBER.fullmatch(weight):
        raise ValueError(
            f"weight of {_quoted(name)} is {_quoted(weight)}: write a number, as in math=-0.5"
        )
    return name, float(weight)


def _quoted(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
