"""How much memory is left, and where what stays is put."""

from __future__ import annotations

import errno
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from superpose_adapters.c_library import c_function

MIB = 1 << 20
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# What is smaller is malloc's: pages of its own would be mostly empty.
_SMALLEST_MAPPING = MIB
# As torch's allocator for a CPU, CUDA's driver and its libraries say it.
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def lasting_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros for what is kept as long as the server runs.

    On a CPU they get pages of their own from the system, huge ones if it has them. From malloc they
    would lie among scratch, and the holes that scratch leaves are memory that no one else can use.
    (Windows has no such mappings; its malloc gives large blocks pages of their own.)

    Raises:
        MemoryError: There is none.
    """
    size = math.prod(shape) * dtype.itemsize
    mapped = device.type == "cpu" and size >= _SMALLEST_MAPPING and hasattr(mmap, "MAP_PRIVATE")
    if not mapped:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes cannot be allocated: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping, and unmaps it when it goes.
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def lasting_copy(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a contiguous copy in `lasting_zeros`, on `device` or where `tensor` is."""
    kept = lasting_zeros(tensor.shape, tensor.dtype, device or tensor.device)
    return kept.copy_(tensor.detach())


@torch.no_grad()
def own_storage(module: nn.Module) -> None:
    """Move every parameter and buffer out of a mapped checkpoint file into storage of its own.

    A mapped file may change or shrink while it is served. And its tensors are aligned to 8 bytes
    only, where the bits of a matrix product depend on the alignment of its output: the same mix
    would not give the same bits in the live weights and in a fresh fold.
    """
    tensor: Tensor
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = lasting_copy(tensor.data) if tensor.dim() else tensor.data.clone()


def give_back() -> None:
    """Return what malloc keeps but nobody uses to the system, where malloc can (glibc)."""
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is missing; torch has no one class for that."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )


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
