"""Where what is not complete yet lies, beside what it is to become."""

from __future__ import annotations

from pathlib import Path


def work_folder(out: Path, what: str = "work") -> Path:
    """Return the folder in which `out` is made: `.OUT.work`, or another `what`.

    Hidden, so that a server whose --adapter-dir holds `out` does not take it for an adapter.
    """
    return out.with_name(f".{out.name}.{what}")
