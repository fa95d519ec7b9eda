"""`adapterctl`: the calls of the client as commands.

Exit status 0; 1 with one line on standard error; 2 for wrong usage, bad MIX syntax included; 130
after Ctrl-C. gRPC and rich are imported by the commands that need them, not by `--help`.
"""

import dataclasses
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, NoReturn, ParamSpec

import typer

if TYPE_CHECKING:
    from superpose_client.client import Client
    from superpose_client.errors import CallError
    from superpose_client.requests import GenerateOptions
    from superpose_client.results import Generation, GenerationChunk

P = ParamSpec("P")

# The default of the client, which is not imported for the help.
DEFAULT_SERVER = "127.0.0.1:50051"

_UINT32 = 2**32 - 1
_UINT64 = 2**64 - 1

# What would move the cursor or recolour a terminal; a language model can emit anything.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

app = typer.Typer(
    name="adapterctl",
    help="Operate a Superpose server: a base language model plus any weighted sum of LoRA adapters."
    "\n\nMIX is written math=1,medicine=0.5; a domain without a weight has weight 1; the word base "
    "is the base model alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Help in plain text, because rich takes as long to load as all the rest together.
    rich_markup_mode=None,
)


def _within(most: float) -> Callable[[float | None], float | None]:
    """Return a check of an option's value. Typer's own would print the bounds in the help."""

    def check(value: float | None) -> float | None:
        if value is not None and not 0 <= value <= most:
            raise typer.BadParameter(f"{value} is not between 0 and {most}")
        return value

    return check


ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDR",
        help=f"Address of the server. [default: SUPERPOSE_SERVER, or {DEFAULT_SERVER}]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        callback=_within(math.inf),
        help="Longest wait for an answer. [default: 60, 600 for calls that compute, "
        "none for streams]",
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The domain.")]
MixOption = Annotated[
    str | None, typer.Option("--mix", metavar="MIX", help="[default: the default mix]")
]
ExpectedOption = Annotated[
    int | None,
    typer.Option(
        "--expected-generation",
        metavar="N",
        callback=_within(_UINT64),
        help="Change nothing unless the default mix has this generation.",
    ),
]


class Scope(StrEnum):
    """The tokens that a score counts."""

    ALL = "all"
    ANSWER = "answer"


@dataclasses.dataclass(frozen=True)
class Session:
    """What every command needs to know.

    `changes` is whether the command changes something, which may happen after its timeout too.
    """

    server: str
    json: bool
    timeout: float | None
    changes: bool

    def client(self) -> "Client":
        """Return a client, which makes no connection yet."""
        from superpose_client.client import Client

        return Client(self.server, timeout=self.timeout)

    def show(self, result: Any, *, as_json: Any = None) -> None:
        """Print a result; `as_json` takes its place where the result itself is no object."""
        if self.json:
            _print_json(result if as_json is None else as_json)
            return
        from superpose_client.screens import screen, show

        show(screen(result))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("superpose")
        except PackageNotFoundError:
            number = "from a source tree"
        typer.echo(f"adapterctl {number}")
        raise typer.Exit


@app.callback()
def _defaults(
    context: typer.Context,
    server: ServerOption = None,
    as_json: JsonOption = False,
    timeout: TimeoutOption = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    # These options stand on every command too; there, what is given here is the default.
    context.obj = (server, as_json, timeout)


def command(
    name: str, *, changes: bool = False
) -> Callable[[Callable[Concatenate[Session, P], None]], None]:
    """Register a command: its own parameters, then --server, --json and --timeout."""

    def register(function: Callable[Concatenate[Session, P], None]) -> None:
        def run(
            context: typer.Context,
            server: ServerOption = None,
            as_json: JsonOption = False,
            timeout: TimeoutOption = None,
            **arguments: Any,
        ) -> None:
            default_server, default_json, default_timeout = context.obj
            chosen = server or default_server or os.environ.get("SUPERPOSE_SERVER")
            session = Session(
                server=chosen or DEFAULT_SERVER,
                json=as_json or default_json,
                timeout=default_timeout if timeout is None else timeout,
                changes=changes,
            )
            call: Callable[..., None] = function
            with _one_line_errors(session):
                call(session, **arguments)

        # Typer reads the options from the signature: the command's own, then the common ones.
        own = list(inspect.signature(function).parameters.values())[1:]
        context, *common, _arguments = inspect.signature(run).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (context, *own, *common)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        app.command(name)(run)

    return register


@command("status")
def _status(session: Session) -> None:
    """Show what the server is, what it is doing, and the default mix."""
    with session.client() as client:
        session.show(client.info())


@command("list")
def _list(session: Session) -> None:
    """List the adapters."""
    with session.client() as client:
        adapters = client.adapters()
    session.show(adapters, as_json={"adapters": adapters})


@command("show")
def _show(session: Session, name: NameArgument) -> None:
    """Show one adapter."""
    with session.client() as client:
        session.show(client.adapter(name))


@command("push", changes=True)
def _push(
    session: Session,
    name: NameArgument,
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Folder with adapter_config.json and adapter_model.safetensors."
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of another adapter.")
    ] = False,
) -> None:
    """Upload an adapter in PEFT's format."""
    with session.client() as client:
        session.show(client.push(name, folder, replace=replace))


