"""Requests to MLflow's REST API, with bounded patience and Airloom's errors.

MLflow's own client takes 3 seconds and 140 MB to import, in every task anew, and goes on trying for
minutes; its REST API is documented and all that is needed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from airloom.errors import (
    AirloomError,
    AuthError,
    ConfigError,
    ConflictError,
    ContractError,
    NotFoundError,
    ServiceError,
    StorageFullError,
    UnavailableError,
)

if TYPE_CHECKING:
    import requests

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"

_CONNECT_SECONDS = 3.0
_READ_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 2.0
_OVERLOADED = frozenset({429, 502, 503, 504})
_FULL = ("no space left", "disk is full", "storage full", "quota", "insufficientstorage")


class MlflowApi:
    """One server.

    Args:
        url: of the server.
        patience_seconds: how long to go on trying while it doesn't answer, as after a restart.
    """

    def __init__(self, url: str, *, patience_seconds: float) -> None:
        self.url = url.rstrip("/")
        self.patience_seconds = patience_seconds

    @cached_property
    def _session(self) -> requests.Session:
        import requests

        session = requests.Session()
        session.trust_env = False  # a proxy of the surroundings is not meant for a service of ours
        return session

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Ask. Raises as `call` does."""
        return self.call("GET", path, params={name: value for name, value in params.items() if value is not None})

    def post(self, path: str, *, repeatable: bool, **body: Any) -> dict[str, Any]:
        """Change, or search. `repeatable`: doing it twice is as good as once."""
        return self.call("POST", path, body=body, repeatable=repeatable)

    def search(self, path: str, items: str, **asked: Any) -> Iterator[dict[str, Any]]:
        """All items of a search, page by page. Raises as `call` does."""
        posted = path in {"runs/search", "experiments/search"}  # the others are asked by GET
        token: str | None = None
        while True:
            page = {**asked, **({"page_token": token} if token else {})}
            if posted:
                answer = self.post(path, repeatable=True, **{"max_results": 1000, **page})
            else:
                answer = self.get(path, **page)
            yield from answer.get(items, [])
            token = answer.get("next_page_token")
            if not token:
                return

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        repeatable: bool = True,
    ) -> dict[str, Any]:
        """Call `/api/2.0/mlflow/<path>` and return what it answers.

        Raises:
            NotFoundError, ConflictError, AuthError, StorageFullError: as MLflow says.
            UnavailableError: no answer within the patience.
            ServiceError: any other refusal.
        """
        with self._answer(method, f"{API}/{path}", params=params, json=body, repeatable=repeatable) as response:
            try:
                answer: dict[str, Any] = response.json()
            except ValueError as error:
                raise ServiceError(
                    f"{self.url} answered {path} with something that is not JSON: {response.text[:200]!r}",
                    hint="is that MLflow's address? see AIRLOOM_MLFLOW_PORT or AIRLOOM_MLFLOW_URL",
                ) from error
            return answer

    # Artifacts, through the server

    def list_files(self, location: str) -> dict[str, int]:
        """Relative path -> size in bytes of all files below an artifact location."""
        root = self._proxied(location)
        found: dict[str, int] = {}
        folders = [""]
        while folders:
            folder = folders.pop()
            asked = f"{root}/{folder}" if folder else root
            with self._answer("GET", ARTIFACTS, params={"path": asked}) as response:
                entries = response.json().get("files", [])
            for entry in entries:
                path = f"{folder}/{entry['path']}" if folder else str(entry["path"])
                if entry.get("is_dir"):
                    folders.append(path)
                else:
                    found[path] = int(entry.get("file_size", 0))
        return found

    def read_file(self, location: str, path: str) -> bytes:
        """One artifact's bytes."""
        with self._answer("GET", self._artifact(location, path)) as response:
            return response.content

    def download_file(self, location: str, path: str, target: Path) -> None:
        """Write one artifact to the file `target`, in blocks."""
        import requests

        try:
            with (
                self._answer("GET", self._artifact(location, path), stream=True) as response,
                target.open("wb") as file,
            ):
                for block in response.iter_content(1 << 20):
                    file.write(block)
        except requests.RequestException as error:
            raise self._unavailable(error) from error

    def upload_file(self, location: str, path: str, content: bytes) -> None:
        """Write one artifact, whole; again with the same bytes changes nothing."""
        with self._answer("PUT", self._artifact(location, path), data=content):
            pass

    def _artifact(self, location: str, path: str) -> str:
        return f"{ARTIFACTS}/{quote(f'{self._proxied(location)}/{checked_path(path)}')}"

    def _proxied(self, location: str) -> str:
        """The path of an artifact location below the root that the server serves."""
        parts = urlsplit(location)
        if parts.scheme != "mlflow-artifacts":
            raise ConfigError(
                f"MLflow keeps artifacts at {location}, which clients would have to reach by themselves",
                hint="start it with --serve-artifacts and --artifacts-destination",
            )
        return parts.path.strip("/")

    # Transport

    @contextmanager
    def _answer(
        self, method: str, path: str, *, repeatable: bool = True, stream: bool = False, **kwargs: Any
    ) -> Iterator[requests.Response]:
        response = self._send(method, path, repeatable=repeatable, stream=stream, **kwargs)
        try:
            if response.status_code >= 400:
                raise self._refused(response, path)
            yield response
        finally:
            response.close()

    def _send(self, method: str, path: str, *, repeatable: bool, **kwargs: Any) -> requests.Response:
        import requests

        deadline = time.monotonic() + self.patience_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                response = self._session.request(
                    method, self.url + path, timeout=(_CONNECT_SECONDS, _READ_SECONDS), **kwargs
                )
            except (requests.ConnectionError, requests.Timeout) as error:
                # Without an answer nobody knows whether the server did it: only repeatable calls are tried
                # again, and others if no connection came about at all.
                refused = isinstance(error, requests.ConnectTimeout) or "Connection refused" in str(error)
                if not (repeatable or refused) or time.monotonic() + pause > deadline:
                    raise self._unavailable(error) from error
            except requests.RequestException as error:
                raise ConfigError(f"{self.url} cannot be asked: {error}", hint="see AIRLOOM_MLFLOW_URL") from error
            else:
                busy = response.status_code in _OVERLOADED or (response.status_code == 500 and repeatable)
                if not busy or _is_full(response.text) or time.monotonic() + pause > deadline:
                    return response
                response.close()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _unavailable(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"MLflow at {self.url} does not answer: {_short(error)}", hint="is it running? see: airloom status"
        )

    def _refused(self, response: requests.Response, path: str) -> AirloomError:
        try:
            answer = response.json()
        except ValueError:
            answer = {}
        if not isinstance(answer, dict):
            answer = {}
        code = str(answer.get("error_code", ""))
        message = str(answer.get("message") or response.text[:300] or response.reason)
        kind, hint = _kind(response.status_code, code, message)
        text = f"MLflow at {self.url} refused {path.removeprefix(API + '/')}: {message}"
        return kind(text, hint=hint)


