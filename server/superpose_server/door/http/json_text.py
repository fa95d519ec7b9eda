"""JSON that is sent: one line without spaces, in ASCII, and no NaN, which is no JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Return a value as JSON. Raises ValueError: It holds NaN or an infinity."""


def json_answer(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer that holds `value`."""
    return Response(to_json(value), status, headers, "application/json")
