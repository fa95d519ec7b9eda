"""Several processes that train one adapter, as `accelerate launch` or torchrun starts them."""

from __future__ import annotations

import os

import torch


def process_count() -> int:
    """Return how many processes train together: 1 unless a launcher says otherwise."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process claims, writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if _are_joined():
        torch.distributed.barrier()


def part() -> None:
    """Take leave of the other processes, at the end of a command."""
    if _are_joined():
        torch.distributed.destroy_process_group()


def _are_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
