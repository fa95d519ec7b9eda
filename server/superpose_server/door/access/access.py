"""Who may call: the one place where each door asks before it reads or does anything."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from datetime import UTC, datetime
from pathlib import Path

from superpose_adapters.tokens import Scope, Token, TokenFileError, find_token, read_tokens
from superpose_server.caller import Caller, set_caller
from superpose_server.door.access.limits import Use
from superpose_server.door.reread import Reread
from superpose_server.errors import PermissionDenied, StartupError, Unauthenticated


class Access:
    """Tokens are those of a file, which is read again when it changes.

    A call is judged when it begins: one that runs goes on, whatever becomes of its token.
    """

    def __init__(
        self, file: Path | None, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Ask for the tokens of `file`; None: anybody may call everything.

        Raises:
            StartupError: The file cannot be used.
        """
        self._now = now
        self._serves_admin = True
        self._used: dict[str, Use] = {}
        self._tokens: Reread[tuple[Token, ...]] | None = None
        if file is not None:
            try:
                self._tokens = Reread("tokens", [file], lambda: read_tokens(file))
            except TokenFileError as error:
                raise StartupError(str(error)) from error

    def without_admin(self) -> Access:
        """Return the same, of one account with this, where no call of scope admin is served."""
        other = copy(self)
        other._serves_admin = False
        return other

    def check(self, authorization: str | None, need: Scope | None) -> Token | None:
        """Return the token of a call; None where none is asked for.

        Args:
            authorization: What the call was sent with under this name, if anything.
            need: The scope that the call needs; None: it is open to anybody.

        Raises:
            Unauthenticated: There is no token, or none that is known, or it has expired.
            PermissionDenied: The token is not for such calls, or they are served elsewhere.
        """
        token = self._token(authorization, need)
        if need is Scope.ADMIN and not self._serves_admin:
            raise PermissionDenied(
                "this call is served at the server's admin address alone, over gRPC: ask there",
                "ADMIN_ELSEWHERE",
            )
        return token

    def _token(self, authorization: str | None, need: Scope | None) -> Token | None:
        if self._tokens is None or need is None:
            return None
        tokens = self._tokens.get()
        if authorization is None:
            raise Unauthenticated(
                "this server asks for a token: send authorization: Bearer TOKEN", "TOKEN_MISSING"
            )
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated(
                "authorization holds no token: send authorization: Bearer TOKEN", "TOKEN_MISSING"
            )
        token = find_token(tokens, secret.strip())
        if token is None:
            raise Unauthenticated(
                "this token is not known here: it was revoked, is another server's, or is not "
                "whole",
                "TOKEN_UNKNOWN",
            )
        if token.expired(self._now()):
            raise Unauthenticated(
                f"token {token.name} has expired: ask for a new one", "TOKEN_EXPIRED"
            )
        if not token.scope.covers(need):
            raise PermissionDenied(
                f"token {token.name} has scope {token.scope}, and this call needs {need}",
                "SCOPE_MISSING",
            )
        return token

    def begin(self, token: Token | None, peer: str) -> Callable[[], None]:
        """Begin a call that may be made, and say whose it is; return what to call at its end.

        Args:
            token: What `check` returned.
            peer: Where the call came from.

        Raises:
            RateLimited: The token has been used as much as it may be.
        """
        if token is None:
            set_caller(Caller(peer=peer))
            return lambda: None
        # By what is the token's own: another one may be made under its name.
        end = self._used.setdefault(token.sha256, Use()).begin(token)
        set_caller(Caller(token.name, peer, token.domains))
        return end
