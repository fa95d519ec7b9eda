"""The file that servers follow: it says what the default mix is, and what named mixes there are.

    {
      "mix": {"math": 1, "medicine": 0.5},
      "named_mixes": {"qa": {"math": 1, "medicine": -0.1}},
      "adapters": {"math": "5e88..."}
    }

Mixes are of domains, in the one JSON form of mixes. `named_mixes`, if it is there, is the whole set
of them; `adapters` says by digest which adapter a domain has to be, on whatever server.

Needs no torch, so that a file that cannot be followed is refused before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from superpose_adapters.mix_syntax import check_name, mix_from_json
from superpose_adapters.strict_json import StrictJsonError, read_object, shorten

MOST_BYTES = 4 << 20
_FIELDS = {"mix", "named_mixes", "adapters"}
_DIGEST = re.compile(r"[0-9a-f]{64}")


class MixFileError(ValueError):
    """A file cannot be followed; one line, which goes on after the name of the file."""


@dataclass(frozen=True)
class MixFile:
    """What a followed file says.

    Attributes:
        mix: The default mix, {domain: weight}; empty for the base model.
        named_mixes: All named mixes, {name: {domain: weight}}; None: the file says nothing of them.
        adapters: Which adapters domains have to be, {domain: digest}; of others it says nothing.
    """

    mix: Mapping[str, float]
    named_mixes: Mapping[str, Mapping[str, float]] | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)


def parse_mix_file(text: bytes) -> MixFile:
    """Return what the text of a file says.

    Raises:
        MixFileError: It is too large, no JSON, or says something that means nothing here.
    """
    if len(text) > MOST_BYTES:
        raise MixFileError(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        body = read_object(text)
    except StrictJsonError as error:
        raise MixFileError(f"it {error}") from error
    surplus = sorted(set(body) - _FIELDS)
    if surplus:
        # It may be a bound that this version does not keep.
        raise MixFileError(
            f"field {shorten(surplus[0])} is not known: use mix, named_mixes and adapters"
        )
    if "mix" not in body:
        raise MixFileError('it has no "mix": write {} for the base model')
    named = body.get("named_mixes")
    return MixFile(
        _mix("mix", body["mix"]),
        None if "named_mixes" not in body else _named_mixes(named),
        _adapters(body.get("adapters", {})),
    )


def _mix(what: str, value: Any) -> dict[str, float]:
    try:
        return mix_from_json(value)
    except ValueError as error:
        raise MixFileError(f"{what}: {error}") from error


def _named_mixes(value: Any) -> dict[str, dict[str, float]]:
    if not isinstance(value, dict):
        raise MixFileError(f"named_mixes is {shorten(value)}: write an object of names and mixes")
    return {
        _name("named_mixes", name): _mix(f"named mix {name}", mix) for name, mix in value.items()
    }


def _adapters(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise MixFileError(f"adapters is {shorten(value)}: write an object of domains and digests")
    for domain, digest in value.items():
        _name("adapters", domain)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise MixFileError(
                f"adapters: digest of {domain} is {shorten(digest)}: write the 64 hex digits that "
                "adapterctl show tells"
            )
    return value


def _name(where: str, name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise MixFileError(f"{where}: {error}") from error
