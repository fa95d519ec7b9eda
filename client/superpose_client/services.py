"""The services of the contract: their stubs, and what their descriptors say of a call."""

from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from superpose_proto.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)


@dataclass(frozen=True)
class Service:
    """A service: the stub, made with a channel, that has its methods, and what describes them."""

    stub: Any
    descriptor: ServiceDescriptor

    def method(self, name: str) -> MethodDescriptor:
        """Return the descriptor of a method."""
        return self.descriptor.methods_by_name[name]


def _service(messages: Any, name: str, stub: Any) -> Service:
    return Service(stub, messages.DESCRIPTOR.services_by_name[name])


# By the names that `Call.method` begins with.
SERVICES = {
    "Inference": _service(
        inference_pb2, "InferenceService", inference_pb2_grpc.InferenceServiceStub
    ),
    "Mix": _service(mix_pb2, "MixService", mix_pb2_grpc.MixServiceStub),
    "Adapter": _service(adapter_pb2, "AdapterService", adapter_pb2_grpc.AdapterServiceStub),
    "Server": _service(server_pb2, "ServerService", server_pb2_grpc.ServerServiceStub),
    "Audit": _service(audit_pb2, "AuditService", audit_pb2_grpc.AuditServiceStub),
    "Health": _service(health_pb2, "Health", health_pb2_grpc.HealthStub),
}


def may_be_repeated(method: MethodDescriptor, request: Message) -> bool:
    """Return whether a call means the same if it arrives twice.

    It does if the contract says that it has no side effects, or if the request names the only
    generation of the default mix that it may change, which is another one after that.
    """
    if method.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
        return True
    guard = "expected_generation"
    return guard in request.DESCRIPTOR.fields_by_name and request.HasField(guard)
