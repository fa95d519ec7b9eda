"""`adapterctl token`: the file of tokens that a server lets calls in with.

A local file, which the server reads again when it changes; no server is asked.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from superpose_adapters.tokens import (
    Scope,
    Token,
    TokenFileError,
    editing,
    format_time,
    new_secret,
    read_tokens,
    sha256_of,
)
from superpose_client.one_line_errors import fail

# As `superpose-server` reads it.
_VARIABLE = "SUPERPOSE_TOKENS"
_PERIOD = re.compile(r"([1-9][0-9]{0,4})([dh])")

app = typer.Typer(
    name="token",
    help="Make, list and revoke the tokens of a server, in a local file.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FileOption = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="FILE", help=f"The file. [default: {_VARIABLE}]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The token's, for the record.")]


def _several(value: str | None) -> frozenset[str] | None:
    return None if value is None else frozenset(filter(None, map(str.strip, value.split(","))))


def _moment(value: str | None) -> datetime | None:
    """Return the moment that 30d, 12h, a date or a time means."""
    if value is None:
        return None
    period = _PERIOD.fullmatch(value)
    if period:
        count = int(period[1])
        hours = count * 24 if period[2] == "d" else count
        return datetime.now(UTC).replace(microsecond=0) + timedelta(hours=hours)
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise typer.BadParameter(
            f"{value!r} is no 30d, 12h, 2030-01-31 or 2030-01-31T12:00Z", param_hint="--expires"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@app.command("new")
def _new(
    context: typer.Context,
    name: NameArgument,
    scope: Annotated[
        Scope, typer.Option("--scope", help="inference: texts and scores; admin: everything.")
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="30d, 12h, or a date, as it begins in UTC. [default: never]"
        ),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(metavar="N", help="Calls a minute. [default: any number]")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Calls at once. [default: any number]")
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="What its mixes may hold; '' for the base alone. [default: any domain]",
        ),
    ] = None,
    tokens: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token, and print it: the one time that it is seen."""
    path, secret = _file(tokens), new_secret()
    with _one_line():
        token = Token(
            name, sha256_of(secret), scope, _moment(expires), rate, concurrency, _several(domains)
        )
        with editing(path) as held:
            if name in held:
                raise TokenFileError(f"there is a token {name} already: revoke it first")
            held[name] = token
    if _wants_json(context, as_json):
        typer.echo(json.dumps({**_fields(token), "token": secret}))
        return
    typer.echo(secret)
    # Not where a script reads the token.
    typer.echo("Keep it now: the file holds only its hash, and it is not shown again.", err=True)


@app.command("list")
def _list(context: typer.Context, tokens: FileOption = None, as_json: JsonOption = False) -> None:
    """List the tokens of the file, which does not hold themselves."""
    with _one_line():
        held = read_tokens(_file(tokens))
    if _wants_json(context, as_json):
        typer.echo(json.dumps({"tokens": [_fields(token) for token in held]}))
        return
    for token in held:
        typer.echo(_line(token, datetime.now(UTC)))


@app.command("revoke")
def _revoke(
    context: typer.Context,
    name: NameArgument,
    tokens: FileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a token out of the file: from now on no call begins with it."""
    with _one_line(), editing(_file(tokens)) as held:
        if held.pop(name, None) is None:
            raise TokenFileError(f"there is no token {name[:80]!r}: see adapterctl token list")
    typer.echo("{}" if _wants_json(context, as_json) else f"revoked {name}")


def _file(given: Path | None) -> Path:
    named = given or os.environ.get(_VARIABLE)
    if not named:
        raise typer.BadParameter(
            f"name the file that the server has, here or in {_VARIABLE}", param_hint="--tokens"
        )
    return Path(named)


def _wants_json(context: typer.Context, here: bool) -> bool:
    return here or bool(context.obj["as_json"])  # What stands before the command; see `cli`.


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # TokenFileError is one.
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")


def _fields(token: Token) -> dict[str, Any]:
    return {
        "name": token.name,
        "scope": str(token.scope),
        "expires": None if token.expires is None else format_time(token.expires),
        "rate": token.rate,
        "concurrency": token.concurrency,
        "domains": None if token.domains is None else sorted(token.domains),
    }


def _line(token: Token, now: datetime) -> str:
    words = [f"{token.name:<20} {token.scope:<9}"]
    if token.expires is None:
        words.append("never expires")
    else:
        state = "expired" if token.expired(now) else "expires"
        words.append(f"{state} {format_time(token.expires)}")
    if token.rate is not None:
        words.append(f"{token.rate} calls a minute")
    if token.concurrency is not None:
        words.append(f"{token.concurrency} at once")
    if token.domains is not None:
        words.append(f"domains {', '.join(sorted(token.domains)) or 'none'}")
    return "  ".join(words)
