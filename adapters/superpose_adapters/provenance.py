"""Where a merged adapter comes from, as the adapter itself says.

It stands in the metadata of the tensor file, which PEFT and the digest leave alone: a merged
adapter is an ordinary PEFT folder of two files. What it says was written by a stranger, and nothing
holds it against the adapters that it names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from superpose_adapters.digest import canonical_json
from superpose_adapters.mix_syntax import NAME_PATTERN, check_name, check_weight
from superpose_adapters.option_syntax import LARGEST_WHOLE, Option
from superpose_adapters.strict_json import StrictJsonError, read_object, shorten

METADATA_KEY = "superpose_merge"

# A merge of a hundred adapters by a method of a dozen options has less than a third of it.
MAX_BYTES = 64 << 10
_MAX_TEXT = 200
_MAX_OPTIONS = 64
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ProvenanceError(ValueError):
    """What is no provenance; one line that says why."""


@dataclass(frozen=True)
class Source:
    """One adapter that was merged.

    Attributes:
        domain: What it was called then.
        digest: The adapter's.
        weight: What its delta was multiplied by, not 0.
    """

    domain: str
    digest: str
    weight: float

    def __post_init__(self) -> None:
        """Check everything.

        Raises:
            ProvenanceError: Something is none of what it should be.
        """
        try:
            check_name(self.domain)
            check_weight(self.domain, self.weight)
        except ValueError as error:
            raise ProvenanceError(str(error)) from error
        if not self.weight:
            raise ProvenanceError(f"weight of {self.domain} is 0: leave it out")
        if not _DIGEST.fullmatch(self.digest):
            raise ProvenanceError(f"digest of {self.domain} is no sha256 in hex")


@dataclass(frozen=True)
class Provenance:
    """How an adapter was merged.

    Attributes:
        method: Name of the method.
        options: All of its options, those that had their defaults too.
        sources: At least one, in the order of the fold.
    """

    method: str
    options: Mapping[str, Option]
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        """Check everything, so that whatever is written can be read.

        Raises:
            ProvenanceError: Something is none of what it should be.
        """
        if not NAME_PATTERN.fullmatch(self.method):
            raise ProvenanceError(f"method is {shorten(self.method)}")
        if len(self.options) > _MAX_OPTIONS:
            raise ProvenanceError(f"has {len(self.options)} options: at most {_MAX_OPTIONS}")
        for name, value in self.options.items():
            _check_option(name, value)
        if not self.sources:
            raise ProvenanceError("names no sources")
        if len(self.text) > MAX_BYTES:
            raise ProvenanceError(f"has {len(self.text)} bytes: at most {MAX_BYTES}")

    @property
    def text(self) -> str:
        """Canonical JSON, in ASCII."""
        return canonical_json(self.as_json()).decode()

    @property
    def metadata(self) -> dict[str, str]:
        """What a tensor file says beside its tensors, see `adapter_files`."""
        return {METADATA_KEY: self.text}

    def as_json(self) -> dict[str, object]:
        """Return it as plain values."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "sources": [
                {"domain": source.domain, "digest": source.digest, "weight": source.weight}
                for source in self.sources
            ],
        }


def read_provenance(text: str) -> Provenance:
    """Return what `Provenance.text` has written.

    Raises:
        ProvenanceError: It is something else, or too long.
    """
    if len(text) > MAX_BYTES:
        raise ProvenanceError(f"has {len(text)} characters: at most {MAX_BYTES}")
    try:
        value = read_object(text.encode())
    except UnicodeEncodeError as error:
        raise ProvenanceError("holds half a character") from error
    except StrictJsonError as error:
        raise ProvenanceError(str(error)) from error
    return provenance_from_json(value)


def provenance_from_json(value: object) -> Provenance:
    """Return what `Provenance.as_json` has returned.

    Raises:
        ProvenanceError: It is something else.
    """
    method, options, sources = _fields("it", value, ("method", "options", "sources"))
    if not isinstance(method, str):
        raise ProvenanceError("method is no word")
    if not isinstance(options, dict):
        raise ProvenanceError("options are no object")
    if not isinstance(sources, list):
        raise ProvenanceError("sources are no list")
    return Provenance(method, options, tuple(_source(source) for source in sources))


def _source(value: object) -> Source:
    domain, digest, weight = _fields("a source", value, ("domain", "digest", "weight"))
    if not isinstance(domain, str) or not isinstance(digest, str):
        raise ProvenanceError("domain or digest of a source is no text")
    if type(weight) not in (int, float):
        raise ProvenanceError(f"weight of {shorten(domain)} is no number")
    try:
        return Source(domain, digest, float(weight))
    except OverflowError as error:  # An integer of 400 digits has no float.
        raise ProvenanceError(f"weight of {shorten(domain)} is out of range") from error


def _fields(what: str, value: object, names: tuple[str, ...]) -> list[Any]:
    """Return the fields of an object that has these and no others."""
    if not isinstance(value, dict) or value.keys() != set(names):
        raise ProvenanceError(f"{what} is no object of {', '.join(names)}")
    return [value[name] for name in names]


def _check_option(name: str, value: object) -> None:
    if not _OPTION.fullmatch(name):
        raise ProvenanceError(f"an option is called {shorten(name)}")
    match value:
        case bool():
            fine = True
        case int():
            fine = abs(value) <= LARGEST_WHOLE
        case float():
            fine = math.isfinite(value)
        case str():
            fine = len(value) <= _MAX_TEXT and value.isprintable()
        case _:
            fine = False
    if not fine:
        raise ProvenanceError(
            f"option {name} is no number (a whole one below 2^53), no truth value, and no line of "
            f"{_MAX_TEXT} characters"
        )
