"""Why a store of adapters cannot be used; each is one line that names the place and the remedy."""

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """The store cannot be used as it is: locked, damaged, or the disk refuses.

    The message is one line that names the path and the remedy.
    """


class Damaged(StoreError):
    """A file, or an object's folder, is not what was written.

    Attributes:
        what: The same without the remedy.
    """

    def __init__(self, path: Path, why: str) -> None:
        """Say so in one line."""
        self.what = f"{path}: damaged ({why})"
        super().__init__(f"{self.what}: restore it, or remove it and push again")


def cannot_write(folder: Path, error: OSError) -> StoreError:
    """Return what to raise, `from error`, where the disk refuses."""
    return StoreError(f"{folder}: cannot write ({error.strerror}): free space or check permissions")
