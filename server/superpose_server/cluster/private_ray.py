"""What Ray is told before it is imported, where it belongs to one server alone."""

from __future__ import annotations

import os
import secrets


def keep_ray_private() -> None:
    """Let Ray, and what it starts, listen on the loopback address, and know each other by a token.

    Whoever can call Ray runs code here. Without this it listens where other machines reach it, and
    keeps its token in a file. In the environment, since its processes read it there.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Its address is then 127.0.0.1.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.pop("RAY_ADDRESS", None)  # Of another Ray, which this is not.
