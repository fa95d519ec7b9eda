"""JSON that is sent: one line without spaces, in ASCII, and no NaN, which is no JSON."""

from __future__ import annotations

import json

to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Return a value as JSON. Raises ValueError: It holds NaN or an infinity."""
