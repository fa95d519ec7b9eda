"""What chaos scripts share: `--short`, `--seed`, one line of JSON at the end, an exit code."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def make_parser(what: str) -> argparse.ArgumentParser:
    """Return a parser with what all scripts understand."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--short", action="store_true", help="seconds only, as the tests run it")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    return parser


@dataclass
class Record:
    """What a script did, and what was lost.

    Attributes:
        name: Of the script.
        facts: Numbers and words, by name.
        lost: A line for each thing that was lost; none, if all is well.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def check(self, holds: bool, what: str) -> None:
        """Note that `what` was lost, unless it holds."""
        if not holds:
            self.lost.append(what)

    def add(self, facts: Mapping[str, Any]) -> None:
        """Note facts."""
        self.facts.update(facts)

    def finish(self) -> int:
        """Print the record as one line of JSON; return the exit code, 1 if anything was lost."""
        seconds = round(time.monotonic() - self._began, 1)
        told = {"script": self.name, "seconds": seconds, **self.facts, "lost": self.lost}
        print(json.dumps(told), flush=True)
        return 1 if self.lost else 0
