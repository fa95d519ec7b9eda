"""A base's tokenizer, whole, or one line that says which files it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from superpose_adapters.one_line import with_kind


class TokenizerError(ValueError):
    """A base has no tokenizer that can be used; the message continues "base X"."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer beside a checkpoint. Code in the folder is never run.

    Raises:
        TokenizerError: There is none that can be used.
    """
    try:
        # Unless told, transformers would ask on the terminal about code in the folder.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # As many kinds as there are things wrong with a file.
        raise TokenizerError(_reason(folder, error)) from error
    # Of some classes transformers makes an empty one where there is no vocabulary.
    if not (folder / "tokenizer.json").is_file() and not _has_words(tokenizer):
        raise TokenizerError(_reason(folder, ValueError("it has no words")))
    return tokenizer


def _has_words(tokenizer: Any) -> bool:
    """Tell whether anything can be spelled without tokens that were added to the vocabulary."""
    words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    return any(character.isalnum() for word in words for character in word)


def _reason(folder: Path, error: Exception) -> str:
    files = "copy tokenizer.json and tokenizer_config.json there from where the base came from"
    if "trust_remote_code" in str(error):
        return (
            "has a tokenizer that needs code of its own (auto_map in tokenizer_config.json), which "
            "is never run: use a base with a tokenizer.json"
        )
    if not (folder / "tokenizer.json").is_file():
        return f"has no tokenizer.json, and no other tokenizer that can be used: {files}"
    return f"has a tokenizer that cannot be used ({with_kind(error)}): {files}"
