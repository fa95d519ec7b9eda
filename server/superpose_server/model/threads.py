"""How many threads torch computes with on one of ours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def compute_with(threads: int) -> None:
    """Let torch compute with `threads` threads when it is called from this thread.

    Torch gives a thread its number when that thread first computes, once in every library that has
    code of torch's inlined (as the kernels have): it is the number that any thread set last. So
    what is set last in a process must be the number that all threads but this one shall have.
    """
    torch.get_num_threads()  # This thread's first moment, as far as torch itself goes, is now.
    torch.set_num_threads(threads)


def thread_of_one_core(name: str) -> ThreadPoolExecutor:
    """Return a thread that computes without workers of torch's, beside those that have them.

    It is begun here, with the number set for it; who calls sets the number for other threads anew.
    """
    thread = ThreadPoolExecutor(1, name, compute_with, (1,))
    thread.submit(torch.get_num_threads).result()
    return thread
