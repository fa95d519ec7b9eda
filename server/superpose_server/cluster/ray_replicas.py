"""Replicas that Ray Serve starts, routes to, watches and replaces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

# Before Ray is imported: nobody's computer tells others how it is used, unless they were asked.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from superpose_adapters.bundled import resolve_base
from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.one_line import one_line
from superpose_server.cluster.answer import Answer
from superpose_server.cluster.fleet import Fleet
from superpose_server.cluster.replica import Replica
from superpose_server.config import ServerConfig
from superpose_server.engine.scheduler import RETRY_AFTER_SECONDS
from superpose_server.errors import QueueFull, ServerError, StartupError, Unavailable
from superpose_server.state_folder import state_folder

APPLICATION = "superpose"
# Calls beside rows that a replica may be asked at once.
_BESIDE = 64
_HEALTH_PERIOD_SECONDS = 2.0
_HEALTH_TIMEOUT_SECONDS = 20.0
# What goes through it is small: rows, chunks, and names of adapters.
_OBJECT_STORE_BYTES = 128 << 20
# Ray Serve's own words of each call; what goes wrong is told all the same.
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_log = logging.getLogger(__name__)


def begin_log(config: ServerConfig) -> None:
    """Write to standard error, as the command does; Ray hands it on."""
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )


class RayReplica(Replica):
    """A replica as an actor of Ray."""

    def __init__(self, config: ServerConfig, folder: Path) -> None:
        """See `Replica`."""
        begin_log(config)
        context = serve.get_replica_context()
        super().__init__(
            config,
            folder,
            context.replica_id.unique_id,
            ray.get_runtime_context().get_node_id()[:12],
        )

    def __del__(self) -> None:
        """End the threads when Ray Serve lets the replica go."""
        self.close()


class RayReplicas:
    """Calls through a handle; see `Replicas`."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        loop: asyncio.AbstractEventLoop,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """Call by `handle`, on `loop`; `end` ends what belongs to this server alone."""
        self.loop = loop
        self.close = end
        self._handle = handle
        self._method = cache(lambda name, stream: handle.options(method_name=name, stream=stream))

    async def all(self, method: str, *arguments: Any, patience: float) -> list[Answer[Any]]:
        """See `Replicas`."""
        try:
            found = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=patience, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            raise _unavailable(error) from error
        for each in found:
            if isinstance(each, Exception):
                # It ended, mostly. Whatever it was, it is no answer, and the others' count.
                _log.warning("a replica did not answer %s: %s", method, one_line(each))
        return [each for each in found if isinstance(each, Answer)]

    async def one(self, method: str, *arguments: Any) -> Any:
        """See `Replicas`."""
        call = self._method(method, False).remote(*arguments)
        try:
            return await call
        except asyncio.CancelledError:
            _give_up(call)
            raise
        except (RayError, RayServeException) as error:
            raise _told(error) from error

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Answer[Any]]:
        """See `Replicas`."""
        call = self._method(method, True).remote(*arguments)
        try:
            async for answer in call:
                yield answer
        except (asyncio.CancelledError, GeneratorExit):
            _give_up(call)
            raise
        except (RayError, RayServeException) as error:
            raise _told(error) from error


def _give_up(call: Any) -> None:
    """End a call, in whatever state it is: of one that was never assigned Ray raises why."""
    with contextlib.suppress(RayError, RayServeException):
        call.cancel()


def _told(error: Exception) -> ServerError:
    if isinstance(error, BackPressureError):
        return QueueFull(error.num_queued_requests, RETRY_AFTER_SECONDS)
    return _unavailable(error)


def _unavailable(error: Exception) -> Unavailable:
    _log.warning("a call to a replica failed: %s", type(error).__name__)
    return Unavailable("the replica that was to answer has ended: try again", "REPLICA_LOST")


def start_fleet(config: ServerConfig, loop: asyncio.AbstractEventLoop) -> Fleet:
    """Start a Ray of its own, and replicas on it; runs on any thread but the loop's.

    See `private_ray` for what has to be said before this file is imported.

    Raises:
        StartupError: They cannot be started.
    """
    try:
        digest = checkpoint_digest(resolve_base(config.base))
    except ValueError as error:
        raise StartupError(f"base {config.base} cannot be served: {error}") from error
    folder = state_folder(config, digest) / "adapters"
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            namespace=APPLICATION,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
        )
        _check_room(config)
        serve.start(proxy_location="Disabled", logging_config=_QUIET)
        handle = serve.run(replicas_of(config, folder), name=APPLICATION, route_prefix=None)
        return Fleet(RayReplicas(handle, loop, _shut_down))
    except Exception as error:
        _shut_down()
        if isinstance(error, StartupError):
            raise
        raise StartupError(f"the replicas did not start: {one_line(error)}") from error


def _check_room(config: ServerConfig) -> None:
    """Refuse replicas that this machine has no room for, which Ray Serve would wait for.

    Raises:
        StartupError: There are too many, or they are too large.
    """
    there = ray.cluster_resources()
    for flag, resource, each in (
        ("cpus", "CPU", config.replica_cpus),
        ("gpus", "GPU", config.replica_gpus),
    ):
        needed, found = (config.replicas or 0) * each, there.get(resource, 0.0)
        if needed > found:
            raise StartupError(
                f"--replicas {config.replicas} of --replica-{flag} {each:g} need {needed:g}, and "
                f"this machine has {found:g}: use fewer, or smaller ones"
            )


def _shut_down() -> None:
    if ray.is_initialized():  # Or Ray Serve would start one, to end it.
        serve.shutdown()
    ray.shutdown()


def replicas_of(config: ServerConfig, folder: Path) -> serve.Application:
    """Return the replicas of a server, whose adapters lie in `folder`.

    A config file may change any option of the deployment.
    """
    # What is of the doors and of control alone may not be there, or not allowed, on their machines.
    theirs = replace(
        config,
        adapter_dir=None,
        state_dir=None,
        follow=None,
        tokens=None,
        tls_cert=None,
        tls_key=None,
        tls_client_ca=None,
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        http_listen="none",
        admin_listen="none",
    )
    deployment = serve.deployment(RayReplica, name="replica").options(
        num_replicas=config.replicas or 1,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
        max_ongoing_requests=config.max_batch + config.max_queue + _BESIDE,
        # Those that wait for one that has room; replicas have queues of their own.
        max_queued_requests=max(1, (config.replicas or 1) * config.max_queue),
        health_check_period_s=_HEALTH_PERIOD_SECONDS,
        health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=config.grace,
        logging_config=_QUIET,
    )
    return deployment.bind(theirs, folder)
