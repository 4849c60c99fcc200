"""What the platform's image runs: `airloom-container PART`, where PART names one service of the stack.

Passwords come from the files that Compose mounts, and get into the environment of the service's process alone: neither
the container's settings nor its arguments show them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from airloom.settings import Settings, get_settings

DAGS_REPO = "myairflow_dags"
DAGS_CONNECTION = "airloom_dags"
# To the exporter that reads statsd_mapping.yml, which needs pipelines and tasks as tags, and each figure once.
STATISTICS = {
    "AIRFLOW__METRICS__STATSD_ON": "True",
    "AIRFLOW__METRICS__STATSD_HOST": "statsd-exporter",
    "AIRFLOW__METRICS__STATSD_PORT": "9125",
    "AIRFLOW__METRICS__STATSD_PREFIX": "airflow",
    "AIRFLOW__METRICS__STATSD_INFLUXDB_ENABLED": "True",
    "AIRFLOW__METRICS__LEGACY_NAMES_ON": "False",
}
MLFLOW_HOSTS = "mlflow,mlflow:5000,localhost,localhost:*,127.0.0.1,127.0.0.1:*"


def postgres_url(settings: Settings, user: str) -> str:
    """SQLAlchemy's address of the database that has its user's name."""
    return f"postgresql+psycopg2://{user}:{quote(settings.secret(f'{user}_db_password'), safe='')}@postgres:5432/{user}"


def airflow_environment(settings: Settings) -> dict[str, str]:
    """The embedded platform's configuration of Airflow with what differs between containers."""
    from airloom.embedded import airflow_server

    bundle = {
        "name": airflow_server.BUNDLE,
        "classpath": "airflow.providers.git.bundles.git.GitDagBundle",
        "kwargs": {
            "git_conn_id": DAGS_CONNECTION,
            "repo_url": f"{settings.git_base_url}/git/{settings.git_owner}/{DAGS_REPO}.git",
            "tracking_ref": "main",
            "subdir": "dags",
            "refresh_interval": 5,
        },
    }
    environment = airflow_server.airflow_environment(settings, {"sql_alchemy_conn": postgres_url(settings, "airflow")})
    environment |= {
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{settings.airflow_api_url}/execution/",
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps([bundle]),
        **STATISTICS,
        f"AIRFLOW_CONN_{DAGS_CONNECTION.upper()}": json.dumps(
            {
                "conn_type": "git",
                "host": settings.git_base_url,
                "login": settings.git_user,
                "password": settings.secret("git_password"),
            }
        ),
    }
    return environment


def neighbours(routes: str) -> list[str]:
    """The networks that a container stands in, from its `/proc/net/route`, without the addresses of their gateways.

    Those are the engine's: from them comes what reaches the container through a port of the host.
    """

    def address(text: str) -> int:
        return int.from_bytes(bytes.fromhex(text), "little")

    rows = [line.split() for line in routes.splitlines()[1:]]
    gateways = [ipaddress.IPv4Network(address(row[2])) for row in rows if address(row[2])]
    found = [ipaddress.IPv4Network((address(row[1]), address(row[7]).bit_count())) for row in rows if address(row[1])]
    for gateway in gateways:
        split = [list(net.address_exclude(gateway)) if gateway.subnet_of(net) else [net] for net in found]
        found = sorted(part for parts in split for part in parts)
    return [str(net) for net in found]


