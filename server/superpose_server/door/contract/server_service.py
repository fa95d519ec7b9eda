"""ServerService: what `adapterctl status` prints."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from superpose_proto.v1 import server_pb2 as pb
from superpose_proto.v1 import server_pb2_grpc
from superpose_server.control.following import Followed
from superpose_server.door.contract.convert import mix_to_wire
from superpose_server.engine.executor import Condition
from superpose_server.runtime import Runtime


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """Tells what runs here."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._runtime = runtime

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Any
    ) -> pb.GetServerInfoResponse:
        """Return version, base, limits and load."""
        runtime = self._runtime
        replicas = await runtime.replicas()
        following = runtime.following
        return pb.GetServerInfoResponse(
            version=version("superpose"),
            base=runtime.config.base,
            base_digest=runtime.base.digest,
            dtype=runtime.base.dtype,
            device=runtime.base.device,
            context_length=runtime.base.context_length,
            limits=pb.Limits(
                max_batch=runtime.base.max_batch,
                max_queue=runtime.config.max_queue,
                max_rank=runtime.adapter_limits.max_rank,
                max_adapter_bytes=runtime.adapter_limits.max_bytes,
                max_domains_in_mix=runtime.limits.max_domains_in_mix,
                max_score_items=runtime.limits.max_score_items,
                max_score_rows=runtime.limits.max_score_rows,
            ),
            # Of replicas the sum of what they say, which is of one moment.
            running=sum(each.running for each in replicas) or runtime.engine.running,
            waiting=sum(each.waiting for each in replicas) or runtime.engine.waiting,
            mix=mix_to_wire(runtime.default_mix.state),
            adapters=len(runtime.registry),
            uptime_seconds=time.monotonic() - runtime.started,
            weights_intact=runtime.integrity.intact and all(each.intact for each in replicas),
            generated_tokens=runtime.metrics.generated_tokens
            + sum(each.generated_tokens for each in replicas),
            chat_template=runtime.tokenizer.has_chat_template,
            grpc_address=runtime.grpc_address,
            followed=None if following is None else _followed_to_wire(following.state),
            replicas=map(_replica_to_wire, replicas),
        )


def _replica_to_wire(condition: Condition) -> pb.Replica:
    return pb.Replica(
        name=condition.replica,
        node=condition.node,
        generation=condition.generation if condition.generation >= 0 else None,
        digest=condition.digest,
        running=condition.running,
        waiting=condition.waiting,
        generated_tokens=condition.generated_tokens,
        weights_intact=condition.intact,
    )


def _followed_to_wire(followed: Followed) -> pb.FollowedFile:
    return pb.FollowedFile(name=followed.name, reached=followed.reached, problem=followed.problem)
