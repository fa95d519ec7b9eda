"""The application of a Ray Serve config file: the doors in one deployment, replicas in another.

applications:
  - name: superpose
    route_prefix: null
    import_path: superpose_server.application:build
    args: {base: openai-community/gpt2, store: "s3://bucket/adapters", state_dir: /shared/state}
    deployments:
      - name: replica
        autoscaling_config: {min_replicas: 2, max_replicas: 8}
        ray_actor_options: {num_gpus: 0.5}
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from superpose_adapters.cache_folder import cache_folder
from superpose_server.cluster.fleet import Fleet
from superpose_server.cluster.ray_replicas import RayReplicas, begin_log, replicas_of
from superpose_server.config import ServerConfig, config_of
from superpose_server.door.door import CLOSING_SECONDS
from superpose_server.door.server import Server
from superpose_server.errors import Unavailable
from superpose_server.runtime import Runtime

_PAUSE_SECONDS = 0.5
_PAUSES_SECONDS = 5


async def _fleet(replicas: RayReplicas) -> Fleet:
    """Return the fleet of replicas, once there is one: Ray Serve starts them and this together."""
    while True:
        try:
            return await asyncio.to_thread(Fleet, replicas)
        except Unavailable:
            await asyncio.sleep(_PAUSE_SECONDS)


class Doors:
    """The server itself: all but what runs the rows."""

    async def __init__(  # type: ignore[misc]  # Ray Serve waits for it.
        self, config: ServerConfig, replicas: DeploymentHandle[Any]
    ) -> None:
        """Open the doors of a fleet, whose replicas are there already.

        Raises:
            StartupError: Anything that keeps the server from starting; Ray Serve shows it.
        """
        begin_log(config)
        self._grace = config.grace
        loop = asyncio.get_running_loop()
        fleet = await _fleet(RayReplicas(replicas, loop))
        runtime = await asyncio.to_thread(Runtime, config, fleet=fleet)
        try:
            self._server = Server(runtime)
            await self._server.start()
        except BaseException:
            runtime.close()
            raise

    def addresses(self) -> dict[str, str]:
        """Return HOST:PORT of each door that there is."""
        server = self._server
        found = {"grpc": server.address, "http": server.http_address, "admin": server.admin_address}
        return {door: address for door, address in found.items() if address}

    def check_health(self) -> None:
        """Raise if nothing but a new start helps; Ray Serve asks now and then."""
        if self._server.failed.is_set():
            raise RuntimeError(self._server.runtime.integrity.hopeless)

    async def __del__(self) -> None:
        """Refuse new requests, and let running ones end, when Ray Serve lets the server go."""
        await self._server.stop(self._grace)


def build(arguments: dict[str, Any]) -> serve.Application:
    """Return the application.

    Args:
        arguments: Flags of `superpose-server` by their names, dashes as underscores.

    Raises:
        ValueError: A flag that there is not, a value that means nothing, or no store, without which
            machines have no adapter in common.
    """
    config = config_of(arguments)
    if config.store is None:
        raise ValueError("store is needed: the URL of a folder that every machine can read")
    replicas = replicas_of(config, cache_folder() / "adapters")
    # One: it holds the journal.
    doors = serve.deployment(Doors, name="doors").options(
        num_replicas=1,
        ray_actor_options={"num_cpus": 1},
        # Ray waits a moment before it lets go, and what closes takes one, too.
        graceful_shutdown_timeout_s=config.grace + CLOSING_SECONDS + _PAUSES_SECONDS,
    )
    return doors.bind(config, replicas)
