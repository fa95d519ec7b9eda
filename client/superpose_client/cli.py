"""`adapterctl`: the calls of the client as commands.

Exit status 0; 1 with one line on standard error; 2 for wrong usage, bad MIX syntax included; 130
after Ctrl-C. gRPC and rich are imported by the commands that need them, not by `--help`.
"""

import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from copy import copy
from enum import StrEnum
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Concatenate,
    ParamSpec,
    TypedDict,
    Unpack,
    get_args,
    get_type_hints,
)

import typer

from superpose_adapters.option_syntax import parse_options
from superpose_client.common_options import AccessOptions, AllOptions, settings_of, within
from superpose_client.keywords import spelled_out
from superpose_client.one_line_errors import one_line_errors
from superpose_client.session import Session, Shown
from superpose_client.token_commands import app as token_app

if TYPE_CHECKING:
    from superpose_client.client import Stream
    from superpose_client.results import (
        AdapterInfo,
        Analysis,
        CurrentMix,
        FitResult,
        FitUpdate,
        Generation,
        GenerationChunk,
        MergeResult,
        MixState,
        NamedMix,
        PushResult,
        ServerInfo,
    )

P = ParamSpec("P")

_UINT32 = 2**32 - 1
_UINT64 = 2**64 - 1

app = typer.Typer(
    name="adapterctl",
    help="Operate a Superpose server: a base language model plus any weighted sum of LoRA adapters."
    "\n\nMIX is written math=1,medicine=0.5; a domain without a weight has weight 1, and a named "
    "mix may stand for a domain; base is the base model alone, default the default mix.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Help in plain text, because rich takes as long to load as all the rest together.
    rich_markup_mode=None,
)
app.add_typer(token_app)


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The domain.")]
PromptArgument = Annotated[
    str,
    typer.Argument(metavar="PROMPT", help="- reads standard input, without its last newline."),
]
MixOption = Annotated[
    str | None, typer.Option("--mix", metavar="MIX", help="[default: the default mix]")
]
ExpectedOption = Annotated[
    int | None,
    typer.Option(
        "--expected-generation",
        metavar="N",
        callback=within(_UINT64),
        help="Change nothing unless the default mix has this generation.",
    ),
]


class Scope(StrEnum):
    """The tokens that a score counts."""

    ALL = "all"
    ANSWER = "answer"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("superpose")
        except PackageNotFoundError:
            number = "from a source tree"
        typer.echo(f"adapterctl {number}")
        raise typer.Exit


def _take(function: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> None:
    """Let Typer, which reads the options from the signature, see these."""
    keywords = [each.replace(kind=each.KEYWORD_ONLY) for each in parameters]
    function.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    function.__annotations__ = {each.name: each.annotation for each in keywords}


def _before(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    **common: Unpack[AllOptions],
) -> None:
    context.obj = common


_take(_before, spelled_out(_before).parameters.values())
app.callback()(_before)


def command(
    name: str, *, changes: bool = False
) -> Callable[[Callable[Concatenate[Session, P], object]], None]:
    """Register a command, which returns what is to be shown, or None if it has shown all itself.

    Its options are its own parameters, then those that are common. `changes` is whether it changes
    something, which may happen after its timeout too.
    """

    def register(function: Callable[Concatenate[Session, P], object]) -> None:
        def run(context: typer.Context, **given: Any) -> None:
            behind: Any = {option: given.pop(option) for option in common}
            settings = settings_of(context.obj, **behind)
            call: Callable[..., Any] = function
            with one_line_errors(settings, changes):
                from superpose_client.client import Client

                access = settings.access()
                with Client(settings.server, timeout=settings.timeout, **access) as client:
                    session = Session(client, settings)
                    result = call(session, **given)
                if result is not None:
                    session.show(result)

        context, _given = inspect.signature(run).parameters.values()
        own = list(spelled_out(function).parameters.values())[1:]
        _before, *all_common = spelled_out(settings_of).parameters.values()
        common = [option.name for option in all_common]
        hidden = get_type_hints(AccessOptions)
        _take(
            run,
            [context, *own, *(_hidden(o) if o.name in hidden else o for o in all_common)],
        )
        run.__doc__ = function.__doc__
        app.command(name)(run)

    return register


def _hidden(option: inspect.Parameter) -> inspect.Parameter:
    """Return an option that the help does not show."""
    kind, shown = get_args(option.annotation)
    unseen = copy(shown)
    unseen.hidden = True
    return option.replace(annotation=Annotated[kind, unseen])


@command("status")
def _status(session: Session) -> "ServerInfo":
    """Show what the server is, what it is doing, and the default mix."""
    return session.client.info()


@command("top")
def _top(
    session: Session,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Between two looks.")
    ] = 1.0,
) -> None:
    """Show what the server is doing, again and again, until Ctrl-C."""
    from superpose_client.load_view import looks, show_looks

    found = looks(session.client.info, every)
    if session.json:
        for look in found:
            session.show(look.info)
    else:
        show_looks(found)


