"""gRPC reflection, as v1 and as v1alpha: newer tools ask for the one, older tools for the other.

grpcio ships v1alpha only. v1 is the same protocol under another package name, byte for byte, so one
servicer answers both.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_SERVICE = "ServerReflection"


def describe_reflection() -> list[ServiceDescriptor]:
    """Return the descriptors of both services."""
    _describe_v1()
    pool = descriptor_pool.Default()
    return [pool.FindServiceByName(f"{package}.{_SERVICE}") for package in (_V1, _ALPHA)]


def serve_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Let clients ask `server` for the contract of `services`, of which these are two."""
    servicer = reflection.aio.ReflectionServicer(services)  # type: ignore[attr-defined]  # types lack it
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    call = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(
        f"{_V1}.{_SERVICE}", {"ServerReflectionInfo": call}
    )
    server.add_generic_rpc_handlers((handler,))


def _describe_v1() -> None:
    """Add v1's descriptors, which are v1alpha's under another name, to those that are served."""
    alpha = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
    text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    v1 = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(v1.SerializeToString())
