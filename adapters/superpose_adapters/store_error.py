"""Why a store of adapters cannot be used; each is one line that names the place and the remedy."""

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """The store cannot be used as it is: locked, damaged, or the disk refuses.

    The message is one line that names the path and the remedy.
    """


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Return what to raise, `from error`, where the disk refuses."""
    return StoreError(f"{folder}: cannot write ({error.strerror}): free space or check permissions")


def damaged(path: Path, why: str) -> StoreError:
    """Return what to raise of a file, or of an object's folder, that is not what was written."""
    return StoreError(f"{path}: damaged ({why}): restore it, or remove it and push again")
