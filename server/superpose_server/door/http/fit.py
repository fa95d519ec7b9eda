"""`/v1/mix/fit`: the weights that lose least on given rows, as gRPC's `FitMix`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1.inference_pb2 import FitMixResponse
from superpose_server.door.contract.convert import fit_to_wire
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.event_stream import EventStream, event
from superpose_server.door.http.fields import (
    COUNT,
    NUMBER,
    TEXT,
    Asked,
    Field,
    Form,
    ListOf,
    integer,
)
from superpose_server.door.http.items import ITEMS, MAX_LENGTH, SCOPE, requested_items
from superpose_server.door.http.json_text import to_json
from superpose_server.door.http.message import plain, schema
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import FitRequest

# Those that have a default of the inference layer's.
_OPTIONS = (
    MAX_LENGTH,
    SCOPE,
    Field("budget", COUNT, "Mixes that may be scored; 20 and 10 for each domain if absent."),
    Field("low", NUMBER, "Least weight; -1 if absent."),
    Field("high", NUMBER, "Greatest weight; 2 if absent."),
    Field("penalty", NUMBER, "Nats a token for each unit of weight; 0.01 if absent."),
    Field("seed", integer(0, 2**64 - 1), "Same seed, same result."),
    Field(
        "sources",
        ListOf(COUNT),
        "Of each item the source that it comes from; about a third of each is held out.",
    ),
)
FORM = Form(
    "FitMixRequest",
    (
        ITEMS,
        Field("domains", ListOf(TEXT), "Whose weights; 1 to 8.", required=True),
        *_OPTIONS,
    ),
)


class Fits:
    """Fits of the inference layer."""

    def __init__(self, inference: Inference) -> None:
        """Serve from `inference`."""
        self._inference = inference

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "POST",
                "/v1/mix/fit",
                self.fit,
                "Find the weights that lose least on rows: progress, and at last the result.",
                form=FORM,
                events=schema(FitMixResponse.DESCRIPTOR),
            ),
        )

    async def fit(self, request: Request, asked: Asked) -> Response:
        """Send how far the search is, and then what it has found.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: The request is wrong, or cannot be run; later errors are events.
        """
        options = {each.name: asked[each.name] for each in _OPTIONS if each.name in asked}
        options["sources"] = tuple(options.get("sources", ()))
        wanted = FitRequest(requested_items(asked), tuple(asked["domains"]), **options)
        events = _events(self._inference, wanted)
        first = await while_connected(request.receive, anext(events))
        return EventStream([events], first=first)


async def _events(inference: Inference, wanted: FitRequest) -> AsyncGenerator[bytes]:
    async with aclosing(inference.fit(wanted)) as updates:
        async for update in updates:
            yield event(to_json(plain(fit_to_wire(update, wanted.domains))))
