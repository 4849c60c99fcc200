"""GitBucket's REST API, spoken by the embedded git server too."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from airloom.errors import AuthError, ConflictError, NotFoundError, ServiceError, StorageFullError, UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    import requests

StatusState = Literal["pending", "success", "failure", "error"]

# What GitBucket takes; it answers 404 for more.
CONTEXT_CHARACTERS = 254
DESCRIPTION_CHARACTERS = 999
URL_CHARACTERS = 254

_ATTEMPTS = 5
_TIMEOUT_SECONDS = 15.0
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_ERRORS: dict[int, type[ServiceError | NotFoundError | ConflictError]] = {
    401: AuthError,
    403: AuthError,
    404: NotFoundError,
    408: UnavailableError,
    409: ConflictError,
    429: UnavailableError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
    507: StorageFullError,
}


class GitBucket:
    """Repositories, hooks, statuses and releases of one owner; safe to use from several threads.

    Args:
        base_url: of the server, without `/api/v3`.
        owner: of all repositories.
        page_url: where people find it, if that is another address.
    """

    def __init__(self, *, base_url: str, owner: str, user: str, password: str, page_url: str = "") -> None:
        self._base_url = base_url.rstrip("/")
        self._page_url = (page_url or base_url).rstrip("/")
        self._owner = owner
        self._user = user
        self._password = password
        self._local = threading.local()

    @classmethod
    def from_settings(cls, settings: Settings) -> GitBucket:
        """A client of this installation's git server, as the user who writes version tags."""
        return cls(
            base_url=settings.git_base_url,
            owner=settings.git_owner,
            user=settings.git_user,
            password=settings.secret("git_password"),
            page_url=settings.git_page_url,
        )

    # Addresses for people

    def repo_url(self, repo: str) -> str:
        """The repo's page."""
        return f"{self._page_url}/{_part(self._owner)}/{_part(repo)}"

    def commit_url(self, repo: str, sha: str) -> str:
        """The commit's page, with its statuses."""
        return f"{self.repo_url(repo)}/commit/{_part(sha)}"

    def tag_url(self, repo: str, tag: str) -> str:
        """The tag's page."""
        return f"{self.repo_url(repo)}/tree/{quote(tag, safe='/')}"

    # Repositories and hooks

    def ensure_repo(self, name: str, description: str = "") -> None:
        """Make the repository if it isn't there; what is there stays.

        Raises:
            AuthError, UnavailableError: the server refused or did not answer.
        """
        try:
            self._call("GET", self._repo(name))
        except NotFoundError:
            body = {"name": name, "description": description, "private": True, "auto_init": False}
            path = "user/repos" if self._owner == self._user else f"orgs/{_part(self._owner)}/repos"
            self._call("POST", path, json=body)

    def list_repos(self) -> list[dict[str, Any]]:
        """The owner's repositories as the API gives them: `name`, `full_name`, `description`, `clone_url` …"""
        if self._owner == self._user:
            found = self._call("GET", "user/repos")
        else:
            found = self._call("GET", f"users/{_part(self._owner)}/repos")
        return [repo for repo in found if repo["owner"]["login"] == self._owner]

    def ensure_hook(
        self, repo: str, url: str, secret: str, *, replaces: Callable[[str], bool] = lambda url: False
    ) -> None:
        """Send push events to `url`, as JSON signed with `secret`; a hook with that URL is brought up to date.

        Args:
            replaces: says of another hook's URL whether this one takes its place, so that it is removed.

        Raises:
            NotFoundError: no such repo.
        """
        body = {
            "name": "web",
            # Without a content type GitBucket sends forms, which receivers of JSON refuse.
            "config": {"url": url, "content_type": "json", "insecure_ssl": "0", "secret": secret},
            "events": ["push"],
        }
        path = f"{self._repo(repo)}/hooks"
        # GitBucket's database throws at a second hook with one URL, so look first.
        there = list(self._call("GET", path))
        same = [hook for hook in there if hook["config"]["url"] == url]
        if same:
            # Its secret isn't shown: write it again.
            self._call("PATCH", f"{path}/{same[0]['id']}", json={**body, "add_events": [], "remove_events": []})
        else:
            self._call("POST", path, json=body, repeat=False)
        for hook in there:
            if hook not in same and replaces(hook["config"]["url"]):
                self._call("DELETE", f"{path}/{hook['id']}")

    def hooks(self, repo: str) -> list[dict[str, Any]]:
        """The repo's hooks as the API gives them, without their secrets."""
        return list(self._call("GET", f"{self._repo(repo)}/hooks"))

    # Statuses, tags, releases

    def set_status(
        self,
        repo: str,
        sha: str,
        *,
        state: StatusState,
        context: str,
        description: str = "",
        target_url: str | None = None,
    ) -> None:
        """Say on a commit's page how it fared; the status before in the same context is replaced.

        Texts that are too long for GitBucket are cut; an address that is too long is left out.

        Raises:
            NotFoundError: no such repo or commit.
        """
        body: dict[str, Any] = {
            "state": state,
            "context": _cut(context, CONTEXT_CHARACTERS),
            "description": _cut(description, DESCRIPTION_CHARACTERS),
        }
        if target_url and target_url.startswith(("http://", "https://")) and len(target_url) <= URL_CHARACTERS:
            body["target_url"] = target_url
        self._call("POST", f"{self._repo(repo)}/statuses/{_part(sha)}", json=body)

    def statuses(self, repo: str, sha: str) -> list[dict[str, Any]]:
        """A commit's statuses as the API gives them: `state`, `context`, `description`, `target_url` …

        Raises:
            NotFoundError: no such repo or commit.
        """
        return list(self._call("GET", f"{self._repo(repo)}/commits/{_part(sha)}/statuses"))

    def tags(self, repo: str) -> list[str]:
        """Names of the repo's tags."""
        return [str(tag["ref"]).removeprefix("refs/tags/") for tag in self._call("GET", f"{self._repo(repo)}/tags")]

    def create_release(self, repo: str, tag: str, name: str, body: str = "") -> None:
        """Publish a tag with a name and a text in Markdown; a release of that tag stays as it is.

        Raises:
            NotFoundError: no such repo.
        """
        path = f"{self._repo(repo)}/releases"
        # Tags have slashes, which the address of a single release doesn't take.
        if any(release["tag_name"] == tag for release in self._call("GET", path)):
            return
        self._call("POST", path, json={"tag_name": tag, "name": name, "body": body}, repeat=False)

    def releases(self, repo: str) -> list[dict[str, Any]]:
        """The repo's releases as the API gives them: `tag_name`, `name`, `body`, `author` …"""
        return list(self._call("GET", f"{self._repo(repo)}/releases"))

    # Calls

    def _repo(self, repo: str) -> str:
        return f"repos/{_part(self._owner)}/{_part(repo)}"

    def _session(self) -> requests.Session:
        import requests

        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth = (self._user, self._password)
            # A proxy of the environment doesn't lead to this machine's own services.
            session.trust_env = urlsplit(self._base_url).hostname not in _LOCAL_HOSTS
        return session

    def _call(self, method: str, path: str, *, json: Mapping[str, Any] | None = None, repeat: bool = True) -> Any:
        import tenacity

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            stop=tenacity.stop_after_attempt(_ATTEMPTS if repeat else 1),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=4),
            reraise=True,
        )
        return attempts(self._call_once, method, path, json)

    def _call_once(self, method: str, path: str, json: Mapping[str, Any] | None) -> Any:
        import requests

        url = f"{self._base_url}/api/v3/{path}"
        try:
            answer = self._session().request(method, url, json=json, timeout=_TIMEOUT_SECONDS)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise UnavailableError(
                f"the git server at {self._base_url} did not answer: {error}", hint="see: airloom status"
            ) from error
        if answer.ok:
            try:
                return answer.json() if answer.content else None
            except ValueError as error:
                raise ServiceError(f"{method} {url} gave no JSON: {answer.text[:200]!r}") from error
        raise status_error(answer.status_code, f"{method} {url}", answer.text)


def status_error(code: int, what: str, text: str) -> ServiceError | NotFoundError | ConflictError:
    """The error that fits an HTTP status."""
    kind = _ERRORS.get(code, ServiceError)
    hint = "the secret git_password is not what the git server expects" if kind is AuthError else None
    return kind(f"{what}: {code} {text.strip()[:300]}".rstrip(), hint=hint)


def _part(text: str) -> str:
    return quote(text, safe="")


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
