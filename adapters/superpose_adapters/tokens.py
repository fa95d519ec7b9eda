"""Bearer tokens: who may call a server, and the file that says so.

The file holds no token, only its SHA-256. That a fast hash is enough, without salt: a token is 256
random bits, so there is nothing to guess that a slow hash would make dearer, as there is with
passwords; and a server hashes at every call.

    {"format": 1, "tokens": {"ci": {"sha256": "5e88...", "scope": "inference", "rate": 60}}}

`adapterctl token` writes the file and the server reads it, so this lies in the package below both,
like `mix_syntax`, and needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from superpose_adapters.durable import replacing
from superpose_adapters.mix_syntax import check_name
from superpose_adapters.strict_json import StrictJsonError, read_object, shorten

MOST_TOKENS = 1000
ANONYMOUS = "anonymous"
"""Who calls a server that asks for no token; so no token has this name."""

_FORMAT = 1
_MOST_BYTES = 4 << 20
# So that scanners for leaked secrets know one when they see it.
_PREFIX = "superpose_"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"sha256", "scope", "expires", "rate", "concurrency", "domains"}


class Scope(StrEnum):
    """What a token is good for; `admin` is good for everything."""

    INFERENCE = "inference"
    ADMIN = "admin"

    def covers(self, needed: Scope) -> bool:
        """Return whether a token of this scope may do what needs the other."""
        return self is Scope.ADMIN or self is needed


class TokenFileError(ValueError):
    """A file of tokens cannot be used; one line that names it and the remedy."""


@dataclass(frozen=True)
class Token:
    """What a file holds of one token.

    Attributes:
        name: Of the token, for people and for the record of changes.
        sha256: Of the token itself, in hex.
        scope: What it is good for.
        expires: When it ends; None: never.
        rate: Calls a minute; None: any number.
        concurrency: Calls under way at once; None: any number.
        domains: What its mixes may hold; None: any domain.

    Raises:
        ValueError: A value that means nothing; the message goes on after the token's name.
    """

    name: str
    sha256: str
    scope: Scope
    expires: datetime | None = None
    rate: int | None = None
    concurrency: int | None = None
    domains: frozenset[str] | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if check_name(self.name) == ANONYMOUS:
            raise ValueError(f"{ANONYMOUS!r} is who calls without a token: choose another name")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 is not 64 digits of a-f and 0-9: make the token anew")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError(f"expires is {self.expires}, without a time zone: end it with Z")
        for name in ("rate", "concurrency"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {shorten(value)}: use a whole number from 1 on")
        if self.domains is None:
            return
        if self.scope is Scope.ADMIN:
            raise ValueError("domains bind no admin, who may push any adapter: leave them out")
        for domain in self.domains:
            check_name(domain)

    def expired(self, now: datetime) -> bool:
        """Return whether the token has ended."""
        return self.expires is not None and self.expires <= now


def sha256_of(secret: str) -> str:
    """Return what a file keeps of a token."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    """Return a new token: 256 random bits in 43 characters, behind a prefix that says whose."""
    return _PREFIX + secrets.token_urlsafe(32)


def find_token(tokens: Iterable[Token], secret: str) -> Token | None:
    """Return the token that `secret` is.

    All are compared, each to its end, so that the time tells nothing of those that are there.
    """
    found = None
    digest = sha256_of(secret)
    for token in tokens:
        if hmac.compare_digest(token.sha256, digest):
            found = token
    return found


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Return the tokens of a file, in ascending order of name.

    Raises:
        TokenFileError: It cannot be read, others than its owner may write it, or it is no file of
            tokens.
    """
    try:
        with path.open("rb") as file:
            # Of the file that is read, whatever takes its name meanwhile.
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TokenFileError(
            f"token file {path} cannot be read ({error.strerror}): make one with adapterctl token "
            f"new NAME --tokens {path}"
        ) from error
    # Windows has no such bits, and shows the owner's in their place.
    if os.name == "posix" and mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TokenFileError(
            f"token file {path} may be written by others than its owner, who could let anybody in: "
            f"chmod go-w {path}"
        )
    if len(text) > _MOST_BYTES:
        raise TokenFileError(f"token file {path} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return _parse(text)
    except ValueError as error:
        raise TokenFileError(
            f"token file {path}: {error}; mend it, or revoke and make the token again with "
            "adapterctl token"
        ) from error


def _parse(text: bytes) -> tuple[Token, ...]:
    try:
        body = read_object(text)
    except StrictJsonError as error:
        raise ValueError(f"it {error}") from error
    if set(body) != {"format", "tokens"} or not isinstance(body["tokens"], dict):
        raise ValueError('it is no object of "format" and "tokens"')
    if body["format"] != _FORMAT:
        raise ValueError(f"it has format {shorten(body['format'])}, not {_FORMAT}")
    if len(body["tokens"]) > MOST_TOKENS:
        raise ValueError(f"it holds {len(body['tokens'])} tokens: keep at most {MOST_TOKENS}")
    tokens = []
    for name, fields in sorted(body["tokens"].items()):
        try:
            tokens.append(_token(name, fields))
        except ValueError as error:
            raise ValueError(f"token {shorten(name)}: {error}") from error
    return tuple(tokens)


def _token(name: str, fields: Any) -> Token:
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    surplus = sorted(set(fields) - _FIELDS)
    if surplus:
        # It may be a bound that this version does not keep.
        raise ValueError(f"{shorten(surplus[0])} is not known")
    for needed in ("sha256", "scope"):
        if not isinstance(fields.get(needed), str):
            raise ValueError(f"{needed} is missing, or no text")
    if fields["scope"] not in list(Scope):
        raise ValueError(f"scope is {shorten(fields['scope'])}: use {' or '.join(Scope)}")
    domains = fields.get("domains")
    if domains is not None:
        if not isinstance(domains, list) or not all(isinstance(each, str) for each in domains):
            raise ValueError(f"domains is {shorten(domains)}: use a list of names")
        domains = frozenset(domains)
    return Token(
        name,
        fields["sha256"],
        Scope(fields["scope"]),
        _time(fields.get("expires")),
        fields.get("rate"),
        fields.get("concurrency"),
        domains,
    )


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"expires is {shorten(value)}: use a time such as 2030-01-31T12:00:00Z"
        ) from None


