"""Several streams at once."""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from superpose_client.client import Stream

R = TypeVar("R")


def together(streams: Sequence[Stream[R]]) -> Iterator[tuple[int, R]]:
    """Yield the results of all streams as they come, each with the index of its stream.

    Leaving the loop, or the failure of one stream, which is raised, cancels all.
    """
    # Of each stream its results, then why it ended: an exception, or None.
    arriving: SimpleQueue[tuple[int, R] | BaseException | None] = SimpleQueue()

    def read(index: int, stream: Stream[R]) -> None:
        end: BaseException | None = None
        try:
            for result in stream:
                arriving.put((index, result))
        except BaseException as error:
            end = error
        arriving.put(end)

    threads = [Thread(target=read, args=each, daemon=True) for each in enumerate(streams)]
    try:
        for thread in threads:
            thread.start()
        running = len(streams)
        while running:
            arrived = arriving.get()
            if isinstance(arrived, BaseException):
                raise arrived
            if arrived is None:
                running -= 1
            else:
                yield arrived
    finally:
        for stream in streams:
            stream.cancel()
        for thread in threads:
            thread.join()
