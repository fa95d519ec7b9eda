"""What a command of `adapterctl` works with, and how it prints: for people, or as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from superpose_client.common_options import Settings
from superpose_client.control_characters import without_control_characters
from superpose_client.one_line_errors import fail

if TYPE_CHECKING:
    from superpose_client.client import Client
    from superpose_client.results import Generation, GenerationChunk

ENDED_EARLY = "the server ended the text before its end"


@dataclasses.dataclass(frozen=True)
class Session:
    """What a command works with."""

    client: "Client"
    settings: Settings

    @property
    def json(self) -> bool:
        """Whether results are printed as JSON."""
        return self.settings.json

    def show(self, result: object) -> None:
        """Print a result."""
        shown = result if isinstance(result, Shown) else Shown(result, json=result)
        if self.json:
            _print_json(shown.json)
        elif isinstance(shown.screen, str):
            typer.echo(shown.screen)
        else:
            from superpose_client.screens import screen, show

            show(screen(shown.screen))
        sys.stdout.flush()
        if shown.fault is not None:
            fail(shown.fault)

    def print_text(self, arriving: "Iterable[Generation | GenerationChunk]") -> None:
        """Print a text as it arrives, and what there is to say of it at its end.

        As JSON, each chunk as an object of its own.
        """
        chunks: list[Generation | GenerationChunk] = []
        try:
            for chunk in arriving:
                chunks.append(chunk)
                self._print_chunk(chunk)
        finally:
            # An error message too shall begin a line of its own.
            if chunks and not self.json:
                sys.stdout.write("\n")
        if not chunks:
            return
        if not self.json:
            _print_generation_end(chunks)
        if chunks[-1].finish_reason == "FINISH_REASON_ABORTED":
            fail(ENDED_EARLY)

    def _print_chunk(self, chunk: "Generation | GenerationChunk") -> None:
        if self.json:
            _print_json(chunk)
        elif sys.stdout.isatty():
            sys.stdout.write(without_control_characters(chunk.text))
        else:
            sys.stdout.write(chunk.text)
        sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a command shows where that is more than its result.

    `screen` is for people, a result or a line; `json` is for --json. A `fault` ends the command
    with status 1 after that.
    """

    screen: Any
    json: Any
    fault: str | None = None


def _print_generation_end(chunks: "list[Generation | GenerationChunk]") -> None:
    """Print what is not text: on a terminal the mix, if asked for the log-probabilities."""
    from superpose_client.joined import joined
    from superpose_client.screens import generation_line, logprob_table, show

    whole = joined(chunks)
    if whole.logprobs or whole.top_logprobs:
        show(logprob_table(whole.token_ids, whole.logprobs, whole.top_logprobs))
    # Not in a pipe, whose reader wants the text.
    if sys.stdout.isatty() and whole.usage and whole.mix:
        show(generation_line(whole.usage, whole.finish_reason, whole.mix))


def _print_json(result: Any) -> None:
    print(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    """Return what json writes, with the fields of the proto and none left out."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # JSON has no such numbers; protobuf writes them as these words.
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value
