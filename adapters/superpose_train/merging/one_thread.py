"""Computing without torch's workers, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on the calling thread alone within, and as before afterwards.

    A merge is thousands of operations on small matrices, each of which would wait for all workers:
    on busy cores that takes many times as long as the work. Its bits depend on no number of
    threads, either. A server merges so, too, on a thread of one core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
