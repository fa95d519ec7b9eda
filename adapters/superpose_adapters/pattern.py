"""Regular expressions from untrusted configs, matched in bounded time.

PEFT gives such patterns to `re`, whose backtracking takes exponential time on a hostile one and
cannot be stopped. Here the pattern is parsed by `re` itself, so it means the same, but evaluated on
sets of positions, each node once a position: polynomial in the length of pattern and name, and
counted, so that even that has an end. Only whether a pattern matches is told, never a group, and so
greedy and lazy are the same thing. Backreferences, lookbehind and inline flags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

MAX_PATTERN_LENGTH = 4096
MAX_STEPS = 1_000_000  # about two seconds

# Python's own parser of patterns; private, but the same from 3.11 to 3.14.
_parser: Any = import_module("re._parser")

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}
_NOTHING: frozenset[int] = frozenset()


class PatternError(ValueError):
    """A pattern that is not valid, not supported, or too costly."""


class Budget:
    """Steps that all patterns of one config may take together."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        """Allow `steps` steps; one step is a node of a pattern at a position of a name."""
        self.left = steps

    def spend(self) -> None:
        """Take one step.

        Raises:
            PatternError: No step is left.
        """
        self.left -= 1
        if self.left < 0:
            raise PatternError("takes too long to match: write a simpler pattern")


class Pattern:
    """A parsed pattern.

    Raises:
        PatternError: On construction, if it is too long, not valid or not supported.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        """Parse `text`; every match spends from `budget`."""
        if len(text) > MAX_PATTERN_LENGTH:
            raise PatternError(f"is {len(text)} characters long; the limit is {MAX_PATTERN_LENGTH}")
        try:
            self._tree = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"is not a valid regular expression ({error})") from error
        if self._tree.state.flags & ~re.UNICODE:
            raise PatternError("sets flags: spell the letters out instead")
        self._budget = budget

    def matches(self, name: str, *, full: bool) -> bool:
        """Tell whether `re.fullmatch` (or, if not `full`, `re.match`) would find a match."""
        try:
            ends = _Match(name, self._budget).sequence(self._tree, 0)
        except RecursionError as error:
            raise PatternError("is nested too deeply: write a simpler pattern") from error
        return len(name) in ends if full else bool(ends)


class _Match:
    """One pattern against one name: from a start position to every position a node can end at."""

    def __init__(self, name: str, budget: Budget) -> None:
        self._name = name
        self._budget = budget
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def sequence(self, nodes: Iterable[tuple[Any, Any]], start: int) -> frozenset[int]:
        ends = frozenset({start})
        for node in nodes:
            ends = self._from_all(node, ends)
            if not ends:
                break
        return ends

    def _from_all(self, node: tuple[Any, Any], starts: Iterable[int]) -> frozenset[int]:
        return _NOTHING.union(*(self._node(node, start) for start in starts))

    def _node(self, node: tuple[Any, Any], start: int) -> frozenset[int]:
        # The tree outlives the match, so a node's id names it.
        key = (id(node), start)
        if key not in self._known:
            self._budget.spend()
            self._known[key] = self._evaluate(str(node[0]), node[1], start)
        return self._known[key]

    def _evaluate(self, kind: str, value: Any, start: int) -> frozenset[int]:
        match kind:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                hit = start < len(self._name) and _accepts(kind, value, self._name[start])
                return frozenset({start + 1}) if hit else _NOTHING
            case "BRANCH":
                return _NOTHING.union(*(self.sequence(option, start) for option in value[1]))
            case "SUBPATTERN":
                _, add_flags, drop_flags, body = value
                if add_flags or drop_flags:
                    raise PatternError("sets flags: spell the letters out instead")
                return self.sequence(body, start)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, body = value
                return self._repeat(least, most, body, start)
            case "ASSERT" | "ASSERT_NOT" if value[0] == 1:  # lookahead
                found = bool(self.sequence(value[1], start))
                return frozenset({start}) if found == (kind == "ASSERT") else _NOTHING
            case "AT":
                return frozenset({start}) if self._at(str(value), start) else _NOTHING
            case _:
                raise PatternError(f"uses {kind.lower()}, which is not supported")

    def _repeat(self, least: int, most: int, body: Any, start: int) -> frozenset[int]:
        ends = frozenset({start})
        for _ in range(least):
            self._budget.spend()
            following = _NOTHING.union(*(self._once(body, end) for end in ends))
            if following == ends:  # repeats itself, however high `least` is
                break
            ends = following
        frontier, count = ends, least
        while frontier and count < most:
            self._budget.spend()
            frontier = _NOTHING.union(*(self._once(body, end) for end in frontier)) - ends
            ends |= frontier
            count += 1
        return ends

    def _once(self, body: Any, start: int) -> frozenset[int]:
        key = (id(body), start)
        if key not in self._known:
            self._known[key] = self.sequence(body, start)
        return self._known[key]

    def _at(self, where: str, position: int) -> bool:
        name, length = self._name, len(self._name)
        match where:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return position == 0
            case "AT_END":
                return position == length or (position == length - 1 and name[-1] == "\n")
            case "AT_END_STRING":
                return position == length
            case "AT_BOUNDARY" | "AT_NON_BOUNDARY":
                is_word = _CATEGORIES["CATEGORY_WORD"]
                before = position > 0 and is_word(name[position - 1])
                after = position < length and is_word(name[position])
                return (before != after) == (where == "AT_BOUNDARY")
            case _:
                raise PatternError(f"uses {where.lower()}, which is not supported")


def _accepts(kind: str, value: Any, character: str) -> bool:
    """Tell whether a node that takes one character takes this one."""
    code = ord(character)
    match kind:
        case "LITERAL":
            return bool(code == value)
        case "NOT_LITERAL":
            return bool(code != value)
        case "ANY":
            return character != "\n"
        case "RANGE":
            return bool(value[0] <= code <= value[1])
        case "CATEGORY":
            return _CATEGORIES[str(value)](character)
        case _:  # IN: a set, negated if its first item says so
            negated = str(value[0][0]) == "NEGATE"
            items = value[1:] if negated else value
            return negated != any(_accepts(str(k), v, character) for k, v in items)
