"""`/v1/models`: the mixes that a client can pick from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.control.default_mix import MixState
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import Asked
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.mix import DEFAULT, model_mix
from superpose_server.door.http.replies import MODEL, MODELS
from superpose_server.errors import NotFound, PermissionDenied
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime


class Models:
    """Mixes as models: what stands in a list, and whatever else `model` may be."""

    def __init__(self, runtime: Runtime, inference: Inference) -> None:
        """Serve from these."""
        self._runtime = runtime
        self._inference = inference
        self._created = int(time.time())

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint("GET", "/v1/models", self.list, "The mixes that have names.", reply=MODELS),
            Endpoint("GET", "/v1/models/{model:path}", self.get, "What one model is.", reply=MODEL),
        )

    async def list(self, request: Request, asked: Asked) -> Response:
        """Return the default mix, the base, and every domain and named mix that can be had now."""
        registry = self._runtime.registry
        names = [
            *(DEFAULT, "base"),
            *(registered.domain for registered in registry.all()),
            *(named.name for named in registry.named_mixes.all()),
        ]
        models = []
        for name in names:
            # A named mix may hold a domain that is not loaded, and comes back with it; and others
            # have what this caller may not.
            with contextlib.suppress(NotFound, PermissionDenied):
                models.append(self._model(name))
        return json_answer({"object": "list", "data": models})

    async def get(self, request: Request, asked: Asked) -> Response:
        """Return one model; any mix is one.

        Raises:
            InvalidArgument: The name is no mix.
            NotFound: It names a domain that is not loaded.
        """
        return json_answer(self._model(request.path_params["model"]))

    def _model(self, name: str) -> dict[str, Any]:
        bound = self._inference.resolve(model_mix(name))
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "superpose",
            "max_model_len": self._runtime.base.context_length,
            "mix": _weights(bound),
            "mix_digest": bound.mix.digest,
        }


def _weights(bound: MixState) -> Mapping[str, float]:
    entries = sorted(bound.mix.entries, key=lambda entry: entry.domain)
    return {entry.domain: entry.weight for entry in entries}