def format_time(time: datetime) -> str:
    """Return a time as this file and the record of changes have it: to the second, in UTC."""
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@contextmanager
def editing(path: Path) -> Iterator[dict[str, Token]]:
    """Yield the tokens of a file by name; what is in the mapping afterwards is what the file holds.

    A reader sees the old file or the new one. Where there is none it is made, for its owner alone;
    else owner and permissions stay as they are.

    Raises:
        TokenFileError: As `read_tokens`; or another process edits the file.
        OSError: It cannot be written; it is as it was.
    """
    path = path.resolve()  # A link stays one.
    lock = path.with_name(f".{path.name}.lock")
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise TokenFileError(
            f"token file {path} is being edited by somebody else: try again, or remove {lock} if "
            "nobody is"
        ) from None
    try:
        before = path.stat() if path.exists() else None
        tokens = {token.name: token for token in read_tokens(path)} if before else {}
        yield tokens
        if len(tokens) > MOST_TOKENS:
            raise TokenFileError(
                f"token file {path} holds {MOST_TOKENS} tokens, which is the most: revoke one first"
            )
        with replacing(path) as fresh:
            # Made for its owner alone, and then as open as it was.
            fresh.touch(mode=0o600)
            fresh.write_text(_format(tokens))
            if before is not None:
                if hasattr(os, "chown"):
                    os.chown(fresh, before.st_uid, before.st_gid)
                fresh.chmod(stat.S_IMODE(before.st_mode))
    finally:
        lock.unlink()


def _format(tokens: Mapping[str, Token]) -> str:
    body = {name: _fields(token) for name, token in sorted(tokens.items())}
    return json.dumps({"format": _FORMAT, "tokens": body}, indent=1) + "\n"


def _fields(token: Token) -> dict[str, Any]:
    fields = {
        "sha256": token.sha256,
        "scope": str(token.scope),
        "expires": None if token.expires is None else format_time(token.expires),
        "rate": token.rate,
        "concurrency": token.concurrency,
        "domains": None if token.domains is None else sorted(token.domains),
    }
    return {name: value for name, value in fields.items() if value is not None}
