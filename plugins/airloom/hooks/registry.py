"""An image registry by its HTTP API: Docker Hub, or any that speaks the Distribution specification."""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import parse_http_list, parse_keqv_list

from airloom.errors import AirloomError, AuthError, NotFoundError, ServiceError, UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    import requests

# Every kind that a build or a mirror may have pushed; a registry turns down a request for others as not found.
MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_HUB_NAMES = frozenset({"", "docker.io", "index.docker.io", "registry-1.docker.io"})
_HUB = "https://registry-1.docker.io"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ATTEMPTS = 4
_TIMEOUT_SECONDS = 20.0
_TOKEN_SECONDS = 60.0  # what a token lasts when its issuer does not say
_PAGE = 1000
_OTHER_NAME = "does it run? from here its address may be another one than the engine's: AIRLOOM_REGISTRY_URL"
_LOG_IN = "set AIRLOOM_REGISTRY_USER, and write the password into the secret registry_password"


def find_image(settings: Settings, name: str, reference: str) -> str | None:
    """Digest of an image in the installation's registry; None when that has none that this user may read.

    Args:
        name: with the registry, as the engine takes it: `127.0.0.1:5050/airloom/ds_mlmodeling`.
        reference: a tag or a digest.

    Raises:
        AuthError, UnavailableError, ServiceError: as `Registry.digest_of`.
    """
    host = settings.registry.strip("/").partition("/")[0]
    if not host or not name.startswith(f"{host}/"):
        return None
    try:
        return Registry(settings, settings.registry_url or host).digest_of(name.removeprefix(f"{host}/"), reference)
    except HiddenError:
        return None


