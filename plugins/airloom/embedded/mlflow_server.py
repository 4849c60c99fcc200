"""The MLflow server: runs and models in SQLite, artifacts in the object store."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from airloom.embedded.service import Service
from airloom.settings import Settings

S3_USER = "mlflow"


def service(settings: Settings, *, artifacts: str | None = None) -> Service:
    """MLflow with one worker.

    Args:
        artifacts: where artifacts are kept; the bucket `bucket_mlflow` by default. Clients never learn of it and
            need no key for the object store: they send artifacts through the server.

    Raises:
        ConfigError: its key for the object store is missing.
    """
    folder = settings.data_dir / "mlflow"
    metrics = settings.run_dir / "mlflow-metrics"
    host, port = settings.bind_host, settings.mlflow_port
    url = f"http://{host}:{port}"
    destination = artifacts or f"s3://{settings.bucket_mlflow}/"
    # MLflow's metrics need a package that it only asks for in an extra.
    exposes = find_spec("prometheus_flask_exporter") is not None
    # The port counts in the check of the Host header.
    hosts = ",".join(f"{name}:{port}" for name in dict.fromkeys((host, "127.0.0.1", "localhost")))
    return Service(
        name="mlflow",
        command=(
            *(sys.executable, "-m", "airloom.embedded.mlflow_program", "server"),
            *("--host", host, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}?timeout=30"),
            *("--serve-artifacts", "--artifacts-destination", destination),
            *("--allowed-hosts", hosts, "--cors-allowed-origins", url),
            *(("--expose-prometheus", str(metrics)) if exposes else ()),
        ),
        cwd=folder,
        env={
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # GenAI jobs: four more processes
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint_url,
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path",
            "AWS_ACCESS_KEY_ID": S3_USER,
            "AWS_SECRET_ACCESS_KEY": settings.secret("s3_mlflow_secret"),
            "AWS_DEFAULT_REGION": settings.s3_region,
            # The user's own profiles and this machine's cloud are none of its business.
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "GIT_PYTHON_REFRESH": "quiet",
            "MALLOC_ARENA_MAX": "2",
        },
        ports=(port,),
        prepare=lambda: _prepare(folder, metrics),
        probe=lambda: _probe(url),
        start_timeout_seconds=180.0,
        urls={"UI": url},
        metrics_url=f"{url}/metrics" if exposes else None,
    )


def _prepare(folder: Path, metrics: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One file for each process that ever was; those of dead ones would be added up for ever.
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(parents=True, mode=0o700)


def _probe(url: str) -> None:
    """Read from the database through the API: `/health` is green while every client is refused."""
    import httpx

    answer = httpx.post(
        f"{url}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, timeout=10, trust_env=False
    )
    answer.raise_for_status()
    if not answer.json().get("experiments"):
        raise RuntimeError("the default experiment is not there yet")
