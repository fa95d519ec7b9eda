"""The scope that each call needs: one table for both doors, which do not open with a gap in it.

`admin` changes something for others: the default mix, names of mixes, adapters; a fit, which takes
the engine for minutes; and the record of changes. The rest is `inference`. What only tells whether
the server lives and serves is open, as probes carry no token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.descriptor import ServiceDescriptor

from superpose_adapters.tokens import Scope

Needs = Mapping[str, Scope | None]
"""What calls need, by the name of each; None is nothing."""

_ADMIN, _INFERENCE, _OPEN = Scope.ADMIN, Scope.INFERENCE, None

_METHODS: Mapping[str, Needs] = {
    "superpose.v1.InferenceService": {
        "Generate": _INFERENCE,
        "GenerateStream": _INFERENCE,
        "Score": _INFERENCE,
        "FitMix": _ADMIN,
    },
    "superpose.v1.MixService": {
        "AddDomain": _ADMIN,
        "RemoveDomain": _ADMIN,
        "SetMix": _ADMIN,
        "GetMix": _INFERENCE,
        "WatchMix": _INFERENCE,
        "AnalyzeMix": _INFERENCE,
        "VerifyWeights": _INFERENCE,
        "NameMix": _ADMIN,
        "UnnameMix": _ADMIN,
        "ListNamedMixes": _INFERENCE,
    },
    "superpose.v1.AdapterService": {
        "ListAdapters": _INFERENCE,
        "GetAdapter": _INFERENCE,
        "PushAdapter": _ADMIN,
        "DeleteAdapter": _ADMIN,
        "MergeAdapters": _ADMIN,
    },
    "superpose.v1.ServerService": {"GetServerInfo": _INFERENCE},
    "superpose.v1.AuditService": {"ListChanges": _ADMIN},
}
# Of others, as a whole: what methods they have is up to their version.
_SERVICES: Needs = {
    "grpc.health.v1.Health": _OPEN,
    # It tells nothing that is not public; but what strangers need not reach, they do not reach.
    "grpc.reflection.v1.ServerReflection": _INFERENCE,
    "grpc.reflection.v1alpha.ServerReflection": _INFERENCE,
}
# What each endpoint is over gRPC, so that it cannot need something else there.
_ENDPOINTS = {
    "GET /v1/models": "AdapterService/ListAdapters",
    "GET /v1/models/{model:path}": "AdapterService/GetAdapter",
    "POST /v1/completions": "InferenceService/Generate",
    "POST /v1/chat/completions": "InferenceService/Generate",
    "POST /v1/score": "InferenceService/Score",
    "POST /v1/mix/fit": "InferenceService/FitMix",
    "GET /v1/mix": "MixService/GetMix",
    "PUT /v1/mix": "MixService/SetMix",
    "POST /v1/mix/add": "MixService/AddDomain",
    "POST /v1/mix/remove": "MixService/RemoveDomain",
    "GET /v1/mix/events": "MixService/WatchMix",
    "POST /v1/mix/analyze": "MixService/AnalyzeMix",
    "POST /v1/mix/verify": "MixService/VerifyWeights",
    "GET /v1/mix/names": "MixService/ListNamedMixes",
    "PUT /v1/mix/names/{name}": "MixService/NameMix",
    "DELETE /v1/mix/names/{name}": "MixService/UnnameMix",
    "GET /v1/adapters": "AdapterService/ListAdapters",
    "GET /v1/adapters/{domain}": "AdapterService/GetAdapter",
    "PUT /v1/adapters/{domain}": "AdapterService/PushAdapter",
    "DELETE /v1/adapters/{domain}": "AdapterService/DeleteAdapter",
    "POST /v1/adapters/{domain}/merge": "AdapterService/MergeAdapters",
    "GET /v1/server": "ServerService/GetServerInfo",
    "GET /v1/audit": "AuditService/ListChanges",
}
# What has no counterpart there.
_OTHER_ENDPOINTS: Needs = {
    "GET /healthz": _OPEN,
    "GET /readyz": _OPEN,
    "GET /openapi.json": _INFERENCE,  # As reflection.
}


def needs_of_methods(services: Iterable[ServiceDescriptor]) -> Needs:
    """Return what the methods of `services` need, by their paths, `/package.Service/Method`.

    Raises:
        ValueError: Nothing is said of one of them.
    """
    needs: dict[str, Scope | None] = {}
    for service in services:
        for method in service.methods:
            said = _METHODS.get(service.full_name, {})
            if method.name in said:
                need = said[method.name]
            elif service.full_name in _SERVICES:
                need = _SERVICES[service.full_name]
            else:
                raise _nothing_said(method.full_name)
            needs[f"/{service.full_name}/{method.name}"] = need
    return needs


def need_of_endpoint(method: str, path: str) -> Scope | None:
    """Return what one method of one path of HTTP needs.

    Raises:
        ValueError: Nothing is said of it.
    """
    endpoint = f"{method} {path}"
    if endpoint in _OTHER_ENDPOINTS:
        return _OTHER_ENDPOINTS[endpoint]
    if endpoint not in _ENDPOINTS:
        raise _nothing_said(endpoint)
    service, _, name = _ENDPOINTS[endpoint].partition("/")
    return _METHODS[f"superpose.v1.{service}"][name]


def _nothing_said(call: str) -> ValueError:
    return ValueError(f"{call} says nothing of who may call it: add it to door/access/scopes.py")
