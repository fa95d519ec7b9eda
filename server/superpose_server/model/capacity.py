"""How many rows of how many tokens the cache holds, decided before anything is allocated."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from superpose_server.model.memory import MIB

# What the cache takes at most of the memory that is free, unless told. The rest of a GPU is for
# captured steps, their factors, and the scratch of passes and folds; a CPU's is not ours alone.
CACHE_SHARE = {"cuda": 0.9, "cpu": 0.25}
# The default limit makes no row shorter than this.
_FEWEST = 1024
# Tokens of a row of a base that sets no limit, as with ALiBi.
ANY_POSITIONS = 2048
# Where configurations say how many positions a base has.
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"),
    "max_target_positions",
)
# No row is longer, whatever a configuration says: some say a number that means none.
_MOST = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capacity:
    """`rows` that run at once, of `length` tokens each; one more slot is scratch."""

    rows: int
    length: int


def positions_of(config: Any) -> int | None:
    """Return how many positions a base has by its configuration; None: any number."""
    found = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((value for value in found if isinstance(value, int) and value > 0), None)
    return None if positions is None else min(positions, _MOST)


def find_capacity(
    *,
    token_bytes: int,
    positions: int,
    max_batch: int,
    max_length: int | None,
    cache_bytes: int | None,
    free: int,
    share: float,
) -> Capacity:
    """Return what the cache holds.

    What is asked for is given or refused: `max_length` always, `max_batch` unless `cache_bytes`
    holds fewer. If neither length nor bytes are asked for, rows are as long as the base allows and
    a default limit, `share` of what is free, but not shorter than 1,024 tokens for its sake; what
    it cuts off is logged.

    Args:
        token_bytes: Keys and values of a token.
        positions: Tokens of a row, as far as the base goes.
        max_batch: Rows that run at once.
        max_length: Tokens of a row; None: `positions`, or fewer.
        cache_bytes: Of the whole cache; None: what `max_batch` rows take.
        free: Bytes that can be allocated.
        share: Of them, at most.

    Raises:
        ValueError: It does not fit.
    """
    length = max_length or positions
    if cache_bytes is not None:
        slot = token_bytes * length
        rows = min(max_batch, cache_bytes // slot - 1)
        if rows < 1:
            raise ValueError(
                f"--cache-mib {cache_bytes / MIB:.0f} holds no row of {length} tokens: give it "
                f"{-(-2 * slot // MIB)} or more, or lower --max-length"
            )
        return _checked(Capacity(rows, length), token_bytes, free)
    if max_length is None:
        room = int(free * share) // (token_bytes * (max_batch + 1))
        length = min(positions, max(room, _FEWEST))
        if length < positions:
            _log.warning(
                "rows have %d of the base's %d tokens, so that the cache of %d rows takes no more "
                "than %.0f %% of the memory that is free: for longer ones set --max-length or "
                "--cache-mib, or lower --max-batch",
                *(length, positions, max_batch, 100 * share),
            )
    return _checked(Capacity(max_batch, length), token_bytes, free)


def _checked(capacity: Capacity, token_bytes: int, free: int) -> Capacity:
    needed = token_bytes * capacity.length * (capacity.rows + 1)
    if needed > free:
        raise ValueError(
            f"the cache of {capacity.rows} rows of {capacity.length} tokens needs "
            f"{needed / MIB:.0f} MiB and {free / MIB:.0f} MiB are free: lower --max-batch or "
            "--max-length, or set --cache-mib"
        )
    return capacity
