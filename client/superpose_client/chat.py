"""`adapterctl chat`: lines from standard input, each answered under a mix that may change."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Unpack

import typer

from superpose_client.errors import InvalidArgumentError
from superpose_client.joined import joined
from superpose_client.mix import MixLike, format_mix, parse_mix
from superpose_client.one_line_errors import fail, one_line_errors
from superpose_client.requests import GenerateOptions, Prompt
from superpose_client.results import GenerationChunk
from superpose_client.session import Session, Shown

HELP = """\
/mix MIX     answer under MIX from now on; alone it shows the mix
/score TEXT  perplexity of TEXT under the mix, and under base
/reset       forget what was said
/help        show this
/quit        end; so does Ctrl-D. Ctrl-C ends a running answer
A line that begins with / is a command; with a blank before it, it is text."""


class Messages:
    """What was said, for a base with a chat template."""

    def __init__(self) -> None:
        """Begin anew."""
        self._messages: list[dict[str, str]] = []

    def prompt(self, line: str) -> Prompt:
        """Return what the answer to a line is generated from."""
        return [*self._messages, {"role": "user", "content": line}]

    def keep(self, line: str, answer: str) -> None:
        """Remember a line and its answer."""
        self._messages.append({"role": "user", "content": line})
        self._messages.append({"role": "assistant", "content": answer})


class Continuation:
    """What was said, for a base without one: a text that each line and its answer lengthen."""

    def __init__(self) -> None:
        """Begin anew."""
        self._text = ""

    def prompt(self, line: str) -> Prompt:
        """Return what the answer to a line is generated from."""
        return self._text + line

    def keep(self, line: str, answer: str) -> None:
        """Remember a line and its answer."""
        self._text += f"{line}{answer}\n"


class Chat:
    """A conversation and its commands.

    On a terminal a failure is a line and the chat goes on, and Ctrl-C ends an answer; elsewhere
    both end the command, as they do any other.
    """

    def __init__(
        self, session: Session, mix: str | None, **options: Unpack[GenerateOptions]
    ) -> None:
        """Begin a conversation under a mix in MIX syntax; None is the default mix.

        Raises:
            MixSyntaxError: That is no mix.
        """
        self._session = session
        self._options = options
        self._mix = parse_mix(mix or "default")
        self._said: Messages | Continuation = Messages()
        self._commands: dict[str, Callable[[str], None]] = {
            "/mix": self._change_mix,
            "/score": self._score,
            "/reset": self._reset,
            "/help": self._help,
        }

    def run(self) -> None:
        """Take lines until there are no more, or /quit."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            # Lets a line be edited, and earlier ones be called back. Windows has none.
            with suppress(ImportError):
                import readline  # noqa: F401
            typer.echo("/help shows the commands, Ctrl-D ends.")
        while True:
            try:
                with one_line_errors(self._session.settings, changes=False):
                    line = input("> " if interactive else "")
                    if line.strip() == "/quit":
                        return
                    self._take(line)
            except EOFError:
                if interactive:
                    typer.echo()
                return
            except typer.Exit as end:
                if not interactive:
                    raise
                if end.exit_code == 130:  # Ctrl-C; the next prompt begins a line of its own.
                    typer.echo()

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            if name not in self._commands:
                fail(f"no command is called {name}; /help lists them")
            self._commands[name](argument.strip())
        elif line.strip():
            self._say(line)

    def _say(self, line: str) -> None:
        try:
            self._answer(line)
        except InvalidArgumentError as error:
            if error.reason != "NO_CHAT_TEMPLATE":
                raise
            typer.echo(
                "adapterctl: this base has no chat template: it goes on with each line as with a "
                "text, and with what came before",
                err=True,
            )
            self._said = Continuation()
            self._answer(line)

    def _answer(self, line: str) -> None:
        """Print the answer to a line and remember both, as far as the answer has come."""
        pieces: list[str] = []

        def heard(chunks: Iterable[GenerationChunk]) -> Iterator[GenerationChunk]:
            for chunk in chunks:
                pieces.append(chunk.text)
                yield chunk

        prompt = self._said.prompt(line)
        try:
            with self._session.client.stream(prompt, mix=self._mix, **self._options) as stream:
                arriving = heard(stream)
                # One object an answer.
                whole = [joined(list(arriving))] if self._session.json else arriving
                self._session.print_text(whole)
        finally:
            if pieces:
                self._said.keep(line, "".join(pieces))

    def _change_mix(self, written: str) -> None:
        if written:
            self._mix = parse_mix(written)
        mix = "default" if self._mix is None else format_mix(self._mix)
        self._session.show(Shown(f"mix {mix}", json={"mix": mix}))

    def _score(self, text: str) -> None:
        if not text:
            fail("/score takes a text, as in: /score Two and two are four.")
        scores = [self._session.client.score([text], mix=self._mix)]
        if scores[0].mix.entries:
            base: MixLike = {}
            scores.append(self._session.client.score([text], mix=base))
        perplexities = ", ".join(
            f"{score.perplexity:,.4f} under {format_mix(score.mix.weights)}" for score in scores
        )
        tokens = scores[0].tokens
        fault = None if tokens else "nothing to score: the text has no token that counts"
        self._session.show(
            Shown(f"perplexity {perplexities}; tokens {tokens:,}", {"scores": scores}, fault)
        )

    def _reset(self, _: str) -> None:
        self._said = type(self._said)()
        self._session.show(Shown("forgotten; the mix stays", json={}))

    def _help(self, _: str) -> None:
        self._session.show(Shown(HELP, json={"help": HELP}))
