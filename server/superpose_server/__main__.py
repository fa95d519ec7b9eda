"""`superpose-server`: read the configuration, serve until SIGTERM or SIGINT.

Exits with 0 after that, 1 if the server cannot start, 2 for usage.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from superpose_server.config import ServerConfig, parse_config


async def _serve(config: ServerConfig) -> None:
    # Imported here, so that --help and usage errors do not wait for torch.
    from superpose_server.door.server import Server, check_addresses
    from superpose_server.runtime import Runtime

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    check_addresses(config)
    server = Server(Runtime(config))
    try:
        await server.start()
    except BaseException:
        server.runtime.close()
        raise
    state = server.runtime.default_mix.state
    print(
        f"ready address={server.address} base={config.base} generation={state.generation} "
        f"digest={state.mix.digest} metrics={server.metrics_address}",
        flush=True,
    )
    await ending.wait()
    logging.getLogger(__name__).info("stopping grace=%g", config.grace)
    await server.stop(config.grace)


def main() -> None:
    """Run as a command."""
    config = parse_config()
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    # Loading a checkpoint is no matter for a progress bar in a server's log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from superpose_server.runtime import StartupError

    try:
        asyncio.run(_serve(config))
    except StartupError as error:
        logging.getLogger(__name__).debug("the server cannot start", exc_info=error)
        sys.exit(f"superpose-server: {error}")


if __name__ == "__main__":
    main()
