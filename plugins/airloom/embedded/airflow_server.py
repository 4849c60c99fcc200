"""Airflow as four child processes on SQLite: API server, scheduler, DAG processor and triggerer.

Everything is configured through the environment; no `airflow.cfg` is written that could go stale.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from airloom.embedded.environment import base_environment
from airloom.embedded.service import Service
from airloom.errors import PlatformError, UnavailableError
from airloom.settings import Settings

ADMIN_USER = "admin"
PRELOAD_VARIABLE = "AIRLOOM_PRELOAD"  # see airloom.listener, which must not be imported without Airflow
BUNDLE = "airloom"
PARALLEL_TASKS = 8

# A task whose worker was killed is given up after this long without a heartbeat, and tried again. A heartbeat
# waits for the database, so this is longer than the database lets anyone wait.
TASK_HEARTBEAT_TIMEOUT_SECONDS = 25
# A component that was killed shows as unhealthy after this long.
HEALTH_THRESHOLD_SECONDS = 15

# SQLite has one writer at a time, and a disk that is busy with other things may hold it up for seconds: those
# who wait for it are more patient than SQLite's 5 s, after which Airflow answers with an error.
SQLITE_TIMEOUT_SECONDS = 15
CONNECT_ARGS = {"timeout": SQLITE_TIMEOUT_SECONDS}  # Airflow imports it by its name

_COMPONENT_START_SECONDS = 120.0


def airflow_home(settings: Settings) -> Path:
    """Airflow's own state: its database, logs and password file."""
    return settings.data_dir / "airflow"


def airflow_environment(settings: Settings, database: Mapping[str, object] | None = None) -> dict[str, str]:
    """The whole configuration of Airflow, and the settings that tasks read, as environment variables.

    Args:
        database: options of Airflow's section `database`; those of SQLite in Airflow's home when not given.

    Raises:
        ConfigError: a secret is missing.
    """
    home = airflow_home(settings)
    bundle = {
        "name": BUNDLE,
        "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
        "kwargs": {"path": str(settings.project / "dags"), "refresh_interval": 5},
    }
    # Airflow wants 32 bytes in base64; the secret may be any text.
    fernet_key = base64.urlsafe_b64encode(hashlib.sha256(settings.secret("airflow_fernet_key").encode()).digest())
    options: dict[str, Mapping[str, object]] = {
        "core": {
            "executor": "LocalExecutor",
            "dags_folder": settings.project / "dags",
            "plugins_folder": home / "plugins",  # empty: the plugin comes by its entry point
            "load_examples": False,
            "dags_are_paused_at_creation": False,
            "parallelism": PARALLEL_TASKS,
            "max_active_tasks_per_dag": PARALLEL_TASKS,
            "hostname_callable": "airloom.embedded.airflow_server.host_name",
            "fernet_key": fernet_key.decode(),
            "simple_auth_manager_users": f"{ADMIN_USER}:admin",
            "simple_auth_manager_passwords_file": _password_file(settings),
            "execution_api_server_url": f"http://{settings.bind_host}:{settings.airflow_port}/execution/",
            "min_serialized_dag_update_interval": 1,
            "killed_task_cleanup_time": 30,
        },
        "database": database or _sqlite(home),
        "api": {
            "host": settings.bind_host,
            "port": settings.airflow_port,
            "base_url": settings.airflow_page_url,
            "workers": 1,
            "instance_name": "Airloom",
            "secret_key": settings.secret("airflow_api_secret"),
            "auto_refresh_interval": 2,
        },
        "api_auth": {"jwt_secret": settings.secret("airflow_jwt_secret")},
        "scheduler": {
            "scheduler_idle_sleep_time": 0.1,
            "scheduler_health_check_threshold": HEALTH_THRESHOLD_SECONDS,
            "task_instance_heartbeat_timeout": TASK_HEARTBEAT_TIMEOUT_SECONDS,
            "task_instance_heartbeat_timeout_detection_interval": 3,
            "orphaned_tasks_check_interval": 15,
            "parsing_cleanup_interval": 15,
            "task_queued_timeout": 120,
            "task_queued_timeout_check_interval": 15,
        },
        "dag_processor": {
            "dag_bundle_config_list": json.dumps([bundle]),
            "dag_bundle_storage_path": home / "bundles",
            "bundle_refresh_check_interval": 2,
            "refresh_interval": 5,
            # A changed YAML does not change the time of pipelines.py: this is how long it may go unseen.
            "min_file_process_interval": 10,
            "parsing_processes": 1,
            "stale_dag_threshold": 15,
            "health_check_threshold": HEALTH_THRESHOLD_SECONDS,
            "print_stats_interval": 0,
        },
        "triggerer": {"triggerer_health_check_threshold": HEALTH_THRESHOLD_SECONDS, "capacity": 50},
        "workers": {
            "min_heartbeat_interval": 1,
            "missing_dag_retry_delay": 5,
            "execution_api_timeout": SQLITE_TIMEOUT_SECONDS + 10,
        },
        "logging": {
            "base_log_folder": home / "logs",
            "dag_processor_child_process_log_directory": home / "logs" / "dag_processor",
            "colored_console_log": False,
            # Logs are read from the shared folder; the log servers that would be asked as well bind every
            # address and are not started, and their absence is no news.
            "namespace_levels": "airflow.utils.log.file_task_handler=CRITICAL",
        },
    }
    environment = {name: value for name, value in base_environment(settings).items() if name.startswith("AIRLOOM_")}
    environment["AIRFLOW_HOME"] = str(home)
    environment["AIRFLOW_CONFIG"] = str(home / "airflow.cfg")
    for section, values in options.items():
        for key, value in values.items():
            environment[f"AIRFLOW__{section.upper()}__{key.upper()}"] = str(value)
    # Fewer malloc arenas: each component has many threads and little to do.
    environment["MALLOC_ARENA_MAX"] = "2"
    environment["DO_NOT_TRACK"] = "1"
    return environment


