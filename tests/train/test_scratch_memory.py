from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Pages that the system fills for blocks of 64 MiB, each freed before the next is made.
_COUNT = """
import ctypes
import resource
import torch
# PR_SET_THP_DISABLE: a huge page would count as one.
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0
{call}
def touch():
    torch.zeros(1 << 24)
# Up to seven times glibc 2.36 leaves a crumb beside an aligned block, which keeps the next out.
for _ in range(12):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_KEEP = "from superpose_train.scratch_memory import keep_scratch\nkeep_scratch()"


def faults(call: str) -> int:
    """In a process of its own: malloc's settings hold for all that follows."""
    code = _COUNT.format(call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_blocks_are_kept_for_the_next() -> None:
    assert faults("") > 20 * (100 + faults(_KEEP))
