"""Which words of several texts differ."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations

_WORD = re.compile(r"\S+")


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text begin and end; a word is what stands between blanks."""
    return [match.span() for match in _WORD.finditer(text)]


def differing_words(texts: Sequence[Sequence[str]]) -> list[set[int]]:
    """Return for each text the indices of its words that are not in all the others.

    Args:
        texts: The words of each text. Two texts have a word in common where an alignment of the
            two matches it, so a word may stand in another place and be none that differs.
    """
    differing: list[set[int]] = [set() for _ in texts]
    # Of each pair one alignment serves both, because the other way round it may be another.
    for (i, one), (j, other) in combinations(enumerate(texts), 2):
        matcher = SequenceMatcher(None, one, other, autojunk=False)
        for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
            if kind != "equal":
                differing[i].update(range(begin, end))
                differing[j].update(range(other_begin, other_end))
    return differing
