"""Where a machine keeps what can be made again: kernels, packaged bases, which were checked."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder below XDG_CACHE_HOME or ~/.cache, which may not be there yet.

    Raises:
        RuntimeError: There is no home either.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "superpose"
