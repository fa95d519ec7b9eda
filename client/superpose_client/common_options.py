"""The options that all commands of `adapterctl` take, and what they and the environment come to."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Unpack

import typer

if TYPE_CHECKING:
    from superpose_client.access import Access

# The default of the client, which is not imported for the help.
DEFAULT_SERVER = "127.0.0.1:50051"


def within(most: float) -> Callable[[float | None], float | None]:
    """Return a check of an option's value. Typer's own would print the bounds in the help."""

    def check(value: float | None) -> float | None:
        if value is not None and not 0 <= value <= most:
            raise typer.BadParameter(f"{value} is not between 0 and {most}")
        return value

    return check


class CommonOptions(TypedDict):
    """They stand before a command or behind it; behind it counts."""

    server: Annotated[
        str | None,
        typer.Option(
            metavar="ADDR",
            help="Address of the server; for texts several, with commas. "
            f"[default: SUPERPOSE_SERVER, or {DEFAULT_SERVER}]",
        ),
    ]
    as_json: Annotated[bool | None, typer.Option("--json", help="Print JSON, one object a line.")]
    timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=within(math.inf),
            help="Longest wait for an answer. [default: 60, 600 for calls that compute, none for "
            "streams]",
        ),
    ]


class AccessOptions(TypedDict):
    """So do these, which the help of the commands leaves out: they mostly come from elsewhere."""

    # A token itself would be seen by all who can list processes.
    token_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="File that holds the token. [default: SUPERPOSE_TOKEN, a token]"
        ),
    ]
    ca: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Encrypt; the server's certificate must be of these authorities, in PEM. "
            "[default: SUPERPOSE_CA]",
        ),
    ]
    tls: Annotated[
        bool | None, typer.Option("--tls", help="Encrypt; it must be of a public authority.")
    ]
    cert: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Your own certificate, in PEM. [default: SUPERPOSE_CERT]"
        ),
    ]
    key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its key. [default: SUPERPOSE_KEY]")
    ]
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Send the token even where it can be read on the way."),
    ]


class AllOptions(CommonOptions, AccessOptions):
    """Both."""


@dataclass(frozen=True)
class Settings:
    """What a command goes by. `timeout` is None where the user gave none."""

    server: str
    json: bool
    timeout: float | None
    token_file: str | None
    ca: str | None
    tls: bool
    cert: str | None
    key: str | None
    insecure: bool

    def access(self) -> "Access":
        """Return the client's options of access.

        Raises:
            OSError: The token's file cannot be read.
            UnicodeError: It is no text.
        """
        # Empty is as good as absent, as with all variables.
        token = os.environ.get("SUPERPOSE_TOKEN") or None
        if self.token_file is not None:
            token = Path(self.token_file).read_text().strip()
        return {
            "token": token,
            "ca": self.ca,
            "tls": self.tls,
            "certificate": self.cert,
            "key": self.key,
            "insecure": self.insecure,
        }


def settings_of(before: AllOptions, **behind: Unpack[AllOptions]) -> Settings:
    """Return what the options before a command, those behind it and the environment come to."""
    told = {name: value for name, value in behind.items() if value is not None}
    given: dict[str, Any] = {**before, **told}

    def text(option: str, variable: str) -> str | None:
        return given[option] or os.environ.get(variable) or None

    return Settings(
        server=text("server", "SUPERPOSE_SERVER") or DEFAULT_SERVER,
        json=bool(given["as_json"]),
        timeout=given["timeout"],
        token_file=given["token_file"],
        ca=text("ca", "SUPERPOSE_CA"),
        tls=bool(given["tls"]),
        cert=text("cert", "SUPERPOSE_CERT"),
        key=text("key", "SUPERPOSE_KEY"),
        insecure=bool(given["insecure"]),
    )
