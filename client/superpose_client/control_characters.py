"""Characters that do something to a terminal; a language model can emit any of them."""

import re

# All but tab and newline.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_control_characters(text: str) -> str:
    """Return a text that neither moves the cursor of a terminal nor recolours it."""
    return _CONTROL_CHARACTERS.sub("", text)
