"""`/v1/mix`: MixService over HTTP, call by call, in its own messages.

A change may name the generation that it was decided on, as `If-Match`, which every answer about the
default mix has as its `ETag`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1 import mix_pb2 as pb
from superpose_server.door.contract.mix_service import MixService
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.event_stream import EventStream, event
from superpose_server.door.http.fields import NUMBER, TEXT, Asked, Field, Form
from superpose_server.door.http.header import header
from superpose_server.door.http.json_text import json_answer, to_json
from superpose_server.door.http.message import plain, schema
from superpose_server.door.http.mix import MIX, mix_message
from superpose_server.errors import InvalidArgument
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime

_DOMAIN = Field("domain", TEXT, "The name of an adapter.", required=True)
_SET = Form("SetMixRequest", (replace(MIX, required=True),))
_ADD = Form("AddDomainRequest", (_DOMAIN, Field("weight", NUMBER, "1 if absent.")))
_REMOVE = Form("RemoveDomainRequest", (_DOMAIN,))
_ANALYZE = Form("AnalyzeMixRequest", (MIX,))
_VERIFY = Form("VerifyWeightsRequest", ())
_NAME = Form("NameMixRequest", (MIX,))
_ETAG = re.compile(r'"([0-9]{1,19})"')


class Mixes:
    """The default mix, named mixes, and what can be asked about mixes and weights."""

    def __init__(self, runtime: Runtime, inference: Inference) -> None:
        """Serve from these."""
        self._service = MixService(runtime, inference)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "GET",
                "/v1/mix",
                self.get,
                "The default mix, and the one that is in the weights now.",
                reply=schema(pb.GetMixResponse.DESCRIPTOR),
            ),
            Endpoint(
                "PUT",
                "/v1/mix",
                self.set,
                "Make a mix the default mix; the same again changes nothing.",
                _SET,
                reply=schema(pb.SetMixResponse.DESCRIPTOR),
                if_match=True,
            ),
            Endpoint(
                "POST",
                "/v1/mix/add",
                self.add,
                "Add a domain to the default mix.",
                _ADD,
                reply=schema(pb.AddDomainResponse.DESCRIPTOR),
                if_match=True,
            ),
            Endpoint(
                "POST",
                "/v1/mix/remove",
                self.remove,
                "Remove a domain from the default mix.",
                _REMOVE,
                reply=schema(pb.RemoveDomainResponse.DESCRIPTOR),
                if_match=True,
            ),
            Endpoint(
                "GET",
                "/v1/mix/events",
                self.watch,
                "The default mix now, then every change of it; `id` is its generation.",
                events=schema(pb.WatchMixResponse.DESCRIPTOR),
            ),
            Endpoint(
                "POST",
                "/v1/mix/analyze",
                self.analyze,
                "How the domains of a mix interfere, without folding anything.",
                _ANALYZE,
                reply=schema(pb.AnalyzeMixResponse.DESCRIPTOR),
            ),
            Endpoint(
                "POST",
                "/v1/mix/verify",
                self.verify,
                "Compare the weights with a fresh fold, and the base with its hash.",
                _VERIFY,
                reply=schema(pb.VerifyWeightsResponse.DESCRIPTOR),
            ),
            Endpoint(
                "GET",
                "/v1/mix/names",
                self.names,
                "All named mixes.",
                reply=schema(pb.ListNamedMixesResponse.DESCRIPTOR),
            ),
            Endpoint(
                "PUT",
                "/v1/mix/names/{name}",
                self.name,
                "Let a name stand for a mix, in place of what it stood for.",
                _NAME,
                reply=schema(pb.NameMixResponse.DESCRIPTOR),
            ),
            Endpoint(
                "DELETE",
                "/v1/mix/names/{name}",
                self.unname,
                "Take the name of a mix away.",
                reply=schema(pb.UnnameMixResponse.DESCRIPTOR),
            ),
        )

    async def get(self, request: Request, asked: Asked) -> Response:
        """Return the default mix."""
        return _answer(await self._service.GetMix(pb.GetMixRequest(), None))

    async def set(self, request: Request, asked: Asked) -> Response:
        """Set the default mix."""
        message = pb.SetMixRequest(
            mix=mix_message(asked), expected_generation=expected_generation(request)
        )
        return _answer(await self._service.SetMix(message, None))

    async def add(self, request: Request, asked: Asked) -> Response:
        """Add a domain."""
        message = pb.AddDomainRequest(
            domain=asked["domain"],
            weight=asked.get("weight"),
            expected_generation=expected_generation(request),
        )
        return _answer(await self._service.AddDomain(message, None))

    async def remove(self, request: Request, asked: Asked) -> Response:
        """Remove a domain."""
        message = pb.RemoveDomainRequest(
            domain=asked["domain"], expected_generation=expected_generation(request)
        )
        return _answer(await self._service.RemoveDomain(message, None))

    async def watch(self, request: Request, asked: Asked) -> Response:
        """Send the default mix and every change of it, until the client goes or falls behind."""
        changes = self._service.WatchMix(pb.WatchMixRequest(), None)
        return EventStream([_events(changes)])

    async def analyze(self, request: Request, asked: Asked) -> Response:
        """Report how the domains of a mix interfere."""
        message = pb.AnalyzeMixRequest(mix=mix_message(asked))
        return json_answer(plain(await self._service.AnalyzeMix(message, None)))

    async def verify(self, request: Request, asked: Asked) -> Response:
        """Compare the weights with what they should be."""
        message = pb.VerifyWeightsRequest()
        return json_answer(plain(await self._service.VerifyWeights(message, None)))

    async def names(self, request: Request, asked: Asked) -> Response:
        """List named mixes."""
        message = pb.ListNamedMixesRequest()
        return json_answer(plain(await self._service.ListNamedMixes(message, None)))

    async def name(self, request: Request, asked: Asked) -> Response:
        """Name a mix."""
        message = pb.NameMixRequest(name=request.path_params["name"], mix=mix_message(asked))
        return json_answer(plain(await self._service.NameMix(message, None)))

    async def unname(self, request: Request, asked: Asked) -> Response:
        """Take a name away."""
        message = pb.UnnameMixRequest(name=request.path_params["name"])
        return json_answer(plain(await self._service.UnnameMix(message, None)))


async def _events(changes: AsyncGenerator[pb.WatchMixResponse]) -> AsyncGenerator[bytes]:
    async with aclosing(changes):
        async for change in changes:
            yield event(to_json(plain(change)), change.mix.generation)


def expected_generation(request: Request) -> int | None:
    """Return the generation that a change was decided on, if it names one.

    Raises:
        InvalidArgument: `If-Match` is no `ETag` of the default mix.
        HttpError: It is there several times.
    """
    given = header(request.scope, "if-match")
    if given is None or given == "*":
        return None  # Any state will do, and there always is one.
    match = _ETAG.fullmatch(given)
    if match is None:
        raise InvalidArgument(
            f'if-match is {given[:80]!r}: send the etag of the default mix, such as "3"',
            "BAD_IF_MATCH",
            field="if-match",
        )
    return int(match[1])


def _answer(message: Message) -> Response:
    """Return an answer about the default mix."""
    told = plain(message)
    return json_answer(told, headers={"etag": f'"{told["mix"]["generation"]}"'})
