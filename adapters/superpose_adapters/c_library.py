"""What only some C libraries have: glibc's settings of malloc, Linux's of a process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def c_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library that this process runs on, or None if it has none."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except TypeError:  # On Windows each library has one of its own.
        return None
