"""What superpose-train's record beside an adapter says that a server should warn of."""

from __future__ import annotations

import json
from typing import Any

from superpose_adapters.base.facts import BaseFacts

TRAINING_NAME = "training.json"
# Far above what superpose-train writes, which has some hundred losses.
MAX_TRAINING_BYTES = 1 << 20


def training_warnings(record: bytes | None, base: BaseFacts | None) -> tuple[str, ...]:
    """Return what to say of an adapter whose training rows began otherwise than texts are served.

    Records of before there was a choice do not say how rows began: with nothing.

    Args:
        record: Contents of training.json; None or empty: there is none. Other trainers may have
            written it, and then it says nothing here.
        base: That the adapter is to be served on.
    """
    if not record or len(record) > MAX_TRAINING_BYTES or base is None:
        return ()
    fields = _fields(record)
    if fields is None:
        return ()
    began = fields.get("special_tokens", [])
    if began == list(base.special_tokens):
        return ()
    return (
        f"its training rows began with {_named(began)}, and here every text begins with "
        f"{_named(base.special_tokens)}: it is served what it was not trained on; train it again",
    )


def _fields(record: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(record)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(fields, dict) and {"base_digest", "parameters", "data"} <= fields.keys()
    return fields if ours else None


def _named(tokens: object) -> str:
    each = tokens if isinstance(tokens, list | tuple) else [tokens]
    # A file may hold anything; repr keeps it in one line.
    return " ".join(map(repr, each))[:200] or "no special token"