def main() -> None:
    """Become the service, or do the one-shot task, that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in _PARTS:
        sys.stderr.write(f"airloom-container: expected one of {', '.join(_PARTS)}, found {sys.argv[1:]}\n")
        raise SystemExit(2)
    os.umask(0o077)
    _PARTS[sys.argv[1]](sys.argv[2:])


def _airflow(name: str, *arguments: str) -> Callable[[list[str]], None]:
    def run(_: list[str]) -> None:
        from airloom.embedded.airflow_server import PRELOAD_VARIABLE, airflow_home

        settings = get_settings()
        environment = airflow_environment(settings)
        if name == "scheduler":
            environment[PRELOAD_VARIABLE] = "1"
        home = airflow_home(settings)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chdir(home)
        _become([sys.executable, "-m", "airflow", name, *arguments], environment)

    return run


def _init(_: list[str]) -> None:
    """PostgreSQL's databases with their users, and Airflow's tables."""
    import subprocess

    from airloom.embedded.airflow_server import ADMIN_USER, airflow_home
    from airloom.stack.databases import ensure_postgres

    settings = get_settings()
    ensure_postgres(settings)
    home = airflow_home(settings)
    (home / "plugins").mkdir(parents=True, exist_ok=True)
    _write_private(home / "passwords.json", json.dumps({ADMIN_USER: settings.secret("admin_password")}))
    environment = {**os.environ, **airflow_environment(settings)}
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], env=environment, cwd=home, check=True)


def _mysql_users(_: list[str]) -> None:
    """MySQL's databases with their users: GitBucket's own among them, which has to be there when it starts."""
    from airloom.stack.databases import ensure_mysql

    ensure_mysql(get_settings())


def _mlflow(_: list[str]) -> None:
    settings = get_settings()
    from airloom.embedded import mlflow_server

    service = mlflow_server.service(settings)
    metrics = Path("/tmp/mlflow-metrics")  # noqa: S108 - the container's own
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(mode=0o700)
    # Artifacts on their way through the server: /tmp is memory.
    transit = settings.home_dir / "mlflow-transit"
    shutil.rmtree(transit, ignore_errors=True)
    transit.mkdir(parents=True, mode=0o700)
    command = list(service.command)
    for option, value in (
        ("--backend-store-uri", "env"),
        ("--allowed-hosts", MLFLOW_HOSTS),
        ("--cors-allowed-origins", "http://localhost:*,http://127.0.0.1:*"),
        ("--expose-prometheus", str(metrics)),
    ):
        if option in command:
            command[command.index(option) + 1] = value
    # Its address holds a password, which must not stand among the arguments.
    index = command.index("--backend-store-uri")
    del command[index : index + 2]
    os.chdir("/tmp")  # noqa: S108
    database = postgres_url(settings, "mlflow")
    _become(command, {**service.env, "MLFLOW_BACKEND_STORE_URI": database, "TMPDIR": str(transit)})


def _gateway(_: list[str]) -> None:
    from airloom.embedded import gateway_server

    settings = get_settings()
    readers = [*settings.metrics_networks.split(), *neighbours(Path("/proc/net/route").read_text())]
    service = gateway_server.service(settings.model_copy(update={"metrics_networks": " ".join(readers)}))
    service.cwd.mkdir(parents=True, exist_ok=True, mode=0o700)
    service.prepare()
    os.chdir(service.cwd)
    _become(list(service.command), dict(service.env))


def _forge(_: list[str]) -> None:
    from airloom.embedded.git_server import git_data_dir

    git_data_dir(get_settings()).mkdir(parents=True, exist_ok=True, mode=0o700)
    _become([sys.executable, "-m", "airloom.embedded.forge"], {})


def _provision(arguments: list[str]) -> None:
    from airloom.stack.provision import provision_stack

    def show(step: str, state: str | None) -> None:
        sys.stdout.write(f"{step}: {state}\n")
        sys.stdout.flush()

    settings = get_settings()
    before_airflow, seed = "--before-airflow" in arguments, "--no-seed" not in arguments
    provision_stack(settings, show, before_airflow=before_airflow, seed=seed)


def _gc(arguments: list[str]) -> None:
    """Workspaces lie in the volume of Airflow's containers; says as JSON what was freed."""
    from airloom.errors import AirloomError
    from airloom.flows.gc import collect
    from airloom.hooks.connect import Hooks

    try:
        freed = collect(Hooks(get_settings()), keep_days=float(arguments[0]), dry_run="--dry-run" in arguments)
    except AirloomError as error:
        raise SystemExit(f"airloom: {error}") from error
    sys.stdout.write(f"{freed.model_dump_json()}\n")


def _add_repo(arguments: list[str]) -> None:
    """From inside, where the git server's hooks find whoever builds."""
    from airloom.embedded.provision import add_repo
    from airloom.errors import AirloomError
    from airloom.hooks.connect import Hooks

    try:
        add_repo(Hooks(get_settings()), arguments[0])
    except AirloomError as error:
        raise SystemExit(f"airloom: {error}") from error


def _healthy(arguments: list[str]) -> None:
    """Exit 0 when an address answers with 200."""
    import urllib.request

    with urllib.request.urlopen(arguments[0], timeout=10) as answer:  # noqa: S310 - from the compose file
        raise SystemExit(0 if answer.status == 200 else 1)


def _beats(arguments: list[str]) -> None:
    """Exit 0 when Airflow counts a component as healthy."""
    import urllib.request

    url = f"{os.environ['AIRLOOM_AIRFLOW_URL']}/api/v2/monitor/health"
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - from the compose file
        raise SystemExit(0 if json.load(answer)[arguments[0]]["status"] == "healthy" else 1)


_PARTS: dict[str, Callable[[list[str]], None]] = {
    "init": _init,
    "mysql-users": _mysql_users,
    "api-server": _airflow("api-server"),
    "scheduler": _airflow("scheduler", "--skip-serve-logs"),
    "dag-processor": _airflow("dag-processor"),
    "triggerer": _airflow("triggerer", "--skip-serve-logs"),
    "mlflow": _mlflow,
    "gateway": _gateway,
    "forge": _forge,
    "provision": _provision,
    "add-repo": _add_repo,
    "gc": _gc,
    "healthy": _healthy,
    "beats": _beats,
}


def _become(command: list[str], environment: dict[str, str]) -> None:
    os.execvpe(command[0], command, {**os.environ, **environment})  # noqa: S606 - no shell is meant


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
