"""Regular expressions from untrusted configs, matched in bounded time.

PEFT gives such patterns to `re`, whose backtracking takes exponential time on a hostile one and
cannot be stopped. Here `re` decides what is a pattern, and `regex`, which reads the same syntax and
takes a timeout, matches it.
"""

from __future__ import annotations

import re
import time
import warnings

import regex

MAX_PATTERN_LENGTH = 4096
MAX_SECONDS = 2.0


class PatternError(ValueError):
    """A pattern that is not valid, not supported, or too costly."""


class Budget:
    """Time that all patterns of one config may take together."""

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        """Allow `seconds` of matching; the time between matches is free."""
        self.left = seconds


class Pattern:
    """A compiled pattern.

    Raises:
        PatternError: On construction, if it is too long or not valid.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        """Compile `text`; every match spends from `budget`."""
        if len(text) > MAX_PATTERN_LENGTH:
            raise PatternError(f"is {len(text)} characters long; the limit is {MAX_PATTERN_LENGTH}")
        try:
            with warnings.catch_warnings():
                # Both warn of syntax that may change its meaning; what it means now is what counts.
                warnings.simplefilter("ignore")
                re.compile(text)
                self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise PatternError(f"is not a valid regular expression ({error})") from error
        self._budget = budget

    def matches(self, name: str, *, full: bool) -> bool:
        """Tell whether `re.fullmatch` (or, if not `full`, `re.match`) would find a match.

        Raises:
            PatternError: The budget is spent.
        """
        find = self._compiled.fullmatch if full else self._compiled.match
        started = time.perf_counter()
        try:
            found = find(name, timeout=max(self._budget.left, 1e-3), concurrent=True)
        except (TimeoutError, MemoryError) as error:
            raise PatternError("takes too long to match: write a simpler pattern") from error
        finally:
            self._budget.left -= time.perf_counter() - started
        return found is not None