def _kind(status: int, code: str, message: str) -> tuple[type[AirloomError], str | None]:
    """Which error a refusal is, and what to do about it."""
    kinds: list[tuple[bool, type[AirloomError], str | None]] = [
        (_is_full(message), StorageFullError, "make room in the object store or on MLflow's disk, then run again"),
        (
            status == 403 and "host" in message.lower(),
            AuthError,
            "MLflow does not expect to be called by this address: see its --allowed-hosts",
        ),
        (status in {401, 403}, AuthError, "check the credentials that MLflow asks for"),
        (code == "RESOURCE_ALREADY_EXISTS", ConflictError, None),
        (code == "RESOURCE_DOES_NOT_EXIST" or status == 404, NotFoundError, None),
        (status in _OVERLOADED or status == 500, UnavailableError, "see MLflow's log: airloom logs mlflow"),
    ]
    return next(((kind, hint) for applies, kind, hint in kinds if applies), (ServiceError, None))


def checked_path(path: str) -> str:
    """A relative path without steps upwards.

    Raises:
        ContractError: it is none.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ContractError(f"{path!r} is no relative path of an artifact")
    return path


def _is_full(text: str) -> bool:
    lowered = text[:2000].lower()
    return any(sign in lowered for sign in _FULL)


def _short(error: Exception) -> str:
    text = str(error)
    return "connection refused" if "Connection refused" in text else text[:200]
