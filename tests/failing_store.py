"""A shared store in memory that fails or hangs when it is told to, as fsspec's scheme `failing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

# Is told (call, path) before each call that reads or writes, where it may raise in its place, or
# wait; and as `piped` after a write, whose answer may be lost.
Fault = Callable[[str, str], None]


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """fsspec's store in memory, apart from the other one. Writes happen whole or not, as on S3."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[Fault] = lambda call, path: None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("failing://"))
        return stripped

    def info(self, path: str, **options: Any) -> Any:
        type(self).fault("info", path)
        return super().info(path, **options)

    def cat_file(self, path: str, **options: Any) -> Any:
        type(self).fault("cat_file", path)
        return super().cat_file(path, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        type(self).fault("pipe_file", path)
        super().pipe_file(path, value, **options)
        type(self).fault("piped", path)


register_implementation("failing", FailingFileSystem, clobber=True)


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    """Let every store in memory meet `fault`."""
    FailingFileSystem.fault = fault
    try:
        yield
    finally:
        FailingFileSystem.fault = lambda call, path: None
