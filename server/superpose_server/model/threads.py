"""How many threads torch computes with on one of ours."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_LOW_PRIORITY = 10  # of 19, the lowest, at which a thread gets next to nothing


def compute_with(threads: int) -> None:
    """Let torch compute with `threads` threads when it is called from this thread.

    Torch gives a thread its number when that thread first computes, once in every library that has
    code of torch's inlined (as the kernels have): it is the number that any thread set last. So
    what is set last in a process must be the number that all threads but this one shall have.
    """
    torch.get_num_threads()  # This thread's first moment, as far as torch itself goes, is now.
    torch.set_num_threads(threads)


def thread_of_one_core(name: str, *, yields: bool = False) -> ThreadPoolExecutor:
    """Return a thread that computes without workers of torch's, beside those that have them.

    It is begun here, with the number set for it; who calls sets the number for other threads anew.

    Args:
        name: Of the thread.
        yields: It computes in what time the others leave, on Linux. Where all cores are busy, a
            step of the engine waits for whichever of its threads has none, and spins meanwhile: a
            thread that takes its share of one core halves what is decoded.
    """
    thread = ThreadPoolExecutor(1, name, _begin, (yields,))
    thread.submit(torch.get_num_threads).result()
    return thread


def _begin(yields: bool) -> None:
    compute_with(1)
    if yields and sys.platform == "linux":  # Elsewhere it would be the whole process's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
