"""Where a server keeps its default mix and what was pushed to it."""

from __future__ import annotations

import os
from pathlib import Path

from superpose_server.config import ServerConfig
from superpose_server.errors import StartupError


def state_folder(config: ServerConfig, base_digest: str) -> Path:
    """Return the folder of this base's own, since adapters and mixes of another do not fit it."""
    return config.state_dir or _home() / base_digest[:16]


def check_state_folder(config: ServerConfig) -> None:
    """Make the folder that is configured, or the one that has those of all bases; write into it.

    Raises:
        StartupError: It cannot be made, or not be written.
    """
    folder = config.state_dir or _home()
    # Of one name, so that what a kill leaves is not there for good.
    trial = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"x")
        trial.unlink(missing_ok=True)  # Another server that starts may have been quicker.
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise StartupError(
            f"--state-dir {folder} cannot be used ({why}): name a folder that can be written"
        ) from error


def _home() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    root = Path(home) if home else Path.home() / ".local" / "state"
    return root / "superpose"
