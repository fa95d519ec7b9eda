"""`adapterctl compare`: one prompt under several mixes at once."""

import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Unpack

import typer

from superpose_client.joined import joined
from superpose_client.mix import parse_mix
from superpose_client.one_line_errors import fail
from superpose_client.requests import GenerateOptions
from superpose_client.results import FinishReason, GenerationChunk
from superpose_client.screens import generation_line, seed_line, show
from superpose_client.session import ENDED_EARLY, Session, Shown
from superpose_client.side_by_side import GrowingText, drawn_side_by_side
from superpose_client.together import together

_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


def compare(
    session: Session, prompt: str, mixes: Sequence[str], **options: Unpack[GenerateOptions]
) -> None:
    """Generate a text under each of the mixes, all with one seed, and show them.

    A terminal shows them while they grow; elsewhere they are printed at their end, one below the
    other.

    Raises:
        MixSyntaxError: One is no mix; nothing is sent then.
    """
    parsed = [parse_mix(mix) for mix in mixes]
    seed = options.get("seed")
    if seed is None:
        seed = random.getrandbits(32)
    options["seed"] = seed
    texts = [GrowingText(heading=mix) for mix in mixes]
    chunks: list[list[GenerationChunk]] = [[] for _ in mixes]
    terminal = sys.stdout.isatty() and not session.json
    streams = [session.client.stream(prompt, mix=mix, **options) for mix in parsed]
    with drawn_side_by_side(texts) if terminal else nullcontext():
        for index, chunk in together(streams):
            chunks[index].append(chunk)
            texts[index].text += chunk.text
            if chunk.finish_reason != FinishReason.UNSPECIFIED:
                texts[index].ended = True
                if chunk.usage and chunk.mix:
                    texts[index].foot = generation_line(chunk.usage, chunk.finish_reason, chunk.mix)
    if session.json:
        wholes = [joined(each) for each in chunks if each]
        session.show(Shown(None, json={"seed": seed, "texts": wholes}))
    elif not terminal:
        typer.echo("\n\n".join(f"==> {each.heading} <==\n{each.text}" for each in texts))
    elif options.get("temperature") != 0:
        show(seed_line(seed))
    if not all(each and each[-1].finish_reason in _ENDS for each in chunks):
        fail(ENDED_EARLY)
