"""How much memory is left."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 1 << 20
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on `device` without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # Not Linux: the allocation itself will tell.
        return 1 << 62
    return min(free, _left_in_cgroup())


def _left_in_cgroup() -> int:
    """Return what a container's own limit leaves."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return 1 << 62
    # Pages of files can be given up.
    return 1 << 62 if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