class Registry:
    """Reads what one registry holds.

    Talks plain HTTP to this machine and to names without a dot, which only a container network knows, as the engine
    does for loopback addresses; HTTPS to all others. An address with a scheme is taken as it is.

    Args:
        host: `localhost:5050`, `docker.io`, or `https://registry.example.org`.
    """

    def __init__(self, settings: Settings, host: str) -> None:
        self.host = host.partition("://")[2].strip("/") if "://" in host else host.strip("/")
        self._base_url = _base_url(host)
        self._settings = settings
        self._session: requests.Session | None = None  # not for several threads at once
        self._basic = False
        self._tokens: dict[str, tuple[str, float]] = {}

    def digest_of(self, repository: str, reference: str) -> str | None:
        """Digest of the manifest that a tag or a digest names; None when the registry has none.

        Args:
            repository: without the registry: `airloom/ds_mlmodeling`.

        Raises:
            AuthError: the registry refuses the user, or wants one.
            UnavailableError: it does not answer, or counts too many requests.
            ServiceError: it answered with something else.
        """
        name, what = self._name(repository), f"{repository}:{reference}"
        url = f"{self._base_url}/v2/{name}/manifests/{quote(reference, safe=':')}"
        try:
            answer = self._get(url, what, f"repository:{name}:pull", method="HEAD")
            digest = answer.headers.get("Docker-Content-Digest", "")
            if not digest:  # optional there
                answer = self._get(url, what, f"repository:{name}:pull")
                digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
        except NotFoundError:
            return None
        if not _DIGEST.fullmatch(digest):
            raise ServiceError(f"the registry {self.host} gave {repository}:{reference} the digest {digest!r}")
        return digest

    def exists(self, repository: str, reference: str) -> bool:
        """Whether the registry has the tag or digest; raises as `digest_of` does."""
        return self.digest_of(repository, reference) is not None

    def tags(self, repository: str) -> list[str]:
        """The repository's tags, none when the registry does not know it; raises as `digest_of` does."""
        name = self._name(repository)
        try:
            return self._pages(f"/v2/{name}/tags/list", "tags", f"the tags of {repository}", f"repository:{name}:pull")
        except NotFoundError:
            return []

    def repositories(self) -> list[str]:
        """All repositories. Docker Hub does not tell. Raises as `digest_of` does.

        Raises:
            NotFoundError: the registry has no list.
        """
        return self._pages("/v2/_catalog", "repositories", "its repositories", "registry:catalog:*")

    # Requests

    def _name(self, repository: str) -> str:
        name = quote(repository.strip("/"), safe="/")
        return f"library/{name}" if self._base_url == _HUB and "/" not in name else name

    def _pages(self, path: str, field: str, what: str, scope: str) -> list[str]:
        url: str | None = f"{self._base_url}{path}?n={_PAGE}"
        found: list[str] = []
        while url:
            answer = self._get(url, what, scope)
            try:
                # A repository whose tags are all gone has null.
                found += [str(item) for item in answer.json()[field] or ()]
            except (ValueError, KeyError, TypeError) as error:
                raise ServiceError(f"the registry {self.host} lists {what} as {answer.text[:200]!r}") from error
            following = answer.links.get("next", {}).get("url")
            url = urljoin(url, following) if following else None
            if url and urlsplit(url).netloc != urlsplit(self._base_url).netloc:
                raise ServiceError(f"the registry {self.host} goes on with {what} at another host: {url}")
        return found

    def _get(self, url: str, what: str, scope: str, *, method: str = "GET") -> requests.Response:
        import tenacity

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_AgainError),
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=4),
            reraise=True,
        )
        return attempts(self._get_once, url, what, scope, method)

    def _get_once(self, url: str, what: str, scope: str, method: str) -> requests.Response:
        answer = self._send(method, url, self._headers(scope), login=self._basic)
        if answer.status_code == 401:
            # Known rights are tried once more: a token may have ended, and a registry may have changed its ways.
            answer = self._send(method, url, self._challenged(answer, what, scope), login=self._basic)
        if answer.ok:
            return answer
        error = self._error(answer, what)
        if isinstance(error, AuthError) and self._settings.registry_user and scope in self._tokens:
            raise HiddenError(error.message, hint=error.hint)
        raise error

    def _headers(self, scope: str) -> dict[str, str]:
        headers = {"Accept": ", ".join(MANIFEST_TYPES) + ", application/json;q=0.5"}
        token, ends = self._tokens.get(scope, ("", 0.0))
        if ends > time.monotonic():
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _challenged(self, answer: requests.Response, what: str, scope: str) -> dict[str, str]:
        """Headers that meet what a 401 asks for."""
        kind, _, rest = answer.headers.get("WWW-Authenticate", "").partition(" ")
        self._tokens.pop(scope, None)
        if kind.lower() == "basic":
            if not self._settings.registry_user:
                raise self._error(answer, what)
            self._basic = True
            return self._headers(scope)
        if kind.lower() != "bearer":
            raise self._error(answer, what)
        challenge = parse_keqv_list(parse_http_list(rest))
        self._tokens[scope] = self._token(challenge, challenge.get("scope") or scope)
        self._basic = False
        return self._headers(scope)

    def _token(self, challenge: dict[str, str], scope: str) -> tuple[str, float]:
        """A token of the issuer that the registry named, and until when it lasts."""
        realm = challenge.get("realm", "")
        if urlsplit(realm).scheme != "https" and urlsplit(self._base_url).scheme == "https":
            raise ServiceError(f"the registry {self.host} sends logins to {realm!r}, which is not encrypted")
        parameters = {"scope": scope, **({"service": challenge["service"]} if "service" in challenge else {})}
        answer = self._send("GET", realm, {}, login=bool(self._settings.registry_user), parameters=parameters)
        if not answer.ok:
            raise self._error(answer, f"a token for {scope}")
        try:
            body = answer.json()
            token = str(body.get("token") or body["access_token"])
            seconds = float(body.get("expires_in") or _TOKEN_SECONDS)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServiceError(f"{urlsplit(realm).netloc} gave no token for {self.host}") from error
        return token, time.monotonic() + 0.9 * seconds

    def _send(
        self, method: str, url: str, headers: dict[str, str], *, login: bool, parameters: dict[str, str] | None = None
    ) -> requests.Response:
        import requests

        if self._session is None:
            self._session = requests.Session()
            # Neither a proxy nor a .netrc of the environment is meant for this machine's own services.
            self._session.trust_env = urlsplit(self._base_url).scheme == "https"
        user = self._settings.registry_user
        auth = (user, self._settings.secret("registry_password")) if login else _as_is
        # With each request: the session's own would yield to REQUESTS_CA_BUNDLE.
        verify = self._settings.ca_bundle or True
        try:
            return self._session.request(
                method, url, headers=headers, auth=auth, params=parameters, timeout=_TIMEOUT_SECONDS, verify=verify
            )
        except requests.exceptions.SSLError as error:
            raise ServiceError(
                f"the certificate of the registry {self.host} is not trusted: {error}",
                hint="name its authority's certificates in AIRLOOM_CA_BUNDLE; the engine wants them too",
            ) from error
        except requests.RequestException as error:
            raise _AgainError(f"the registry {self.host} does not answer: {error}", hint=_OTHER_NAME) from error

    def _error(self, answer: requests.Response, what: str) -> AirloomError:
        """What an answer that is no success means."""
        code, user = answer.status_code, self._settings.registry_user
        said = f"the registry {self.host} answered {code} when asked for {what}{_explained(answer)}"
        if code in {401, 403} and not user:
            return AuthError(f"the registry {self.host} wants a login for {what}", hint=_LOG_IN)
        if code in {401, 403}:
            return AuthError(
                f"the registry {self.host} refuses the user {user!r} when asked for {what}{_explained(answer)}",
                hint="the secret registry_password is wrong, or that user may not read this repository",
            )
        if code == 404:
            return NotFoundError(said)
        if code == 429:
            after = answer.headers.get("Retry-After", "")
            wait = f"try again after {after}{' s' if after.isdigit() else ''}" if after else "try again later"
            return UnavailableError(
                f"the registry {self.host} counts too many requests of {user or 'nobody in particular'} (429)",
                hint=wait if user else f"{wait}, or log in for a higher limit: {_LOG_IN}",
            )
        if code in {408, 500, 502, 503, 504}:
            return _AgainError(said, hint="see what the registry writes: airloom logs")
        return ServiceError(said)


class HiddenError(AuthError):
    """The user is known, and may not read this; Docker Hub says the same of what is not there."""


class _AgainError(UnavailableError):
    """Worth asking again at once."""


def _base_url(host: str) -> str:
    if "://" in host:
        return host.rstrip("/")
    host = host.strip("/")
    if host in _HUB_NAMES:
        return _HUB
    name = urlsplit(f"//{host}").hostname or ""
    plain = name in _LOOPBACK or name.startswith("127.") or not {".", ":"} & set(name)
    return f"{'http' if plain else 'https'}://{host}"


def _as_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """No login; without this, requests takes one from ~/.netrc, over a token even."""
    return request


def _explained(answer: requests.Response) -> str:
    """The registry's own words, where there are some; a HEAD has none."""
    try:
        return ": " + "; ".join(
            f"{error['code']} {error.get('message', '')}".strip() for error in answer.json()["errors"]
        )
    except (ValueError, KeyError, TypeError):
        text = " ".join(answer.text.split())[:200]
        return f": {text}" if text else ""
