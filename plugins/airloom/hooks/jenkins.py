"""What of Jenkins is called, by its plugins: generic-webhook-trigger takes push events, and configuration-as-code reads
its configuration anew, jobs with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from airloom.errors import AuthError, ServiceError, UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    import requests

ADMIN_USER = "admin"
HOOK_PATH = "/generic-webhook-trigger/invoke"
CRUMB_PATH = "/crumbIssuer/api/json"
RELOAD_PATH = "/configuration-as-code/reload"
TOKEN_SECRET = "jenkins_hook_token"  # noqa: S105 - a name
_SECONDS = 120.0


def hook_url(settings: Settings) -> str:
    """The address for a git server's hook. It holds the token that chooses the jobs: not for logs.

    Raises:
        ConfigError: the secret is missing.
    """
    token = quote(settings.secret(TOKEN_SECRET), safe="")
    return f"{settings.jenkins_url.rstrip('/')}{HOOK_PATH}?token={token}"


def is_hook_url(url: str) -> bool:
    """Whether an address is Jenkins' endpoint, whatever its host and token."""
    return urlsplit(url).path.endswith(HOOK_PATH)


def reload(settings: Settings, url: str) -> None:
    """Have Jenkins read its configuration as code anew; builds go on.

    Args:
        url: where Jenkins answers.

    Raises:
        AuthError: it refuses the administrator's password.
        UnavailableError: it does not answer.
        ServiceError: it could not read its configuration.
    """
    import requests

    url = url.rstrip("/")
    with requests.Session() as session:
        session.trust_env = False
        session.auth = (ADMIN_USER, settings.secret("admin_password"))
        try:
            # A password, unlike a token, needs a crumb, which counts for the session that it was given in.
            crumb = _good(session.get(f"{url}{CRUMB_PATH}", timeout=_SECONDS), 200).json()
            headers = {str(crumb["crumbRequestField"]): str(crumb["crumb"])}
            answer = session.post(f"{url}{RELOAD_PATH}", headers=headers, timeout=_SECONDS, allow_redirects=False)
        except requests.ConnectionError as error:
            raise UnavailableError(
                f"Jenkins at {url} does not answer: {error}", hint="see: airloom logs jenkins"
            ) from error
        except (requests.RequestException, ValueError, KeyError) as error:
            raise ServiceError(f"Jenkins at {url} gave no crumb: {error}") from error
    # Where all went well it leads back to its page; an error is a page, of whatever status.
    _good(answer, 302)


def _good(answer: requests.Response, status: int) -> requests.Response:
    if answer.status_code == status:
        return answer
    path = urlsplit(answer.url).path
    if answer.status_code in {401, 403}:
        raise AuthError(
            f"Jenkins refuses {ADMIN_USER!r} at {path}: {answer.status_code}",
            hint="the secret admin_password differs from Jenkins': it reads that when it starts",
        )
    raise ServiceError(
        f"Jenkins answered {answer.status_code} at {path}, not {status}", hint="its log says why: airloom logs jenkins"
    )