@command("delete", changes=True)
def _delete(session: Session, name: NameArgument) -> None:
    """Delete an adapter that is not in the default mix."""
    with session.client() as client:
        client.delete(name)
    if session.json:
        _print_json({})
    else:
        typer.echo(f"deleted {name}")


@command("add", changes=True)
def _add(
    session: Session,
    name: NameArgument,
    weight: Annotated[
        float | None,
        typer.Option("--weight", metavar="W", help="Negative takes away. [default: 1]"),
    ] = None,
    expected_generation: ExpectedOption = None,
) -> None:
    """Add a domain to the default mix."""
    with session.client() as client:
        session.show(client.add(name, weight, expected_generation=expected_generation))


@command("remove", changes=True)
def _remove(
    session: Session, name: NameArgument, expected_generation: ExpectedOption = None
) -> None:
    """Remove a domain from the default mix."""
    with session.client() as client:
        session.show(client.remove(name, expected_generation=expected_generation))


@command("set", changes=True)
def _set(
    session: Session,
    mix: Annotated[str, typer.Argument(metavar="MIX")],
    expected_generation: ExpectedOption = None,
) -> None:
    """Make MIX the default mix."""
    with session.client() as client:
        session.show(client.set(mix, expected_generation=expected_generation))


@command("mix")
def _mix(session: Session) -> None:
    """Show the default mix."""
    with session.client() as client:
        session.show(client.mix())


@command("watch")
def _watch(session: Session) -> None:
    """Print the default mix now and at each change, until Ctrl-C."""
    with session.client() as client, client.watch() as changes:
        for mix in changes:
            if session.json:
                _print_json(mix)
            else:
                from superpose_client.screens import watch_line

                typer.echo(watch_line(mix))
            sys.stdout.flush()


@command("analyze")
def _analyze(
    session: Session,
    mix: Annotated[
        str | None, typer.Argument(metavar="[MIX]", help="[default: the default mix]")
    ] = None,
) -> None:
    """Report how the domains of MIX interfere."""
    with session.client() as client:
        session.show(client.analyze(mix))


@command("verify")
def _verify(session: Session) -> None:
    """Check that the weights are what they should be."""
    with session.client() as client:
        result = client.verify()
    session.show(result)
    if not result.ok:
        _fail("the weights are not what they should be")


@command("generate")
def _generate(
    session: Session,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="- reads standard input, without its last newline."),
    ],
    mix: MixOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", metavar="N", callback=_within(_UINT32), help="[default: 64]"
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--min-new-tokens", metavar="N", callback=_within(_UINT32), help="[default: 0]"
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", metavar="T", help="0 is greedy. [default: 0]", show_default=False
        ),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="K", callback=_within(_UINT32), help="[default: 0, off]"),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="[default: 1, off]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", callback=_within(_UINT64), help="[default: random]"),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text. May be repeated."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Show the log-probability of each token.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it is made. [default: stream, with --json no-stream]",
        ),
    ] = None,
) -> None:
    """Generate the text that follows PROMPT. Greedy unless --temperature is given."""
    options: GenerateOptions = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or [],
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
    }
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    chunks: list[Generation | GenerationChunk] = []
    with session.client() as client:
        arriving: Iterable[Generation | GenerationChunk]
        if stream if stream is not None else not session.json:
            arriving = client.stream(prompt, mix=mix, **options)
        else:
            arriving = [client.generate(prompt, mix=mix, **options)]
        try:
            for chunk in arriving:
                chunks.append(chunk)
                _print_chunk(session, chunk)
        finally:
            # An error message too shall begin a line of its own.
            if chunks and not session.json:
                sys.stdout.write("\n")
    if not session.json:
        _print_generation_end(chunks)
    if chunks and chunks[-1].finish_reason == "FINISH_REASON_ABORTED":
        _fail("the server ended the text before its end")


