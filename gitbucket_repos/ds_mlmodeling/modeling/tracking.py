"""Log a stage to its MLflow run: in batches, from a thread of its own, each figure once.

A training never waits for MLflow: while the server is away, figures queue up and MLflow's client tries
again. Only `close` waits, and says so when they could not be delivered.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from airloom.contract import DataCard, StageRequest, Tracking, canonical_json
from modeling.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

SAMPLE_SECONDS = 1.0
FLUSH_SECONDS = 3.0
BATCH = 1000  # MLflow takes no more in one call


class Tracker(Protocol):
    """What stages log to; used as a context, so that it is always closed."""

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None: ...

    def log_data_version(self, *, tag: str, md5: str, card: DataCard) -> None: ...

    def log_file(self, path: Path, folder: str) -> None: ...

    def log_folder(self, folder: Path, name: str) -> None: ...

    def log_model(self, folder: Path, *, name: str, digest: str, params: Mapping[str, Any]) -> str | None:
        """Store a model artifact and return its URI, `None` where nothing is tracked."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_tracker(request: StageRequest) -> Tracker:
    """The tracker of a request's run, or one that does nothing where the request names none."""
    return Untracked() if request.tracking is None else MlflowTracker(request.tracking)


class Untracked:
    """Logs nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        pass

    def log_data_version(self, *, tag: str, md5: str, card: DataCard) -> None:
        pass

    def log_file(self, path: Path, folder: str) -> None:
        pass

    def log_folder(self, folder: Path, name: str) -> None:
        pass

    def log_model(self, folder: Path, *, name: str, digest: str, params: Mapping[str, Any]) -> str | None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class MlflowTracker:
    """Logs to an MLflow run that exists already.

    Raises (every method):
        ConnectionError: MLflow does not answer; trying the stage again may help.
    """

    def __init__(self, tracking: Tracking) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow

        # The model's URI (models:/m-…) is looked up on this server too.
        mlflow.set_tracking_uri(tracking.uri)
        self._uri = tracking.uri
        self._client: MlflowClient = mlflow.MlflowClient(tracking.uri)
        self._run_id = tracking.run_id
        with self._explained():
            run = self._client.get_run(self._run_id)
        self._experiment_id: str = run.info.experiment_id
        self._started_ms: int = run.info.start_time
        # A retry goes on where the killed try stopped: what is logged already is not logged twice.
        self._logged: set[tuple[str, int]] = self._already_logged(set(run.data.metrics))
        self._waiting: list[Metric] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        with self._explained():
            self._client.log_batch(self._run_id, params=[Param(name, str(value)) for name, value in params.items()])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        with self._lock:
            for name, value in metrics.items():
                if (name, step) not in self._logged:
                    self._logged.add((name, step))
                    self._waiting.append(Metric(name, float(value), now, step))

    def log_data_version(self, *, tag: str, md5: str, card: DataCard) -> None:
        """Show the data version, with its numbers of rows, on MLflow's page of the run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=tag,
            digest=md5.removesuffix(".dir")[:36],
            source_type="dvc",
            source=canonical_json({"tag": tag, "md5": md5}),
            schema=canonical_json(card.fields),
            profile=canonical_json({"rows": card.rows, "rejected": card.rejected, "classes": len(card.classes)}),
        )
        with self._explained():
            self._client.log_inputs(
                self._run_id, datasets=[DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])]
            )

    def log_file(self, path: Path, folder: str) -> None:
        with self._explained():
            self._client.log_artifact(self._run_id, str(path), folder)

    def log_folder(self, folder: Path, name: str) -> None:
        with self._explained():
            self._client.log_artifacts(self._run_id, str(folder), name)

    def log_model(self, folder: Path, *, name: str, digest: str, params: Mapping[str, Any]) -> str | None:
        from modeling.logged_model import log_model

        with self._explained():
            return log_model(
                self._client,
                folder,
                experiment_id=self._experiment_id,
                run_id=self._run_id,
                name=name,
                digest=digest,
                params={key: str(value) for key, value in params.items()},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            with self._explained():
                self._flush()

    def _work(self) -> None:
        """Sample the system and deliver what waits, until closed."""
        system, flushed = SystemMetrics(), time.monotonic()
        while not self._ended.wait(SAMPLE_SECONDS):
            second = (time.time_ns() // 1_000_000 - self._started_ms) // 1000
            self.log_metrics(system.read(), step=second)
            if time.monotonic() - flushed >= FLUSH_SECONDS:
                try:
                    self._flush()
                except Exception as error:
                    print(f"tracking: will try again: {error}", flush=True)
                flushed = time.monotonic()

    def _flush(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
        try:
            while batch:
                self._client.log_batch(self._run_id, metrics=batch[:BATCH])
                batch = batch[BATCH:]
        finally:
            with self._lock:
                self._waiting = batch + self._waiting

    def _already_logged(self, names: set[str]) -> set[tuple[str, int]]:
        with self._explained():
            return {
                (name, metric.step)
                for name in names
                if not name.startswith("system/")
                for metric in self._client.get_metric_history(self._run_id, name)
            }

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an MLflow that cannot be reached into a ConnectionError, so that the stage is tried again."""
        import requests
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, requests.RequestException) as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, requests.RequestException):
                    raise ConnectionError(f"MLflow at {self._uri} does not answer: {error}") from error
                cause = cause.__cause__ or cause.__context__
            raise
