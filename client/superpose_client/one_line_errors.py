"""How `adapterctl` fails: one line on standard error, and an exit status."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from superpose_client.common_options import Settings
from superpose_client.control_characters import without_control_characters

if TYPE_CHECKING:
    from superpose_client.errors import CallError


def fail(message: str, status: int = 1) -> NoReturn:
    """Exit with one line on standard error."""
    line = without_control_characters(" ".join(message.split()))
    typer.echo(f"adapterctl: {line}", err=True)
    raise typer.Exit(status)


@contextmanager
def one_line_errors(settings: Settings, changes: bool) -> Iterator[None]:
    """Turn what a command may run into, and no fault of its own, into a line and a status.

    `changes` is whether the command changes something.
    """
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
        fail(error.message, 2)
    except CallError as error:
        fail(_describe(error, settings, changes))
    except UnicodeError:
        fail("the text is not valid UTF-8")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except SuperposeError as error:
        fail(error.message)


def _describe(error: "CallError", settings: Settings, changes: bool) -> str:
    """Return the message of a failed call, with what its details tell beyond it."""
    from superpose_client import errors

    text, server = error.message, settings.server
    # Without a reason it is gRPC that speaks, not the server.
    if isinstance(error, errors.UnavailableError) and not error.reason:
        fault = _tls_fault(settings)
        text = fault or f"cannot reach a server at {server}; is superpose-server running? ({text})"
    elif isinstance(error, errors.DeadlineExceededError) and not error.reason:
        text = f"no answer from {server} in time; see --timeout ({text})"
        if changes:
            text += ". The change may still take place; look before you repeat it"
    elif isinstance(error, errors.UnauthenticatedError) and not settings.access()["token"]:
        text += "; give one by --token-file or SUPERPOSE_TOKEN"
    for violation in error.field_violations:
        if violation.description not in text:
            text += f"; {violation.field}: {violation.description}"
    return text


def _tls_fault(settings: Settings) -> str | None:
    from superpose_client.connection import addresses_of
    from superpose_client.tls_fault import tls_fault

    for address in addresses_of(settings.server):
        if fault := tls_fault(address, settings.access()):
            return f"no connection to {address}: {fault}"
    return None