@command("score")
def _score(
    session: Session,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A text a line; .jsonl: question and answer, or text; each may be .gz. "
            "- is text from standard input.",
        ),
    ],
    mix: MixOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            callback=_within(_UINT32),
            help="Tokens kept of each text. [default: the context length]",
        ),
    ] = None,
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="Tokens that count: all but the first, or the answer's."),
    ] = Scope.ALL,
) -> None:
    """Measure the perplexity of texts under a mix."""
    from superpose_client.score_file import read_texts

    texts = read_texts(file)

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            line = f"{done} of {len(texts)} texts" if done < len(texts) else ""
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()

    with session.client() as client:
        session.show(
            client.score(
                texts, mix=mix, max_length=max_length, scope=scope.value, progress=progress
            )
        )


@command("health")
def _health(session: Session) -> None:
    """Succeed if the server takes requests; wait 5 s by default."""
    with session.client() as client:
        status = client.health(timeout=5 if session.timeout is None else None)
    if session.json:
        _print_json({"status": status})
    else:
        typer.echo(status)
    if status != "SERVING":
        _fail("the server does not take requests")


def _print_chunk(session: Session, chunk: "Generation | GenerationChunk") -> None:
    if session.json:
        _print_json(chunk)
    else:
        text = _CONTROL_CHARACTERS.sub("", chunk.text) if sys.stdout.isatty() else chunk.text
        sys.stdout.write(text)
    sys.stdout.flush()


def _print_generation_end(chunks: "list[Generation | GenerationChunk]") -> None:
    """Print what is not text: on a terminal the mix, if asked for the log-probabilities."""
    from superpose_client.screens import generation_line, logprob_table, show

    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
    if logprobs:
        show(logprob_table(token_ids, logprobs))
    last = chunks[-1] if chunks else None
    # Not in a pipe, whose reader wants the text.
    if sys.stdout.isatty() and last is not None and last.usage and last.mix:
        show(generation_line(last.usage, last.finish_reason, last.mix))


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


def _fail(message: str, status: int = 1) -> NoReturn:
    """Exit with one line on standard error."""
    line = _CONTROL_CHARACTERS.sub("", " ".join(message.split()))
    typer.echo(f"adapterctl: {line}", err=True)
    raise typer.Exit(status)


@contextmanager
def _one_line_errors(session: Session) -> Iterator[None]:
    """Turn what a command may run into, and no fault of its own, into a line and a status."""
    from superpose_client.errors import CallError, MixSyntaxError, SuperposeError

    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader has what it wanted. What is left in the buffer must not be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except MixSyntaxError as error:
        _fail(error.message, 2)
    except CallError as error:
        _fail(_describe(error, session))
    except UnicodeError:
        _fail("the text is not valid UTF-8")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except SuperposeError as error:
        _fail(error.message)


def _describe(error: "CallError", session: Session) -> str:
    """Return the message of a failed call, with what its details tell beyond it."""
    from superpose_client import errors

    text = error.message
    # Without a reason it is gRPC that speaks, not the server.
    if isinstance(error, errors.UnavailableError) and not error.reason:
        text = f"cannot reach a server at {session.server}; is superpose-server running? ({text})"
    elif isinstance(error, errors.DeadlineExceededError) and not error.reason:
        text = f"no answer from {session.server} in time; see --timeout"
        if session.changes:
            text += ". The change may still take place; look before you repeat it"
    for violation in error.field_violations:
        if violation.description not in text:
            text += f"; {violation.field}: {violation.description}"
    return text


def main() -> None:
    """Run `adapterctl`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Generated text goes to terminals of any encoding.
        sys.stdout.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
