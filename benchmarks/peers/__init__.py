"""What a user would pick instead of Superpose, each behind one small protocol.

`install.sh` makes the environment of the peers that are not dependencies of ours; `python -m
benchmarks.peers` runs all of them; other benchmarks use `PeerProcess` and `VARIANTS`.
"""

from benchmarks.peers.peer import Answer, Prompts, Settings, default_cache
from benchmarks.peers.pool import VARIANTS, PeerError, PeerProcess, Variant

__all__ = [
    "VARIANTS",
    "Answer",
    "PeerError",
    "PeerProcess",
    "Prompts",
    "Settings",
    "Variant",
    "default_cache",
]
