"""The unmodified transformers model in the server's step loop: nothing compiled, no kernels."""

from __future__ import annotations

from benchmarks.peers.bare_engine import Bare
from benchmarks.peers.peer import Settings


def load(settings: Settings) -> Bare:
    """Load the engine around the model as transformers made it."""
    return Bare(settings, "off")
