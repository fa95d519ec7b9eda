"""Which mix a body asks for: by `model`, as OpenAI's clients can, or by `mix`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from superpose_adapters.mix import Mix
from superpose_adapters.mix_syntax import mix_from_json, parse_mix
from superpose_proto.v1 import mix_pb2
from superpose_server.door.http.fields import TEXT, Asked, Field, ListOf, integer
from superpose_server.errors import InvalidArgument

DEFAULT = "default"


class _MixObject:
    schema: Mapping[str, Any] = {
        "type": "object",
        "additionalProperties": {"type": "number"},
        "example": {"math": 1, "medicine": 0.5},
    }

    def read(self, value: Any, at: str) -> Mix:
        try:
            return Mix.of(mix_from_json(value))
        except ValueError as error:
            raise InvalidArgument(f"{at}: {error}", "INVALID_MIX", field=at) from error


_MIX_OBJECT = _MixObject()
MIX = Field("mix", _MIX_OBJECT, 'A mix, such as {"math": 1, "medicine": 0.5}; {} is the base.')
MIXES = Field(
    "mixes", ListOf(_MIX_OBJECT), "In place of a mix: several, which share passes of the model."
)
MIN_GENERATION = Field(
    "min_generation",
    integer(0, 2**53),  # Beyond that not every JSON reader has all integers.
    "Refuse, as 503, where the default mix has a lower generation.",
)
MODEL = Field(
    "model",
    TEXT,
    "Which mix: base, default, a domain, a named mix, or math=1;medicine=0.5. Without it default.",
)


def model_mix(model: str) -> Mix | None:
    """Return the mix that a model's name means; None is the default mix.

    Raises:
        InvalidArgument: It is no mix.
    """
    try:
        weights = parse_mix(model)
        return None if weights is None else Mix.of(weights)
    except ValueError as error:
        raise InvalidArgument(
            f"model: {error} (GET /v1/models lists what is served)", "INVALID_MIX", field="model"
        ) from error


def requested_mix(asked: Asked) -> Mix | None:
    """Return the mix that a body asks for; None is the default mix.

    Clients that cannot leave `model` out send "default" beside `mix`.

    Raises:
        InvalidArgument: It asks for two.
    """
    model = asked.get("model", DEFAULT)
    if "mix" not in asked:
        return model_mix(model)
    if model != DEFAULT:
        raise InvalidArgument(
            f"model is {model[:80]!r}, which names a mix, and mix names another: leave one out, or "
            f"send {DEFAULT!r} as model",
            "TWO_MIXES",
            field="mix",
        )
    mix: Mix = asked["mix"]
    return mix


def requested_mixes(asked: Asked) -> tuple[Mix | None, ...]:
    """Return the mixes that a body asks for: its `mixes`, or else the one of `requested_mix`.

    Raises:
        InvalidArgument: It asks for both, or for none of several.
    """
    mix = requested_mix(asked)
    if "mixes" not in asked:
        return (mix,)
    if mix is not None:
        raise InvalidArgument(
            "mix, or model, and mixes are both given: send one of them",
            "MIX_GIVEN_TWICE",
            field="mixes",
        )
    if not asked["mixes"]:
        raise InvalidArgument(
            "mixes is empty: send one or more, or leave it out", "NO_MIXES", field="mixes"
        )
    return tuple(asked["mixes"])


def mix_message(asked: Asked) -> mix_pb2.Mix | None:
    """Return the `mix` of a body as gRPC has it; None, an absent one, is the default mix."""
    mix: Mix | None = asked.get("mix")
    if mix is None:
        return None
    return mix_pb2.Mix(
        entries=[mix_pb2.DomainWeight(domain=name, weight=weight) for name, weight in mix.entries]
    )
