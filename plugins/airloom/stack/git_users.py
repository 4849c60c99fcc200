"""GitBucket's users: the administrator, who writes for Airloom, and the end of root/root.

Airloom's own git server knows its users from the secrets, and has no root: there nothing is to be done.
"""

from __future__ import annotations

from typing import Any

from airloom.errors import AuthError, ServiceError, UnavailableError
from airloom.settings import Settings

_FIRST_USER = ("root", "root")


def ensure_git_users(settings: Settings, *, timeout_seconds: float = 15.0) -> str:
    """Make the user `git_user` an administrator and suspend root; what there is to say of it.

    Raises:
        AuthError: neither the user nor root/root is let in.
        ServiceError, UnavailableError: the server refused or did not answer.
    """
    import requests

    base = f"{settings.git_base_url}/api/v3"
    own = (settings.git_user, settings.secret("git_password"))
    with requests.Session() as session:
        session.trust_env = False

        def call(method: str, path: str, auth: tuple[str, str], **body: Any) -> requests.Response:
            try:
                return session.request(method, f"{base}/{path}", auth=auth, timeout=timeout_seconds, json=body or None)
            except requests.RequestException as error:
                raise UnavailableError(f"the git server at {settings.git_base_url} does not answer: {error}") from error

        def let_in(auth: tuple[str, str]) -> bool:
            answer = call("GET", "user", auth)
            if answer.status_code not in {200, 401, 403}:  # neither let in nor refused: nothing is known
                raise ServiceError(
                    f"the git server at {settings.git_base_url} cannot say who {auth[0]!r} is: "
                    f"{answer.status_code} {answer.text[:300]}",
                    hint="see: airloom logs gitbucket",
                )
            return answer.status_code == 200

        made = False
        if not let_in(own):
            answer = call(
                "POST",
                "admin/users",
                _FIRST_USER,
                login=own[0],
                password=own[1],
                email="airloom@localhost",
                fullName="Airloom",
                isAdmin=True,
            )
            if answer.status_code in {401, 403}:
                raise AuthError(
                    f"the git server refuses the user {own[0]!r}, and root/root, who could make it, is refused too",
                    hint="set that user's password to the secret git_password in GitBucket's administration",
                )
            if not answer.ok:
                raise ServiceError(f"the user {own[0]!r} could not be made: {answer.status_code} {answer.text[:300]}")
            made = True
        if let_in(_FIRST_USER):
            answer = call("PUT", "users/root/suspended", own)
            if not answer.ok:
                raise ServiceError(f"root/root could not be closed: {answer.status_code} {answer.text[:300]}")
            return f"{own[0]}{' made' if made else ''}, root/root closed"
    return f"{own[0]}, root/root is closed"