def _sqlite(home: Path) -> dict[str, object]:
    return {
        "sql_alchemy_conn": f"sqlite:///{home / 'airflow.db'}",
        "sql_alchemy_connect_args": f"{__name__}.CONNECT_ARGS",
        "sql_alchemy_connect_args_async": f"{__name__}.CONNECT_ARGS",
    }


def services(settings: Settings) -> list[Service]:
    """Airflow's components in the order in which they start."""
    environment = airflow_environment(settings)
    url = settings.airflow_api_url

    def component(name: str, *arguments: str, needs: tuple[str, ...], probe: Callable[[], None]) -> Service:
        def prepared() -> None:
            prepare(settings)
            if isinstance(probe, _Heartbeat):
                probe.started()

        return Service(
            name=f"airflow-{name}",
            command=(sys.executable, "-m", "airflow", name, *arguments),
            cwd=airflow_home(settings),
            env={**environment, PRELOAD_VARIABLE: "1"} if name == "scheduler" else environment,
            ports=(settings.airflow_port,) if name == "api-server" else (),
            depends_on=needs,
            prepare=prepared,
            probe=probe,
            start_timeout_seconds=_COMPONENT_START_SECONDS,
            grace_seconds=15.0,
            urls={"UI": url, "REST API": f"{url}/docs"} if name == "api-server" else {},
            metrics_url=f"{url}/airloom/metrics" if name == "api-server" else None,
        )

    needs = ("airflow-api-server",)
    return [
        component("api-server", needs=(), probe=lambda: _probe_api(settings)),
        component("scheduler", "--skip-serve-logs", needs=needs, probe=_Heartbeat(settings, "scheduler")),
        component("dag-processor", needs=needs, probe=_Heartbeat(settings, "dag_processor")),
        component("triggerer", "--skip-serve-logs", needs=needs, probe=_Heartbeat(settings, "triggerer")),
    ]


def prepare(settings: Settings) -> None:
    """Write the password file and bring the database to this version of Airflow; once, whoever comes first.

    Raises:
        PlatformError: the database could not be migrated; the message holds what Airflow said.
    """
    home = airflow_home(settings)
    (home / "plugins").mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    with (home / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write_private(_password_file(settings), json.dumps({ADMIN_USER: settings.secret("admin_password")}))
        stamp = home / "migrated"
        wanted = version("apache-airflow")
        if (home / "airflow.db").exists() and stamp.exists() and stamp.read_text() == wanted:
            return
        environment = {**base_environment(settings), **airflow_environment(settings)}
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if done.returncode:
            raise PlatformError(
                f"Airflow's database in {home} could not be migrated:\n{(done.stdout + done.stderr)[-2000:]}",
                hint="if it was made by a later version of Airflow, start with another AIRLOOM_HOME",
            )
        _write_private(stamp, wanted)


def host_name() -> str:
    """What components call themselves: the name lookup that Airflow would do is slow where there is no DNS."""
    return os.environ.get("AIRLOOM_BIND_HOST", "127.0.0.1")


def _password_file(settings: Settings) -> Path:
    return airflow_home(settings) / "passwords.json"


def _write_private(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)


def _probe_api(settings: Settings) -> None:
    """Log in and read, as a client does."""
    from airloom.hooks.airflow_api import AirflowApi

    AirflowApi.from_settings(settings, patience_seconds=0).dags(limit=1)


class _Heartbeat:
    """Asks Airflow for a component's heartbeat; one from before the last start says nothing of the new process."""

    def __init__(self, settings: Settings, part: str) -> None:
        self._settings = settings
        self._part = part
        self._started = datetime.now(UTC)

    def started(self) -> None:
        self._started = datetime.now(UTC)

    def __call__(self) -> None:
        from airloom.hooks.airflow_api import AirflowApi

        found = AirflowApi.from_settings(self._settings, patience_seconds=0).health()[self._part]
        beat = found.get(f"latest_{self._part}_heartbeat")
        if found.get("status") != "healthy" or not beat or datetime.fromisoformat(beat) < self._started:
            raise UnavailableError(f"the {self._part} is {found.get('status')}; its last heartbeat: {beat}")
