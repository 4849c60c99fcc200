"""The Docker engines, the one that stages run on and the one that builds, and their errors in Airloom's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from airloom.errors import AirloomError, AuthError, NotFoundError, ServiceError, UnavailableError
from airloom.settings import Settings

API_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class EngineAddress:
    """An engine that somebody names, instead of the settings' own.

    Attributes:
        urls: of one engine; the first that answers is used.
        ca_cert, client_cert, client_key: paths of PEM files; all three, or no TLS.
        version: of the API; empty: what the engine speaks.
    """

    urls: tuple[str, ...]
    ca_cert: str = ""
    client_cert: str = ""
    client_key: str = ""
    verify: bool = True
    version: str = ""
    timeout_seconds: int = API_TIMEOUT_SECONDS


@dataclass(frozen=True)
class RegistryLogin:
    """Whom a registry is to know. `registry` is its host, with port where it has one; empty: any."""

    registry: str
    username: str
    password: str = field(repr=False)

    def auth_for(self, reference: str) -> dict[str, str] | None:
        """What the engine is to send along with a pull; None for an image of another registry."""
        from docker.auth import resolve_index_name, resolve_repository_name

        if self.registry and resolve_repository_name(reference)[0] != resolve_index_name(self.registry):
            return None
        return {"username": self.username, "password": self.password}


# Asked only when an image has to be pulled; None where there is no login.
FindLogin = Callable[[], RegistryLogin | None]


def connect(settings: Settings) -> Any:
    """A client of the engine's API; DOCKER_TLS_VERIFY and DOCKER_CERT_PATH count as for Docker's own programs.

    Raises:
        AuthError: it speaks TLS, and this client's certificate is missing or refused.
        UnavailableError: it does not answer.
    """
    with engine_errors():
        return _client({"DOCKER_HOST": settings.docker_host} if settings.docker_host else {})


def connect_builder(settings: Settings) -> Any:
    """A client of the engine that builds images: the one that stages run on, or AIRLOOM_BUILD_HOST.

    Raises:
        AuthError, UnavailableError: as `connect`.
    """
    with engine_errors(builds=bool(settings.build_host)):
        return _client(builder_variables(settings))


def builder_variables(settings: Settings) -> dict[str, str]:
    """The environment that leads Docker's own programs to the engine that builds."""
    variables = {}
    if settings.build_host or settings.docker_host:
        variables["DOCKER_HOST"] = settings.build_host or settings.docker_host
    if settings.build_host and settings.build_certs:
        variables |= {"DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": settings.build_certs}
    return variables


def _client(variables: dict[str, str]) -> Any:
    import os

    from docker.utils import kwargs_from_env

    known = kwargs_from_env(environment={**os.environ, **variables})
    return _client_class()(timeout=API_TIMEOUT_SECONDS, **known)


def connect_to(address: EngineAddress) -> Any:
    """A client of the first of an engine's addresses that answers.

    Raises:
        AuthError, UnavailableError: none does; this is the last one's error.
    """
    from docker.tls import TLSConfig

    failure: AirloomError = UnavailableError("no address of the Docker engine was given")
    for url in address.urls:
        try:
            with engine_errors():
                tls: Any = False
                if address.ca_cert and address.client_cert and address.client_key:
                    pair = (address.client_cert, address.client_key)
                    tls = TLSConfig(client_cert=pair, ca_cert=address.ca_cert, verify=address.verify)
                api = _client_class()(
                    base_url=url.replace("tcp://", "https://", 1) if tls else url,
                    version=address.version or None,
                    timeout=address.timeout_seconds,
                    tls=tls,
                )
                api.ping()
                return api
        except AirloomError as error:
            failure = error
    raise failure


@cache
def _client_class() -> Any:
    """The SDK's client, but for one thing: REQUESTS_CA_BUNDLE, where a network has an authority of its own, would
    take the place of the engine's authority."""
    from docker import APIClient

    class Client(APIClient):  # type: ignore[misc]  # the SDK has no types
        def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
            named = self.verify if verify is None else verify
            return super().merge_environment_settings(url, proxies, stream, named, cert)

    return Client


