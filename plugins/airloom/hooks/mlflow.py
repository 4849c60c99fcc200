"""Runs and registered models in MLflow. Every method may be called again after it was cut off."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from airloom.contract.digest import sha256_bytes
from airloom.errors import AirloomError, ConflictError, NotFoundError
from airloom.hooks.mlflow_api import MlflowApi
from airloom.hooks.mlflow_records import (
    CANDIDATE,
    CHAMPION,
    DIGEST_TAG,
    KEY_TAG,
    ModelVersionInfo,
    RunInfo,
    json_number,
    model_id_of,
    model_version,
    pairs,
    quoted,
    run_info,
    tag_text,
    tags_of,
    with_aliases,
)
from airloom.hooks.model_cache import ModelCache
from airloom.settings import Settings

__all__ = ["CANDIDATE", "CHAMPION", "ModelRegistry", "ModelVersionInfo", "RunInfo"]

_PATIENCE_SECONDS = 20.0
_BATCH = 100  # tags that MLflow takes in one call; of metrics it takes 1,000


class ModelRegistry:
    """MLflow as the place of runs, model artifacts and model versions.

    Args:
        url: of the server.
        home: folder of the local copies of models, and of the locks that processes of this machine share.
        patience_seconds: how long each call goes on trying while MLflow doesn't answer.

    Raises (every method that asks MLflow):
        UnavailableError: it does not answer.
        AuthError, StorageFullError, ServiceError: it refuses.
    """

    def __init__(
        self, *, url: str, home: Path, patience_seconds: float = _PATIENCE_SECONDS, page_url: str = ""
    ) -> None:
        self._api = MlflowApi(url, patience_seconds=patience_seconds)
        self._page_url = (page_url or url).rstrip("/")
        self._locks = home / "locks"
        self._cache = ModelCache(home / "models")

    @classmethod
    def from_settings(cls, settings: Settings) -> ModelRegistry:
        """A client of this installation's MLflow."""
        return cls(url=settings.mlflow_api_url, home=settings.home_dir, page_url=settings.mlflow_page_url)

    def be_patient(self, seconds: float) -> None:
        """Go on trying for so long; people at a terminal want to know sooner than a task."""
        self._api.patience_seconds = seconds

    # Runs

    def start_run(self, experiment: str, key: str, tags: Mapping[str, str] | None = None) -> str:
        """The run that carries `key` in its tag `airloom.key`: an earlier try's, or a new one; return its id.

        An earlier one that had ended runs again. Of several callers at once on one machine, all get the same.
        """
        with self._locked(f"run {experiment} {key}"):
            experiment_id = self._experiment(experiment)
            found = self._runs_of(experiment_id, key)
            if found:
                run_id, status = found[0]
                if status != "RUNNING":
                    self._api.post("runs/update", repeatable=True, run_id=run_id, status="RUNNING")
                return run_id
            created = self._api.post(
                "runs/create",
                repeatable=False,
                experiment_id=experiment_id,
                run_name=key,
                start_time=_now_ms(),
                tags=pairs({**(tags or {}), KEY_TAG: key}),
            )
            own = str(created["run"]["info"]["run_id"])
            # Somebody on another machine may have made one meanwhile.
            chosen = (self._runs_of(experiment_id, key) or [(own, "RUNNING")])[0][0]
            if chosen != own:
                self._api.post("runs/delete", repeatable=True, run_id=own)
            return chosen

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        artifacts: Mapping[str, Mapping[str, Any] | str | bytes | Path] | None = None,
    ) -> None:
        """Add to a run: figures, tags, and artifacts by their path: a JSON value, a text, bytes or a file.

        What the run has already is not written twice.

        Raises:
            NotFoundError: no such run.
        """
        run = self.run_info(run_id)
        new = {k: v for k, v in (metrics or {}).items() if run.metrics.get(k) != v}
        changed = {k: tag_text(v) for k, v in (tags or {}).items()}
        changed = {k: v for k, v in changed.items() if run.tags.get(k) != v}
        now = _now_ms()
        for start in range(0, max(len(new), len(changed)), _BATCH):
            self._api.post(
                "runs/log-batch",
                repeatable=True,
                run_id=run_id,
                metrics=[
                    {"key": k, "value": json_number(v), "timestamp": now, "step": 0}
                    for k, v in list(new.items())[start : start + _BATCH]
                ],
                tags=pairs(dict(list(changed.items())[start : start + _BATCH])),
            )
        for path, content in (artifacts or {}).items():
            self._api.upload_file(run.artifact_uri, path, _as_bytes(content))

    def finish_run(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED. One that has ended so keeps its time.

        Raises:
            NotFoundError: no such run.
        """
        if self.run_info(run_id).status != status:
            self._api.post("runs/update", repeatable=True, run_id=run_id, status=status, end_time=_now_ms())

    def run_info(self, run_id: str) -> RunInfo:
        """What MLflow knows of a run.

        Raises:
            NotFoundError: no such run.
        """
        try:
            run = self._api.get("runs/get", run_id=run_id)["run"]
        except NotFoundError:
            raise NotFoundError(f"MLflow has no run {run_id!r}", hint=f"see {self._api.url}") from None
        return run_info(run)

    def run_url(self, run_id: str) -> str:
        """The run's page; MLflow's own start page where the run cannot be looked up."""
        with suppress(AirloomError):
            return f"{self._page_url}/#/experiments/{self.run_info(run_id).experiment_id}/runs/{run_id}"
        return f"{self._page_url}/"

    def version_url(self, name: str, version: str) -> str:
        """The page of a model version."""
        return f"{self._page_url}/#/models/{quote(name, safe='')}/versions/{version}"

    # Models

    def model_exists(self, model_uri: str) -> bool:
        """Whether a logged model is there, ready, and has a file."""
        try:
            model = self._logged_model(model_uri)
        except NotFoundError:
            return False
        location = str(model["info"]["artifact_uri"])
        return model["info"].get("status") == "LOGGED_MODEL_READY" and bool(self._api.list_files(location))

    def model_digest(self, model_uri: str) -> str | None:
        """The digest that the stage that logged a model noted on it.

        Raises:
            NotFoundError: no such model.
        """
        tags = tags_of(self._logged_model(model_uri)["info"])
        return tags.get(DIGEST_TAG)

    def source_run(self, model_uri: str) -> str | None:
        """The MLflow run that logged a model.

        Raises:
            NotFoundError: no such model.
        """
        return self._logged_model(model_uri)["info"].get("source_run_id") or None

    def download_model(self, model_uri: str, expected_digest: str | None = None) -> Path:
        """A model artifact as a folder that `load_predictor` takes: read-only, whole, shared by all runs.

        With a digest that is here already, MLflow is not asked.

        Raises:
            NotFoundError: no such model, or it has no artifact.
            ContractError: its bytes are not those of the digest.
        """
        if expected_digest and (cached := self._cache.find(expected_digest)):
            return cached
        location = str(self._logged_model(model_uri)["info"]["artifact_uri"])
        files = self._api.list_files(location)
        if not files:
            raise NotFoundError(f"the model {model_uri} has no files at {location}", hint="train it again")
        return self._cache.add(
            model_uri,
            files,
            lambda path, target: self._api.download_file(location, path, target),
            expected_digest=expected_digest,
        )

    # Versions

    def register(self, name: str, model_uri: str, run_id: str, tags: Mapping[str, str] | None = None) -> str:
        """The version of the registered model `name` that came from a run: one, however often this is called.

        A version that is there keeps its tags: they say where it came from.

        Raises:
            NotFoundError: there is no such model: MLflow itself would take any address.
            ConflictError: the run has a version with another model.
        """
        with self._locked(f"version {name} {run_id}"):
            found = self._version_of(name, run_id)
            if found is None:
                if not self.model_exists(model_uri):
                    raise NotFoundError(
                        f"there is no model {model_uri} in MLflow, or it is not whole", hint="run the training again"
                    )
                self._registered_model(name)
                created = self._api.post(
                    "model-versions/create",
                    repeatable=False,
                    name=name,
                    source=model_uri,
                    model_id=model_id_of(model_uri),
                    run_id=run_id,
                    tags=pairs(tags or {}),
                )
                own = str(created["model_version"]["version"])
                found = self._version_of(name, run_id)
                if found is None:
                    raise ConflictError(f"version {own} of {name} was deleted by somebody while it was registered")
                if found.version != own:  # somebody on another machine was faster
                    self._delete_version(name, own)
            if found.model_uri != model_uri:
                raise ConflictError(
                    f"the run {run_id} is registered as {name} {found.version} with {found.model_uri}, not {model_uri}",
                    hint="train again: a run has one model",
                )
            return found.version

    def set_version_tags(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version.

        Raises:
            NotFoundError: no such version.
        """
        for key, value in tags.items():
            tag = {"name": name, "version": version, "key": key, "value": tag_text(value)}
            self._api.post("model-versions/set-tag", repeatable=True, **tag)

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let an alias name a version and no other.

        Raises:
            NotFoundError: no such version.
        """
        self._api.post("registered-models/alias", repeatable=True, name=name, alias=alias, version=version)

    def alias(self, name: str, alias: str) -> ModelVersionInfo | None:
        """The version that an alias names; `None` if it names none, or there is no such model."""
        try:
            found = self._api.get("registered-models/alias", name=name, alias=alias)
        except NotFoundError:
            return None
        except AirloomError as error:
            if "alias" in error.message and "not found" in error.message:  # MLflow calls it a wrong parameter
                return None
            raise
        return model_version(found["model_version"])

    def version(self, name: str, version: str) -> ModelVersionInfo:
        """One version.

        Raises:
            NotFoundError: no such model or version.
        """
        try:
            found = self._api.get("model-versions/get", name=name, version=version)
        except NotFoundError:
            raise NotFoundError(
                f"MLflow has no version {version} of the model {name!r}", hint="list them: airloom models"
            ) from None
        return model_version(found["model_version"])

    def versions(self, name: str | None = None, *, run_id: str | None = None) -> list[ModelVersionInfo]:
        """The versions of a model, or of all models, newest first; `run_id` picks those of one MLflow run."""
        filters = [f"name = {quoted(name)}"] if name else []
        filters += [f"run_id = {quoted(run_id)}"] if run_id else []
        asked = {"filter": " AND ".join(filters)} if filters else {}
        found = [model_version(item) for item in self._api.search("model-versions/search", "model_versions", **asked)]
        aliases = self._aliases(name)
        found = [with_aliases(version, aliases) for version in found]
        return sorted(found, key=lambda version: (version.name, -int(version.version)))

    # Parts

    def _aliases(self, name: str | None) -> dict[tuple[str, str], list[str]]:
        """(model, version) -> aliases: a search for versions leaves them out."""
        asked = {"filter": f"name = {quoted(name)}"} if name else {}
        named: dict[tuple[str, str], list[str]] = {}
        for model in self._api.search("registered-models/search", "registered_models", **asked):
            for alias in model.get("aliases", []):
                named.setdefault((model["name"], str(alias["version"])), []).append(str(alias["alias"]))
        return named

    def _experiment(self, name: str) -> str:
        try:
            return str(self._api.get("experiments/get-by-name", experiment_name=name)["experiment"]["experiment_id"])
        except NotFoundError:
            pass
        try:
            return str(self._api.post("experiments/create", repeatable=True, name=name)["experiment_id"])
        except ConflictError:  # somebody made it just now
            return str(self._api.get("experiments/get-by-name", experiment_name=name)["experiment"]["experiment_id"])

    def _registered_model(self, name: str) -> None:
        with suppress(ConflictError):
            self._api.post("registered-models/create", repeatable=True, name=name)

    def _runs_of(self, experiment_id: str, key: str) -> list[tuple[str, str]]:
        """(id, status) of the runs with a key, the first that was made first."""
        found = self._api.search(
            "runs/search", "runs", experiment_ids=[experiment_id], filter=f"tags.`{KEY_TAG}` = {quoted(key)}"
        )
        infos = [run["info"] for run in found]
        infos.sort(key=lambda info: (int(info["start_time"]), str(info["run_id"])))
        return [(str(info["run_id"]), str(info["status"])) for info in infos]

    def _version_of(self, name: str, run_id: str) -> ModelVersionInfo | None:
        asked = f"name = {quoted(name)} AND run_id = {quoted(run_id)}"
        found = [
            model_version(item) for item in self._api.search("model-versions/search", "model_versions", filter=asked)
        ]
        return min(found, key=lambda version: int(version.version), default=None)

    def _delete_version(self, name: str, version: str) -> None:
        with suppress(NotFoundError):
            self._api.call("DELETE", "model-versions/delete", body={"name": name, "version": version})

    def _logged_model(self, model_uri: str) -> dict[str, Any]:
        model_id = model_id_of(model_uri)
        try:
            found: dict[str, Any] = self._api.get(f"logged-models/{quote(model_id, safe='')}")["model"]
        except NotFoundError:
            raise NotFoundError(f"MLflow has no model {model_uri}", hint="train it again") from None
        return found

    @contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        """Only one process of this machine at a time; the kernel frees the lock with its holder."""
        self._locks.mkdir(parents=True, exist_ok=True)
        name = f"mlflow-{sha256_bytes(what.encode())[:2]}.lock"  # 256 files at most
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _as_bytes(content: Mapping[str, Any] | str | bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, Path):
        return content.read_bytes()
    return (content if isinstance(content, str) else json.dumps(content, indent=2)).encode()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
