"""HTTP basic authentication of two users; nobody is let in without it."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

REALM = 'Basic realm="Airloom git", charset="UTF-8"'


class BasicAuth:
    """Refuses requests without a user's password, and puts the user's name into the scope as `user_name`.

    Args:
        open_paths: that check who calls by other means, or have nothing to hide.
    """

    def __init__(self, app: ASGIApp, *, passwords: Mapping[str, str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._passwords = {name: password.encode() for name, password in passwords.items()}
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        user = self.user_of(dict(scope["headers"]).get(b"authorization", b""))
        if user is None:
            refusal = PlainTextResponse(
                "wrong user or password\n", status_code=401, headers={"WWW-Authenticate": REALM}
            )
            await refusal(scope, receive, send)
            return
        await self._app({**scope, "user_name": user}, receive, send)

    def user_of(self, header: bytes) -> str | None:
        """The user whose name and password the header carries."""
        kind, _, encoded = header.partition(b" ")
        if kind.lower() != b"basic":
            return None
        try:
            name, colon, password = base64.b64decode(encoded, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return None
        # Every user is compared, so that the time taken tells neither names nor passwords.
        matched = None
        for user, expected in self._passwords.items():
            same_password = hmac.compare_digest(password, expected)
            same_name = hmac.compare_digest(name, user.encode())
            if colon and same_password and same_name:
                matched = user
        return matched
