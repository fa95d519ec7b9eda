"""The OpenAPI document, made from the tables that route, read and refuse: it says the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import Asked
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.status import ERROR
from superpose_server.door.http.upload import MEDIA_TYPE, Upload

PATH = "/openapi.json"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


class Document:
    """Serves the document of all endpoints, itself among them."""

    def __init__(self, served: Iterable[Endpoint]) -> None:
        """Describe `served`."""
        itself = Endpoint("GET", PATH, self.get, "This document.", reply={"type": "object"})
        self.endpoints = (*served, itself)
        self._document = describe(self.endpoints)

    async def get(self, request: Request, asked: Asked) -> Response:
        """Return the document."""
        return json_answer(self._document)


def describe(served: Iterable[Endpoint]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {"Error": ERROR}
    for endpoint in served:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        if endpoint.form is not None:
            schemas[endpoint.form.name] = endpoint.form.schema
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Superpose",
            "version": version("superpose"),
            "summary": "A base language model plus any weighted sum of LoRA adapters, per request.",
            "description": "In the object of a body null means absent. A page for people is at /.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.about,
        "parameters": _parameters(endpoint),
        "responses": {
            "200": {"description": "Done.", "content": _content(endpoint)},
            "default": {
                "description": "Refused or failed.",
                "content": {"application/json": {"schema": _reference("Error")}},
            },
        },
    }
    if endpoint.form is not None:
        media_type = MEDIA_TYPE if isinstance(endpoint.form, Upload) else "application/json"
        operation["requestBody"] = {
            "required": True,
            "content": {media_type: {"schema": _reference(endpoint.form.name)}},
        }
    return operation


def _content(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.reply is not None:
        content["application/json"] = {"schema": endpoint.reply}
    if endpoint.events is not None:
        event = {"contentMediaType": "application/json", "contentSchema": endpoint.events}
        about = "Server-sent events. Each holds, as `data`, what is said here, or an error."
        content["text/event-stream"] = {"schema": {"type": "string", "description": about, **event}}
    return content


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters = [
        _parameter(name, "path", {"type": "string"}, required=True)
        for name in _PARAMETER.findall(endpoint.path)
    ]
    for field in endpoint.query.fields:
        assert field.kind is not None
        described = _parameter(field.name, "query", field.kind.schema, required=field.required)
        parameters.append({**described, "description": field.about})
    if endpoint.if_match:
        described = _parameter("If-Match", "header", {"type": "string"}, required=False)
        about = "The ETag of the default mix that this was decided on; 412 if it is another now."
        parameters.append({**described, "description": about})
    return parameters


def _parameter(
    name: str, where: str, schema: Mapping[str, Any], *, required: bool
) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": schema}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
