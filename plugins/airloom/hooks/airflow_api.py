"""Airflow's REST API."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airloom.errors import AuthError, ConfigError, ConflictError, NotFoundError, ServiceError, UnavailableError
from airloom.settings import Settings

if TYPE_CHECKING:
    import requests

# The pool of the stages of all pipelines: they are what the machine's memory and GPUs have to hold.
STAGE_POOL = "airloom_stages"
FINISHED = frozenset({"success", "failed"})
DEFAULT_TIMEOUT_SECONDS = 15.0
# A change may wait for the database: longer than the embedded one lets it wait (embedded.airflow_server).
CHANGE_TIMEOUT_SECONDS = 30.0

RunInfo = dict[str, Any]
TaskInfo = dict[str, Any]
AssetEvent = dict[str, Any]

_PAGE = 100  # Airflow gives no more at once
_SILENT_SECONDS = 300.0
# Together longer than a scheduler needs to make a run.
_LOOKS, _LOOK_SECONDS = 4, 0.5


class AirflowApi:
    """A client with a token that it renews by itself.

    Args:
        url: of the API server, without `/api/v2`.
        patience_seconds: how long to go on trying while the server does not answer.
    """

    def __init__(
        self, *, url: str, username: str, password: str, patience_seconds: float = 20.0, page_url: str = ""
    ) -> None:
        self.url = url.rstrip("/")
        self._page_url = (page_url or url).rstrip("/")
        self._username = username
        self._password = password
        self._patience_seconds = patience_seconds
        self._token = ""
        self._lock = threading.Lock()
        self._session: requests.Session | None = None

    @classmethod
    def from_settings(cls, settings: Settings, *, patience_seconds: float = 20.0) -> AirflowApi:
        """A client of this installation's Airflow, as its administrator."""
        return cls(
            url=settings.airflow_api_url,
            username="admin",
            password=settings.secret("admin_password"),
            patience_seconds=patience_seconds,
            page_url=settings.airflow_page_url,
        )

    # Runs

    def trigger(self, dag_id: str, conf: Mapping[str, Any] | None = None, *, note: str | None = None) -> str:
        """Start a run, one and no more, and return its id.

        Raises:
            NotFoundError: no such DAG.
            ConfigError: a parameter is not what the DAG's schema allows.
        """
        # An id of our own, which no other run has: asked again after a lost answer or an error, Airflow refuses
        # what it has made already.
        run_id = f"manual__{datetime.now(UTC).isoformat()}_{token_hex(3)}"
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {}), "note": note}
        with suppress(ConflictError):
            self._call("POST", f"dags/{_part(dag_id)}/dagRuns", json=body)
        return run_id

    def run(self, dag_id: str, run_id: str) -> RunInfo:
        """One run.

        Raises:
            NotFoundError: no such run.
        """
        return dict(self._call("GET", f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}"))

    def runs(self, dag_id: str = "~", *, limit: int = 20) -> list[RunInfo]:
        """The most recent runs, newest first; `~` means those of all DAGs."""
        path = f"dags/{_part(dag_id)}/dagRuns"
        return list(self._call("GET", path, params={"limit": limit, "order_by": "-run_after"})["dag_runs"])

    def live_runs(self) -> set[tuple[str, str]]:
        """DAG and id of every run that is queued or running."""
        found = self._all("dags/~/dagRuns", "dag_runs", state=["queued", "running"], order_by="id")
        return {(str(run["dag_id"]), str(run["dag_run_id"])) for run in found}

    def wait(
        self,
        dag_id: str,
        run_id: str,
        on_change: Callable[[RunInfo, list[TaskInfo]], None] | None = None,
        *,
        timeout_seconds: float | None = None,
        poll_seconds: float = 1.0,
    ) -> RunInfo:
        """Wait until a run has ended. `on_change` is called whenever a state has changed, and at the end.

        Raises:
            UnavailableError: it has not ended in `timeout_seconds`, or Airflow has not answered for 5 minutes.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        seen: object = None
        answered_at = time.monotonic()
        while True:
            try:
                run = self.run(dag_id, run_id)
                tasks = self.task_instances(dag_id, run_id)
            except UnavailableError:
                # The run goes on meanwhile: Airflow is being started again, or its database is busy.
                now = time.monotonic()
                if now - answered_at > _SILENT_SECONDS or (deadline is not None and now > deadline):
                    raise
                time.sleep(poll_seconds)
                continue
            answered_at = time.monotonic()
            states = (run["state"], [(task["task_id"], task["state"], task["try_number"]) for task in tasks])
            if on_change is not None and states != seen:
                on_change(run, tasks)
            seen = states
            if run["state"] in FINISHED:
                return run
            if deadline is not None and time.monotonic() > deadline:
                raise UnavailableError(
                    f"the run {run_id} of {dag_id} is still {run['state']} after {timeout_seconds:.0f} s",
                    hint=f"see {self.run_url(dag_id, run_id)}",
                )
            time.sleep(poll_seconds)

    def mark(self, dag_id: str, run_id: str, state: str) -> None:
        """Set a run's state: `queued`, `success` or `failed`. What still runs of it is stopped."""
        self._call("PATCH", f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}", json={"state": state})

    def clear(self, dag_id: str, run_id: str, *, only_failed: bool = True) -> None:
        """Run a finished run's tasks again, those that failed unless told otherwise."""
        body = {"dry_run": False, "only_failed": only_failed}
        self._call("POST", f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/clear", json=body)

    def set_run_note(self, dag_id: str, run_id: str, note: str) -> None:
        """Show a note on a run; at most 1,000 characters are kept."""
        self._call("PATCH", f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}", json={"note": note[:1000]})

    # Tasks

    def task_instances(self, dag_id: str, run_id: str) -> list[TaskInfo]:
        """The tasks of a run in no particular order."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances"
        return self._all(path, "task_instances", order_by="id")

    def task_instance(self, dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> TaskInfo:
        """One task of a run; `map_index`: which one of a mapped task, -1 where it is not mapped.

        Raises:
            NotFoundError: there is no such run, or no such task in it.
        """
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id)}/{map_index}"
        found: TaskInfo = self._call("GET", path)
        return found

    def set_task_note(self, dag_id: str, run_id: str, task_id: str, note: str) -> None:
        """Show a note on a task; at most 1,000 characters are kept."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id)}"
        self._call("PATCH", path, json={"note": note[:1000]})

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """What a task returned.

        Raises:
            NotFoundError: it has returned nothing.
        """
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id)}/xcomEntries/{_part(key)}"
        return self._call("GET", path, params={"deserialize": "false", "stringify": "false"})["value"]

    def task_log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1) -> list[str]:
        """The lines of a task's log."""
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id)}/logs/{try_number}"
        content = self._call("GET", path, params={"full_content": "true"})["content"]
        return [text for line in content for text in _log_lines(line)]

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str) -> None:
        """Answer a task that waits for a person.

        Raises:
            NotFoundError: the task waits for nobody.
            ConflictError: it has been answered already.
        """
        path = f"dags/{_part(dag_id)}/dagRuns/{_part(run_id)}/taskInstances/{_part(task_id)}/-1/hitlDetails"
        self._call("PATCH", path, json={"chosen_options": [option], "params_input": {}})

    # DAGs, assets, health

    def dags(self, *, limit: float = math.inf) -> list[dict[str, Any]]:
        """The DAGs that Airflow has parsed."""
        return self._all("dags", "dags", limit=limit, order_by="dag_id")

    def dag(self, dag_id: str) -> dict[str, Any]:
        """One DAG.

        Raises:
            NotFoundError: Airflow has no such DAG.
        """
        return dict(self._call("GET", f"dags/{_part(dag_id)}"))

    def unpause(self, dag_id: str) -> None:
        """Let the scheduler run a DAG."""
        self._set_paused(dag_id, False)

    def pause(self, dag_id: str) -> None:
        """Keep the scheduler from starting runs of a DAG."""
        self._set_paused(dag_id, True)

    def _set_paused(self, dag_id: str, paused: bool) -> None:
        path, params = f"dags/{_part(dag_id)}", {"update_mask": "is_paused"}
        self._call("PATCH", path, json={"is_paused": paused}, params=params)

    def import_errors(self) -> list[dict[str, Any]]:
        """What stands in the way of parsing: `filename` and `stack_trace` of each file."""
        return list(self._call("GET", "importErrors", params={"limit": 100})["import_errors"])

    def assets(self) -> list[dict[str, Any]]:
        """The assets that some DAG names: `id`, `name`, `uri` and more."""
        return self._all("assets", "assets", order_by="id")

    def create_asset_event(self, name_or_uri: str, extra: Mapping[str, Any]) -> None:
        """Tell Airflow that an asset has changed: what is scheduled on it starts.

        An earlier event that has started nothing yet, because Airflow has not come to it or as many runs as may be
        are active, starts one run together with this one.

        Raises:
            NotFoundError: no DAG that Airflow has parsed names such an asset.
        """
        asset_id = self._asset_id(name_or_uri)
        event = {"asset_id": asset_id, "extra": dict(extra)}
        # Airflow's note that a run is due keeps the time of the first event, and the run takes none that came after
        # it: this one would start nothing (apache/airflow issue 56050). A new note has this one's time.
        another_waited = True
        try:
            self._call("DELETE", f"assets/{asset_id}/queuedEvents", repeat=False)
        except NotFoundError:
            another_waited = False
        made = self._call("POST", "assets/events", json=event, repeat=False)
        if another_waited and self._is_lost(name_or_uri, asset_id, made["id"]):
            self._call("POST", "assets/events", json=event, repeat=False)

    def _is_lost(self, name_or_uri: str, asset_id: int, event_id: int) -> bool:
        """Whether an event has no run, and no note that one is due.

        A scheduler that was about to act on the note before it removes whatever note there is when it has.
        """
        for _ in range(_LOOKS):
            time.sleep(_LOOK_SECONDS)
            if any(event["id"] == event_id and event["created_dagruns"] for event in self.asset_events(name_or_uri)):
                return False
        return not self._call("GET", f"assets/{asset_id}/queuedEvents")["total_entries"]

    def asset_events(self, name_or_uri: str, *, since: datetime | None = None, limit: int = 100) -> list[AssetEvent]:
        """Events of an asset, newest first: `timestamp`, `extra`, `created_dagruns` and more.

        Raises:
            NotFoundError: no DAG that Airflow has parsed names such an asset.
        """
        params: dict[str, Any] = {"asset_id": self._asset_id(name_or_uri), "order_by": "-timestamp"}
        if since is not None:
            params["timestamp_gte"] = since.isoformat()
        return self._all("assets/events", "asset_events", limit=limit, **params)

    def _asset_id(self, name_or_uri: str) -> int:
        for asset in self.assets():
            if name_or_uri in (asset["name"], asset["uri"]):
                return int(asset["id"])
        raise NotFoundError(
            f"Airflow knows no asset {name_or_uri!r}", hint="does a pipeline in dags/configs use that repo?"
        )

    def ensure_connection(self, connection_id: str, connection: Mapping[str, Any]) -> None:
        """Make a connection, or bring the one of that name up to date: `conn_type`, `host`, `login`, `password` …"""
        self._ensure("connections", connection_id, {"connection_id": connection_id, **connection})

    def ensure_variable(self, key: str, value: str, description: str) -> None:
        """Make a variable, or bring the one of that name up to date."""
        self._ensure("variables", key, {"key": key, "value": value, "description": description})

    def _ensure(self, kind: str, name: str, body: Mapping[str, Any]) -> None:
        try:
            self._call("POST", kind, json=body)
        except ConflictError:
            self._call("PATCH", f"{kind}/{_part(name)}", json=body)

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """Make a pool; one that is there keeps the slots that a person may have given it."""
        body = {"name": name, "slots": slots, "description": description, "include_deferred": False}
        with suppress(ConflictError):
            self._call("POST", "pools", json=body)

    def health(self) -> dict[str, dict[str, Any]]:
        """The state of each component, by its name: `metadatabase`, `scheduler`, `dag_processor`, `triggerer`."""
        return dict(self._call("GET", "monitor/health", authenticated=False))

    def healthy(self) -> bool:
        """Whether every component is. An answer of "no" may also mean that there is none."""
        try:
            return all(part["status"] == "healthy" for part in self.health().values())
        except ServiceError:
            return False

    def run_url(self, dag_id: str, run_id: str) -> str:
        """A run's page in the UI."""
        return f"{self._page_url}/dags/{_part(dag_id)}/runs/{_part(run_id)}"

    # The wire

    def _all(self, path: str, key: str, *, limit: float = math.inf, **params: Any) -> list[dict[str, Any]]:
        """What an address lists, page after page."""
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            page = {**params, "limit": min(limit - len(found), _PAGE), "offset": len(found)}
            answer = self._call("GET", path, params=page)
            found += answer[key]
            if not answer[key] or len(found) >= answer["total_entries"]:
                break
        return found

    def _call(
        self,
        method: str,
        path: str,
        *,
        json: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        repeat: bool = True,
        authenticated: bool = True,
    ) -> Any:
        import requests
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
            stop=tenacity.stop_after_delay(self._patience_seconds if repeat else 0),
            reraise=True,
        )
        for attempt in retrying:
            with attempt:
                try:
                    response = self._send(method, f"api/v2/{path}", json, params, authenticated)
                except requests.RequestException as error:
                    raise UnavailableError(
                        f"Airflow at {self.url} does not answer: {type(error).__name__}", hint="see: airloom status"
                    ) from error
                return self._decode(response, f"{method} {path}")
        raise AssertionError("unreachable")

    def _send(
        self, method: str, path: str, json: Mapping[str, Any] | None, params: Mapping[str, Any] | None, auth: bool
    ) -> requests.Response:
        import requests

        if self._session is None:
            self._session = requests.Session()
            # A proxy that the environment names is for the outside; this server is on the inside.
            self._session.trust_env = False
        session = self._session

        def send(token: str) -> requests.Response:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            url = f"{self.url}/{path}"
            timeout = DEFAULT_TIMEOUT_SECONDS if method == "GET" else CHANGE_TIMEOUT_SECONDS
            return session.request(method, url, json=json, params=params, headers=headers, timeout=timeout)

        if not auth:
            return send("")
        token = self._token or self._login(session, refused="")
        response = send(token)
        # An expired token is refused with 401, one that was signed with an earlier secret with 403.
        refused = response.status_code == 401 or (response.status_code == 403 and "JWT" in response.text)
        return send(self._login(session, refused=token)) if refused else response

    def _login(self, session: requests.Session, *, refused: str) -> str:
        """A token other than the refused one; threads that were refused together log in once."""
        with self._lock:
            if self._token == refused:
                body = {"username": self._username, "password": self._password}
                response = session.post(f"{self.url}/auth/token", json=body, timeout=DEFAULT_TIMEOUT_SECONDS)
                self._token = str(self._decode(response, "POST /auth/token")["access_token"])
            return self._token

    def _decode(self, response: requests.Response, what: str) -> Any:
        status = response.status_code
        if status < 400:
            return response.json() if response.content else {}
        try:
            detail = response.json().get("detail", response.text)
        except ValueError:
            detail = response.text
        message = f"Airflow refused {what} with {status}: {str(detail)[:500]}"
        match status:
            case 401 | 403:
                raise AuthError(
                    message, hint=f"the password of {self._username!r} comes from the secret admin_password"
                )
            case 404:
                raise NotFoundError(f"Airflow has nothing at {what}: {str(detail)[:500]}")
            case 400 | 422:
                raise ConfigError(message)
            case 409:
                raise ConflictError(message)
            case 429 | 500 | 502 | 503 | 504:
                raise UnavailableError(message)
            case _:
                raise ServiceError(message)


def _log_lines(line: Any) -> list[str]:
    """A structured log line's text, followed by the exceptions that it carries."""
    if not isinstance(line, dict):
        return [str(line)]
    errors = [f"{error.get('exc_type')}: {error.get('exc_value')}" for error in line.get("error_detail") or []]
    return [str(line.get("event", "")), *errors]


def _part(value: str) -> str:
    return quote(value, safe="~")
