"""A real MLflow in front of a real object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from airloom.embedded import mlflow_server
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.services import running


@pytest.fixture(scope="module")
def mlflow_on_s3(
    s3_store: ObjectStore,
    session_settings: Settings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Settings]:
    """MLflow in a folder of an odd name, on the session's object store."""
    home = tmp_path_factory.mktemp("mlflow") / "höhe mit leerzeichen"
    settings = make_settings(home, s3_url=session_settings.s3_endpoint_url)
    (settings.secrets_dir / "s3_mlflow_secret").write_text(session_settings.secret("s3_mlflow_secret"))
    with running(mlflow_server.service(settings), settings.log_dir):
        yield settings


def call(settings: Settings, path: str, body: dict[str, object]) -> httpx.Response:
    return httpx.post(f"{settings.mlflow_api_url}/api/2.0/mlflow/{path}", json=body, timeout=30, trust_env=False)


def test_artifacts_go_through_the_server_into_its_bucket(
    mlflow_on_s3: Settings,
    s3_store: ObjectStore,
    session_settings: Settings,
) -> None:
    experiment = call(mlflow_on_s3, "experiments/create", {"name": "e"}).json()["experiment_id"]
    run = call(mlflow_on_s3, "runs/create", {"experiment_id": experiment}).json()["run"]["info"]
    assert run["artifact_uri"].startswith("mlflow-artifacts:/")
    path = f"{run['artifact_uri'].removeprefix('mlflow-artifacts:/')}/a.txt"
    address = f"{mlflow_on_s3.mlflow_api_url}/api/2.0/mlflow-artifacts/artifacts/{path}"
    assert httpx.put(address, content=b"abc", timeout=30, trust_env=False).status_code == 200
    assert httpx.get(address, timeout=30, trust_env=False).content == b"abc"
    as_mlflow = ObjectStore.from_settings(session_settings, user="mlflow")
    assert as_mlflow.get_bytes(session_settings.bucket_mlflow, path) == b"abc"


def test_other_host_names_are_refused(mlflow_on_s3: Settings) -> None:
    address = f"{mlflow_on_s3.mlflow_api_url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(address, trust_env=False).status_code == 200
    assert httpx.get(address, headers={"Host": "evil.example"}, trust_env=False).status_code == 403


def test_no_second_process_waits_for_the_server(mlflow_on_s3: Settings) -> None:
    import psutil

    port = str(mlflow_on_s3.mlflow_port)
    processes = [p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or [])]
    assert len(processes) == 1
    assert "uvicorn" in processes[0].info["cmdline"]


def test_metrics_of_dead_processes_are_removed_at_start(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "home")
    folder = settings.run_dir / "mlflow-metrics"
    folder.mkdir(parents=True)
    (folder / "counter_1.db").write_text("old")
    mlflow_server.service(settings).prepare()
    assert list(folder.iterdir()) == []