@contextmanager
def engine_errors(*, builds: bool = False) -> Iterator[None]:
    """Raise the SDK's errors as Airloom's.

    Args:
        builds: it is the engine of AIRLOOM_BUILD_HOST.
    """
    import requests
    from docker.errors import APIError, DockerException

    engine = "the Docker engine that builds" if builds else "the Docker engine"
    try:
        yield
    except APIError as error:
        kind: type[AirloomError] = UnavailableError if error.is_server_error() else ServiceError
        raise kind(f"{engine} refused: {error.explanation or error}") from error
    except (DockerException, requests.RequestException) as error:
        if _is_about_certificates(error):
            where = "AIRLOOM_BUILD_CERTS" if builds else "DOCKER_TLS_VERIFY=1, and DOCKER_CERT_PATH"
            raise AuthError(
                f"{engine} and this client don't trust each other: {error}",
                hint=f"{where} with ca.pem, cert.pem and key.pem of this engine",
            ) from error
        setting = "AIRLOOM_BUILD_HOST" if builds else "AIRLOOM_DOCKER_HOST"
        raise UnavailableError(f"{engine} does not answer: {error}", hint=f"does it run? see {setting}") from error


def container_facts(api: Any, container: str) -> dict[str, Any] | None:
    """What the engine knows of a container, by id or name; None where there is none."""
    from docker.errors import NotFound

    with engine_errors():
        try:
            facts: dict[str, Any] = api.inspect_container(container)
        except NotFound:
            return None
    return facts


def ensure_image(
    api: Any, settings: Settings, reference: str, *, login: FindLogin | None = None, always: bool = False
) -> None:
    """Pull an image that the engine lacks.

    Args:
        login: asked before the settings', and only if there is something to pull.
        always: pull even if the engine has one of that name.

    Raises:
        NotFoundError, AuthError, UnavailableError: as `pull_image`.
        ServiceError: it has no registry, and is not in this engine.
    """
    from docker.errors import ImageNotFound

    with engine_errors():
        try:
            api.inspect_image(reference)
            if not always or reference.startswith("sha256:"):
                return
        except ImageNotFound:
            if reference.startswith("sha256:"):
                raise ServiceError(
                    f"the image {reference} is not in this engine", hint="build the commit again: airloom build …"
                ) from None
    account = login() if login else None
    pull_image(api, reference, account.auth_for(reference) if account else auth_of(settings, reference))


def pull_image(api: Any, reference: str, auth: dict[str, str] | None, *, builds: bool = False) -> None:
    """Fetch an image from its registry, even if the engine has one of that name.

    Args:
        builds: as for `engine_errors`.

    Raises:
        NotFoundError: the registry has none, or hides it from this user.
        AuthError: the registry refused the user.
        UnavailableError: it does not answer, limits the rate, or broke off.
    """
    from docker.errors import APIError

    user = auth["username"] if auth else ""
    with engine_errors(builds=builds):
        try:
            for line in api.pull(reference, auth_config=auth, stream=True, decode=True):
                if "error" in line:  # said after the answer has begun, so that no status tells
                    raise transfer_failure("pull", reference, user, str(line["error"]))
        except APIError as error:
            raise transfer_failure("pull", reference, user, str(error.explanation or error)) from error


def transfer_failure(verb: Literal["push", "pull"], reference: str, user: str, said: str) -> AirloomError:
    """What the engine says of a transfer that did not come about, in Airloom's words. `user`: empty for nobody."""
    low, who = said.lower(), user or "nobody"
    if "toomanyrequests" in low or "rate limit" in low:
        hint = "wait, or log in: docs/how-to/registry.md"
        return UnavailableError(f"the registry limits the rate of {who}: {said}", hint=hint)
    if verb == "pull" and any(sign in low for sign in ("not found", "manifest unknown", "does not exist")):
        hint = "is its name right, and may this user read it?"
        return NotFoundError(f"{reference} cannot be pulled: {said}", hint=hint)
    if any(sign in low for sign in ("denied", "unauthorized", "no basic auth", "authentication")):
        hint = "see AIRLOOM_REGISTRY_USER and the secret registry_password"
        return AuthError(f"the registry refuses the {verb} of {reference} to user {who}: {said}", hint=hint)
    return UnavailableError(f"{reference} could not be {verb}ed: {said}", hint="does its registry answer?")


def login_of(settings: Settings) -> dict[str, str] | None:
    """Whom the registry is to know; None: nobody."""
    account = _account_of(settings)
    return {"username": account.username, "password": account.password} if account else None


def auth_of(settings: Settings, reference: str) -> dict[str, str] | None:
    """The login for pulling an image; None for those of registries that are not the settings' own."""
    account = _account_of(settings)
    return account.auth_for(reference) if account else None


def _account_of(settings: Settings) -> RegistryLogin | None:
    if not settings.registry_user:
        return None
    return RegistryLogin(settings.registry, settings.registry_user, settings.secret("registry_password"))


def _is_about_certificates(error: Exception) -> bool:
    """An engine that wants a certificate says so in many ways, some after the handshake."""
    said = str(error).lower()
    signs = ("certificate", "unknown ca", "http request to an https server", "client_cert")
    return any(sign in said for sign in signs)
