"""Which tokens end a text, as the base's own files say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from superpose_adapters.base.tokenizer import TokenizerError
from superpose_adapters.one_line import with_kind


def end_of_text_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those at which transformers ends one.

    Chat bases have several, one for a text and one for a turn. transformers' `generate` reads them
    from generation_config.json, and where that is missing from config.json, one id or a list. The
    tokenizer's may be none of them, where only the tokenizer was told of the end of a turn.

    Raises:
        TokenizerError: A file names something that is no token.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends.update(_named(folder / name))
            break
    return frozenset(ends)


def _named(path: Path) -> list[int]:
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TokenizerError(
            f"has a {path.name} that is no JSON object ({with_kind(error)}): copy it again"
        ) from error
    ids = named if isinstance(named, list) else [named]
    if named is not None and not all(type(token) is int for token in ids):
        raise TokenizerError(
            f"has a {path.name} whose eos_token_id is {named!r}: name a token id, or a list of them"
        )
    # Some say by a negative one that there is none.
    return [token for token in ids if token is not None and token >= 0]
