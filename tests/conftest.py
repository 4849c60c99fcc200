"""Marks tests by their folder and gives each a project of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from airloom.settings import SECRET_NAMES, Settings
from tests.fixtures.services import free_port, free_range

ROOT = Path(__file__).parent.parent
E2E_SECONDS = 1800
# Each is known to pytest once, so that what lasts a session is started once.
pytest_plugins = [
    f"tests.fixtures.{name}"
    for name in (
        "airflow",
        "deploy_world",
        "git",
        "gitbucket_server",
        "image_registry",
        "jenkins_server",
        "mlflow",
        "pushes",
        "registry",
        "s3",
        "stage_repo",
        "stage_image",  # imports stage_repo
        "stage_flow",  # likewise
    )
]

# Importing Airflow writes into its home, which must not be the user's; tests of a real one set up their own.
if "AIRFLOW_HOME" not in os.environ or "PYTEST_XDIST_WORKER" in os.environ:  # a worker inherits the first one's
    os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airloom-airflow-")
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
    atexit.register(shutil.rmtree, os.environ["AIRFLOW_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(ROOT / "tests"):  # a stage repo's own, run beside these
            continue
        kind = item.path.relative_to(ROOT / "tests").parts[0]
        if kind in {"unit", "integration", "e2e", "docker"}:
            item.add_marker(kind)
        if kind == "e2e" and item.get_closest_marker("timeout") is None:
            # The first one starts the platform as well; and whole runs are slow where others use the machine.
            item.add_marker(pytest.mark.timeout(E2E_SECONDS))


def make_settings(folder: Path, **overrides: object) -> Settings:
    """Settings with secrets, ports and a home that belong to one test alone."""
    serving, internal = free_range(20), free_range(20)
    values: dict[str, object] = {
        "project": ROOT,
        "home": folder,
        "s3_port": free_port(),
        "git_port": free_port(),
        "mlflow_port": free_port(),
        "airflow_port": free_port(),
        "gateway_port": free_port(),
        "serving_ports": f"{serving}-{serving + 19}",
        "internal_ports": f"{internal}-{internal + 19}",
        **overrides,
    }
    settings = Settings(_env_file=None, **values)
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.secrets_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in SECRET_NAMES:
        (settings.secrets_dir / name).write_text(f"test-{name}-" + "x" * 64)
    return settings


@pytest.fixture(scope="session")
def session_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One set of settings for services that tests share."""
    return make_settings(tmp_path_factory.mktemp("home"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings that belong to one test."""
    return make_settings(tmp_path / "home")
