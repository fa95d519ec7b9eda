"""`superpose-server`: read the configuration, serve until a signal ends it.

Exits with 0 after that, 1 if the server cannot start, 2 for usage, 3 if only another start helps,
as where what it holds in memory is damaged; a signal before the ready line kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from superpose_adapters.bundled import BUNDLES, resolve_base
from superpose_server.cluster.private_ray import keep_ray_private
from superpose_server.config import ServerConfig, parse_config, split_address
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.mix_file import MixFileError
from superpose_server.door.access.access import Access
from superpose_server.door.tls import Tls
from superpose_server.ending import take_back_signals
from superpose_server.errors import BeyondRepair, StartupError
from superpose_server.starting import start_or_die
from superpose_server.state_folder import check_state_folder

# Of the extras, by the names that they are imported by.
_HTTP_PACKAGES = ("starlette", "uvicorn", "httptools", "python_multipart")
_CLUSTER_PACKAGES = ("ray",)
_BEYOND_REPAIR = 3
_log = logging.getLogger(__name__)


def _check(config: ServerConfig) -> None:
    """Refuse what can be seen at once: torch takes seconds to import, and a base minutes to load.

    Raises:
        StartupError: No base, an address that is taken, a state folder, a file of tokens, a
            certificate or a file to follow that cannot be used, or a door whose packages are not
            installed.
    """
    if config.serves_http:
        _check_installed(f"--http-listen {config.http_listen}", _HTTP_PACKAGES, "http")
    if config.replicas is not None:
        _check_installed(f"--replicas {config.replicas}", _CLUSTER_PACKAGES, "cluster")
    for flag, address in config.addresses.items():
        host, port = split_address(flag, address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            # Only sockets that are closed already do not count; SO_REUSEADDR says that everywhere
            # but on Windows, where it lets two servers share an address.
            only = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            probe.setsockopt(socket.SOL_SOCKET, only, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise StartupError(
                    f"cannot listen on --{flag} {address} ({error.strerror}): choose a free port, "
                    "or 0 for any"
                ) from error
    Access(config.tokens)
    Tls.of(config)
    if config.follow is not None:
        file = FollowedFile(config.follow)
        try:
            file.read()
        except MixFileError as error:
            raise StartupError(f"--follow {file.name}: {error}") from error
    # That of a bundle is there, or has to be made first, which a signal can cut short only later.
    if config.base not in BUNDLES:
        try:
            resolve_base(config.base)
        except ValueError as error:
            raise StartupError(str(error)) from error
    check_state_folder(config)


def _check_installed(flag: str, packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise StartupError(
            f"{flag} needs {' and '.join(missing)}: pip install 'superpose[{extra}]'"
        )


async def _serve(config: ServerConfig) -> None:
    # Imported here, so that nothing that is refused before waits for torch; and before the loop
    # takes the signals, since it hears of none while it imports.
    from superpose_server.door.server import Server
    from superpose_server.runtime import Runtime

    async def start() -> Server:
        fleet = None
        if config.replicas is not None:
            keep_ray_private()
            from superpose_server.cluster.ray_replicas import start_fleet

            fleet = await asyncio.to_thread(start_fleet, config, asyncio.get_running_loop())
            take_back_signals()
        runtime = await asyncio.to_thread(Runtime, config, fleet=fleet)
        try:
            server = Server(runtime)
            await server.start()
        except BaseException:
            runtime.close()
            raise
        return server

    server, ending = await start_or_die(start())
    state = server.runtime.default_mix.state
    ready = (
        f"ready address={server.address} base={config.base} generation={state.generation} "
        f"digest={state.mix.digest} metrics={server.metrics_address}"
    )
    if config.serves_http:
        ready += f" http={server.http_address}"
    if config.admin_apart:
        ready += f" admin={server.admin_address}"
    try:
        print(ready, flush=True)
    except OSError as error:  # Nobody reads it, which is no reason not to serve.
        _log.warning("not told on standard output (%s): %s", error.strerror, ready)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ends = [asyncio.ensure_future(event.wait()) for event in (ending, server.failed)]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    why = server.runtime.integrity.hopeless
    if why:
        _log.critical("FATAL: %s: ending, so that another start begins anew", why)
    _log.info("stopping grace=%g", config.grace)
    await server.stop(config.grace)
    if why:
        raise BeyondRepair(f"{why}: start the server again")


def _event_loop(config: ServerConfig) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop; None: asyncio does.

    asyncio lets go of the interpreter at each write to a socket, and then waits until the engine's
    thread does so too: with many streams that is longer than the rest of a step. uvloop writes
    without letting go. gRPC, whose writes are other threads' work, gains nothing.
    """
    if not config.serves_http:
        return None
    try:
        from uvloop import new_event_loop
    except ImportError:  # There is none for Windows.
        return None
    return new_event_loop


def _allow_many_files() -> None:
    """Let this process open as many files, and so connections, as it may.

    The usual limit is 1024, of which clients that only connect would leave none to the journal.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit.
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What the system says that it allows may be more than it does: macOS calls it infinite.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run() -> None:
    """Run the command to its end."""
    # Or files and sockets would take the numbers of standard streams that are closed.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # stays open
    config = parse_config()
    _allow_many_files()
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    # Loading a checkpoint is no matter for a progress bar in a server's log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _check(config)
        with asyncio.Runner(loop_factory=_event_loop(config)) as runner:
            runner.run(_serve(config))
    except StartupError as error:
        _log.debug("the server cannot start", exc_info=error)
        sys.exit(f"superpose-server: {error}")
    except BeyondRepair as error:
        print(f"superpose-server: {error}", file=sys.stderr)
        sys.exit(_BEYOND_REPAIR)
