"""A fit on the rows of several files: what each mix loses on the held-out rows of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from superpose_client.results import FitCandidate, FitResult


@dataclass(frozen=True)
class FilesFitted:
    """The result of a fit, and of each text that was sent the file that it stands in."""

    result: FitResult
    files: Sequence[str]

    @property
    def names(self) -> dict[str, str]:
        """What each file is called, {file: name}: without its folder, unless two share a name."""
        files = dict.fromkeys(self.files)
        short = {file: Path(file).name for file in files}
        return short if len(set(short.values())) == len(short) else {file: file for file in files}

    def losses(self, candidate: FitCandidate) -> list[float | None]:
        """Return what a mix loses on each file's held-out rows, nats a token; None if on none."""
        nats = dict.fromkeys(self.files, 0.0)
        tokens = dict.fromkeys(self.files, 0)
        for place, item in zip(self.result.held_out, candidate.held_out_items, strict=True):
            nats[self.files[place]] -= item.logprob
            tokens[self.files[place]] += item.tokens
        return [nats[file] / count if count else None for file, count in tokens.items()]
