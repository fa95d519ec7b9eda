"""Between the wire and the server's own types."""

from __future__ import annotations

import json

from superpose_adapters.mix import BoundMix, Mix
from superpose_proto.v1 import adapter_pb2, inference_pb2, mix_pb2
from superpose_server.control.default_mix import MixState
from superpose_server.control.registry import Registered, Source
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import FinishReason
from superpose_server.errors import InvalidArgument

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: inference_pb2.FINISH_REASON_ABORTED,
}
_SOURCES = {
    Source.BUNDLED: adapter_pb2.ADAPTER_SOURCE_BUNDLED,
    Source.DIRECTORY: adapter_pb2.ADAPTER_SOURCE_DIRECTORY,
    Source.PUSHED: adapter_pb2.ADAPTER_SOURCE_PUSHED,
}


def mix_from_wire(message: mix_pb2.Mix) -> Mix:
    """Return the mix that a client asks for.

    Raises:
        InvalidArgument: A bad name or weight, or a domain named twice.
    """
    try:
        return Mix.of((entry.domain, entry.weight) for entry in message.entries)
    except ValueError as error:
        raise InvalidArgument(str(error), "INVALID_MIX", field="mix") from error


def mix_to_wire(generation: int, mix: BoundMix) -> mix_pb2.MixState:
    """Return a bound mix for a response, entries in ascending order of domain."""
    return mix_pb2.MixState(
        generation=generation,
        digest=mix.digest,
        entries=[
            mix_pb2.BoundEntry(
                domain=entry.domain, weight=entry.weight, adapter_digest=entry.adapter.digest
            )
            for entry in sorted(mix.entries, key=lambda entry: entry.domain)
        ],
    )


def state_to_wire(state: MixState) -> mix_pb2.MixState:
    """Return the default mix for a response."""
    return mix_to_wire(state.generation, state.mix)


def params_from_wire(options: inference_pb2.GenerateOptions) -> SamplingParams:
    """Return sampling parameters; absent fields take their defaults.

    Raises:
        InvalidArgument: A value out of its range.
    """
    given = {
        name: getattr(options, name)
        for name in (
            "max_new_tokens",
            "min_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "seed",
        )
        if options.HasField(name)
    }
    try:
        return SamplingParams(
            **given,
            ignore_eos=options.ignore_eos,
            stop_token_ids=tuple(options.stop_token_ids),
            stop=tuple(options.stop),
            logprobs=options.logprobs,
        )
    except InvalidArgument as error:
        # On the wire the fields are those of a message within the request.
        raise InvalidArgument(
            error.message, error.reason, field=f"options.{error.field}"
        ) from error


def adapter_to_wire(
    registered: Registered, default: BoundMix, *, whole: bool
) -> adapter_pb2.Adapter:
    """Return an adapter for a response; with `whole` its modules and config too."""
    adapter = registered.adapter
    held = {e.domain: e.weight for e in default.entries if e.adapter == adapter}
    message = adapter_pb2.Adapter(
        domain=registered.domain,
        digest=adapter.digest,
        source=_SOURCES[registered.source],
        rank=adapter.rank,
        parameters=adapter.parameters,
        bytes=adapter.nbytes,
        weight=held.get(registered.domain, 0.0),
    )
    if whole:
        message.modules.extend(adapter.modules)
        message.config_json = json.dumps(dict(adapter.config), sort_keys=True)
    return message
