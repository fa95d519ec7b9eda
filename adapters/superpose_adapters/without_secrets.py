"""URLs as they may be told: without what may be secret in them."""

from __future__ import annotations

import re

_BEHIND = re.compile(r"[?#].*", re.DOTALL)


def without_secrets(url: str) -> str:
    """Return a URL without what may be secret in it: user and password, query and fragment.

    Passwords that should have been quoted, and were not, are taken off too. Where nobody can say
    what belongs to one, since an @ stands behind a ? or #, the scheme is all that is left.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    told = _BEHIND.sub("", rest)
    place = rest.partition("/")[0]
    if "@" in place or ":" in place:
        if "@" in rest[len(told) :]:
            return f"{scheme}://..."
        told = told.rpartition("@")[2]
    return f"{scheme}://{told}".rstrip("/")