@command("list")
def _list(session: Session) -> Shown:
    """List the adapters."""
    adapters = session.client.adapters()
    return Shown(adapters, json={"adapters": adapters})


@command("show")
def _show(session: Session, name: NameArgument) -> "AdapterInfo":
    """Show one adapter."""
    return session.client.adapter(name)


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
) -> "PushResult":
    """Upload an adapter in PEFT's format."""
    return session.client.push(name, folder, replace=replace)


@command("merge", changes=True)
def _merge(
    session: Session,
    name: NameArgument,
    mix: Annotated[
        str | None, typer.Argument(metavar="[MIX]", help="[default: the default mix now]")
    ] = None,
    *,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="M",
            help="How, such as sum or svd; the server names all that it has where it lacks one.",
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the method. May be repeated."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of another adapter.")
    ] = False,
) -> "MergeResult":
    """Merge the adapters of MIX into one, NAME, while the server serves."""
    try:
        options = parse_options(option or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--option") from error
    return session.client.merge(name, mix, method=method, options=options, replace=replace)


@command("delete", changes=True)
def _delete(session: Session, name: NameArgument) -> Shown:
    """Delete an adapter that is not in the default mix."""
    session.client.delete(name)
    return Shown(f"deleted {name}", json={})


@command("add", changes=True)
def _add(
    session: Session,
    name: NameArgument,
    weight: Annotated[
        float | None,
        typer.Option("--weight", metavar="W", help="Negative takes away. [default: 1]"),
    ] = None,
    expected_generation: ExpectedOption = None,
) -> "MixState":
    """Add a domain to the default mix."""
    return session.client.add(name, weight, expected_generation=expected_generation)


@command("remove", changes=True)
def _remove(
    session: Session, name: NameArgument, expected_generation: ExpectedOption = None
) -> "MixState":
    """Remove a domain from the default mix."""
    return session.client.remove(name, expected_generation=expected_generation)


@command("set", changes=True)
def _set(
    session: Session,
    mix: Annotated[str, typer.Argument(metavar="MIX")],
    expected_generation: ExpectedOption = None,
) -> "MixState":
    """Make MIX the default mix."""
    return session.client.set(mix, expected_generation=expected_generation)


@command("mix")
def _mix(session: Session) -> "CurrentMix":
    """Show the default mix."""
    return session.client.mix()


@command("watch")
def _watch(session: Session) -> None:
    """Print the default mix now and at each change, until Ctrl-C."""
    from superpose_client.screens import watch_line

    with session.client.watch() as changes:
        for mix in changes:
            session.show(Shown(watch_line(mix), json=mix))


@command("name", changes=True)
def _name(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The mix's, and no domain's.")],
    mix: Annotated[
        str | None, typer.Argument(metavar="[MIX]", help="[default: the default mix now]")
    ] = None,
) -> "NamedMix":
    """Let NAME stand for MIX wherever a mix is written."""
    return session.client.name_mix(name, mix)


@command("unname", changes=True)
def _unname(
    session: Session, name: Annotated[str, typer.Argument(metavar="NAME", help="The mix's.")]
) -> Shown:
    """Take the name of a mix away."""
    session.client.unname_mix(name)
    return Shown(f"no mix is named {name} any more", json={})


@command("names")
def _names(session: Session) -> Shown:
    """List the named mixes."""
    from superpose_client.screens import name_lines

    named = session.client.named_mixes()
    return Shown(name_lines(named), json={"named_mixes": named})


@command("analyze")
def _analyze(
    session: Session,
    mix: Annotated[
        str | None, typer.Argument(metavar="[MIX]", help="[default: the default mix]")
    ] = None,
) -> "Analysis":
    """Report how the domains of MIX interfere."""
    return session.client.analyze(mix)


@command("verify")
def _verify(session: Session) -> Shown:
    """Check that the weights are what they should be."""
    result = session.client.verify()
    fault = None if result.ok else "the weights are not what they should be"
    return Shown(result, json=result, fault=fault)


class TextFlags(TypedDict):
    """The `GenerateOptions` that a text depends on as flags; each goes out under its own name."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(_UINT32),
            help="[default: 64, or what the context leaves if that is less]",
        ),
    ]
    min_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", callback=within(_UINT32), help="[default: 0]")
    ]
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 is greedy. [default: 0]")
    ]
    top_k: Annotated[
        int | None, typer.Option(metavar="K", callback=within(_UINT32), help="[default: 0, off]")
    ]
    top_p: Annotated[float | None, typer.Option(metavar="P", help="[default: 1, off]")]
    min_p: Annotated[float | None, typer.Option(metavar="P", help="[default: 0, off]")]
    seed: Annotated[
        int | None, typer.Option(metavar="N", callback=within(_UINT64), help="[default: random]")
    ]
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text. May be repeated."),
    ]
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")
    ]
    repetition_penalty: Annotated[
        float | None,
        typer.Option(metavar="R", help="On tokens of prompt and answer. [default: 1, off]"),
    ]
    frequency_penalty: Annotated[
        float | None,
        typer.Option(metavar="F", help="On tokens of the answer, each time. [default: 0, off]"),
    ]
    presence_penalty: Annotated[
        float | None, typer.Option(metavar="F", help="On tokens of the answer. [default: 0, off]")
    ]


class GenerateFlags(TextFlags):
    """All of them."""

    logprobs: Annotated[
        bool | None, typer.Option("--logprobs", help="Show the log-probability of each token.")
    ]
    top_logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=within(_UINT32),
            help="Show those of the N likeliest tokens in each place, at most 20. [default: 0]",
        ),
    ]


@command("generate")
def _generate(
    session: Session,
    prompt: PromptArgument,
    mix: MixOption = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=BIAS", help="Add to a token's logit, -100 to 100. May be repeated."
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print the text as it is made. [default: stream, with --json no-stream]",
        ),
    ] = None,
    **options: Unpack[GenerateFlags],
) -> None:
    """Generate the text that follows PROMPT. Greedy unless --temperature is given."""
    _be_greedy_unless_told(options)
    text = _read_prompt(prompt)
    bias = _read_biases(logit_bias) if logit_bias else None
    arriving: Iterable[Generation | GenerationChunk]
    if stream if stream is not None else not session.json:
        arriving = session.client.stream(text, mix=mix, logit_bias=bias, **options)
    else:
        arriving = [session.client.generate(text, mix=mix, logit_bias=bias, **options)]
    session.print_text(arriving)


@command("compare")
def _compare(
    session: Session,
    prompt: PromptArgument,
    mix: Annotated[
        list[str], typer.Option("--mix", metavar="MIX", help="Of one text; two or more.")
    ],
    **options: Unpack[TextFlags],
) -> None:
    """Generate texts under several mixes, side by side.

    All with one seed, so that only the mix differs. Greedy unless --temperature is given.
    """
    from superpose_client.compare import compare

    if len(mix) < 2:
        raise typer.BadParameter("give two or more, each with --mix", param_hint="--mix")
    _be_greedy_unless_told(options)
    compare(session, _read_prompt(prompt), mix, **options)


@command("chat")
def _chat(session: Session, mix: MixOption = None, **options: Unpack[GenerateFlags]) -> None:
    """Talk with the base under a mix, line by line. Greedy unless --temperature is given.

    /help shows what else a line can do. A base without a chat template goes on with the text.
    """
    from superpose_client.chat import Chat

    _be_greedy_unless_told(options)
    Chat(session, mix, **options).run()


@command("score")
def _score(
    session: Session,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A text a line, or rows in JSON with question and answer, or text: one a line, or "
            "an array. May be gzipped. - is standard input.",
        ),
    ],
    mix: MixOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            callback=within(_UINT32),
            help="Tokens kept of each text. [default: the context length]",
        ),
    ] = None,
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="Tokens that count: all but the first, or the answer's."),
    ] = Scope.ALL,
) -> Shown:
    """Measure the perplexity of texts under a mix."""
    from superpose_client.errors import InvalidArgumentError
    from superpose_client.score_file import ScoreFileError, read_texts, with_places
    from superpose_client.screens import progress

    placed = read_texts(file)
    texts = [each.text for each in placed]
    try:
        with progress(len(texts), "texts") as advance:
            result = session.client.score(
                texts, mix=mix, max_length=max_length, scope=scope.value, progress=advance
            )
    except InvalidArgumentError as error:
        raise ScoreFileError(with_places(error.message, placed)) from error
    fault = None if result.tokens else "nothing to score: no text has a token that counts"
    return Shown(result, json=result, fault=fault)


@command("fit")
def _fit(
    session: Session,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="2 to 256 texts or rows in all, as for score; of several files each has losses "
            "of its own shown, too. - is standard input.",
        ),
    ],
    domains: Annotated[
        str, typer.Option("--domains", metavar="NAME,NAME", help="Whose weights; 1 to 8.")
    ],
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="Tokens that count: all but the first, or the answer's."),
    ] = Scope.ALL,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            metavar="N",
            callback=within(_UINT32),
            help="Tokens kept of each text. [default: the context length]",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            metavar="N",
            callback=within(_UINT32),
            help="Mixes that may be scored. [default: 20, and 10 for each domain]",
        ),
    ] = None,
    bounds: Annotated[
        str, typer.Option("--bounds", metavar="LOW,HIGH", help="Of each weight.")
    ] = "-1,2",
    penalty: Annotated[
        float | None,
        typer.Option(
            "--penalty",
            metavar="P",
            help="Nats a token for each unit of weight, towards few and small ones. "
            "[default: 0.01]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", callback=within(_UINT64), help="Of the search.")
    ] = 0,
    make_default: Annotated[
        bool, typer.Option("--set", help="Make what is found the default mix.")
    ] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Let NAME stand for what is found.")
    ] = None,
) -> None:
    """Find the weights of domains that lose least on texts.

    About a third of each file is held out, and tells what the weights are worth. Changes nothing,
    unless --set or --name is given.
    """
    from superpose_client.connection import addresses_of
    from superpose_client.errors import InvalidArgumentError
    from superpose_client.files_fitted import FilesFitted
    from superpose_client.score_file import ScoreFileError, read_texts, with_places

    # Before the search, which takes minutes.
    if (make_default or name is not None) and len(addresses_of(session.settings.server)) > 1:
        raise typer.BadParameter(
            "--set and --name are about one server: give one address", param_hint="--server"
        )
    low, high = _read_bounds(bounds)
    read = [read_texts(file) for file in files]
    placed = [each for texts in read for each in texts]
    try:
        with session.client.fit(
            [each.text for each in placed],
            [each.strip() for each in re.split("[,;]", domains)],
            max_length=max_length,
            scope=scope.value,
            budget=budget,
            low=low,
            high=high,
            penalty=penalty,
            seed=seed,
            sources=[number for number, texts in enumerate(read) for _ in texts],
        ) as updates:
            result = _follow_fit(updates)
    except InvalidArgumentError as error:
        raise ScoreFileError(with_places(error.message, placed)) from error
    # First of all, since it took its time and what follows may fail.
    session.show(Shown(FilesFitted(result, [each.file for each in placed]), json=result))
    if name is not None:
        session.show(session.client.name_mix(name, result.mix.weights))
    if make_default:
        state = session.client.set(result.mix.weights, expected_generation=result.mix.generation)
        replaced = state.digest != result.mix.digest
        fault = "an adapter was replaced during the fit: what is set now was not fitted"
        session.show(Shown(state, json=state, fault=fault if replaced else None))


@command("audit")
def _audit(
    session: Session,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            callback=within(_UINT32),
            help="At most. [default: 100]",
        ),
    ] = None,
) -> Shown:
    """List the newest changes that operators made, the latest last."""
    from superpose_client.screens import change_lines

    changes = session.client.changes(limit)
    return Shown(change_lines(changes), json={"changes": changes})


@command("health")
def _health(session: Session) -> Shown:
    """Succeed if the server takes requests; wait 5 s by default."""
    from superpose_client.channel import TEXTS

    # Of texts: the server as a whole is SERVING while its weights are damaged, as it lives.
    status = session.client.health(TEXTS, timeout=5 if session.settings.timeout is None else None)
    fault = None if status == "SERVING" else "the server does not take requests"
    return Shown(str(status), json={"status": status}, fault=fault)


def _be_greedy_unless_told(options: TextFlags) -> None:
    if options["temperature"] is None:
        options["temperature"] = 0.0


def _read_prompt(prompt: str) -> str:
    """Return a PROMPT, or what it stands for."""
    if prompt == "-":
        return sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    return prompt


def _read_bounds(bounds: str) -> tuple[float, float]:
    try:
        low, high = map(float, bounds.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{bounds!r} is no LOW,HIGH, as in -1,2", param_hint="--bounds"
        ) from None
    return low, high


def _follow_fit(updates: "Stream[FitUpdate]") -> "FitResult":
    """Return the result of a fit, with a bar until then."""
    from superpose_client.screens import progress

    update = next(updates)
    with progress(update.progress.budget if update.progress else 0, "mixes at most") as advance:
        while update.result is None:
            if update.progress:
                advance(update.progress.evaluations)
            update = next(updates)
        return update.result


def _read_biases(pairs: Iterable[str]) -> dict[int, float]:
    """Read ID=BIAS pairs; of an id that is named twice the last counts."""
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{pair!r} is no ID=BIAS, as in 50256=-100", param_hint="--logit-bias"
            ) from None
        if not 0 <= int(token) <= _UINT32:
            raise typer.BadParameter(f"no token has the id {token}", param_hint="--logit-bias")
    return biases


def main() -> None:
    """Run `adapterctl`."""
    _open_streams()
    # Its own lines would stand beside the one that says what went wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Generated text goes to terminals of any encoding.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except OSError as error:  # Of the help and the version: commands have said theirs.
        sys.exit(f"adapterctl: {error.strerror or error}")


def _open_streams() -> None:
    """Open what is closed of the standard streams, or the next socket would be taken for one.

    Exits where that is standard output: nobody would see a result, nor that it is lost.
    """
    closed = sys.stdout is None
    # In this order each gets its own number, the lowest that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # stays open
    if closed:
        sys.exit("adapterctl: standard output is closed: redirect it to /dev/null instead")


if __name__ == "__main__":
    main()
