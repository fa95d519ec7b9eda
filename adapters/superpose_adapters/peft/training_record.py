"""What superpose-train's record beside an adapter says that a server should warn of."""

from __future__ import annotations

import json
from typing import Any

from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.one_line import escaped

TRAINING_NAME = "training.json"
# Far above what superpose-train writes, which has some hundred losses.
MAX_TRAINING_BYTES = 1 << 20
# Of domains that one line names.
_MOST_NAMED = 8


def training_warnings(record: bytes | None, base: BaseFacts | None) -> tuple[str, ...]:
    """Return what to say of an adapter that was trained otherwise than it may be served.

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
    return (*_of_first_tokens(fields, base), *_of_a_sum(fields))


def _of_first_tokens(fields: dict[str, Any], base: BaseFacts) -> tuple[str, ...]:
    """Warn of rows that began otherwise than texts are served.

    Records of before there was a choice do not say how rows began: with nothing.
    """
    began = fields.get("special_tokens", [])
    if began == list(base.special_tokens):
        return ()
    return (
        f"its training rows began with {_named(began)}, and here every text begins with "
        f"{_named(base.special_tokens)}: it is served what it was not trained on; train it again",
    )


def _of_a_sum(fields: dict[str, Any]) -> tuple[str, ...]:
    """Warn of an adapter that was trained while others were active: alone it is half of something.

    Which mixes it will be in, nobody knows when it is loaded.
    """
    past = fields.get("orthogonal_to")
    if not isinstance(past, list) or not past:
        return ()
    # A file may hold anything.
    domains = [
        escaped(f"{str(each.get('domain'))[:64]} (digest {str(each.get('digest'))[:12]})")
        for each in past[:_MOST_NAMED]
        if isinstance(each, dict)
    ]
    more = ["..."] if len(domains) < len(past) else []
    return (
        f"it was trained in a sum with {', '.join(domains + more)}, each at weight 1: serve it in "
        "a mix that holds them so",
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
