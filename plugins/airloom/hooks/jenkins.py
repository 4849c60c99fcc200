"""Where Jenkins takes push events: the endpoint of its plugin generic-webhook-trigger.

Nothing else of Jenkins is called: its jobs and credentials come with its image and its configuration as code.
"""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from airloom.settings import Settings

HOOK_PATH = "/generic-webhook-trigger/invoke"
TOKEN_SECRET = "jenkins_hook_token"  # noqa: S105 - a name


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
