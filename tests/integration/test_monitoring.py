"""The project's Prometheus configuration, rules and dashboards in a real Prometheus, fed by the real exporters.

Real: the Airflow plugin's metrics and discovery, serving processes, gateway, object store, MLflow, git server, node
exporter, Pushgateway, Prometheus. Airflow's statistics come from Airflow's own code, but the exporter between is ours
(fixtures/statsd.py). MySQL's exporter, cAdvisor, DCGM, Jenkins and MinIO are texts (fixtures/exposition).
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from airloom.embedded import gateway_server
from airloom.flows.figures import figures_of
from airloom.hooks.gateway import Gateway, Upstream
from airloom.hooks.gitbucket import GitBucket
from airloom.hooks.ledger import Ledger, TaskOutcome
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import git
from tests.fixtures.prometheus import (
    MONITORING,
    PrometheusApi,
    check_rules,
    embedded_addresses,
    exposing,
    exposition,
    local_config,
    program,
    rule_expressions,
    running_program,
    running_prometheus,
    wait_for_no_problem,
    wait_for_panels,
)
from tests.fixtures.services import free_port, running
from tests.fixtures.serving import process, tiny
from tests.fixtures.statsd import Exporter, airflow_statistics

pytestmark = pytest.mark.timeout(1200)

TEXTS = {
    "mysql": "mysql-exporter:9104",
    "cadvisor": "cadvisor:8080",
    "dcgm": "dcgm-exporter:9400",
    "minio": "minio:9000",
}


@dataclass
class World:
    """A running Prometheus over everything that a small platform has."""

    url: str
    api: PrometheusApi
    gateway: Gateway
    airflow_url: str
    absent: set[str]
    releases: list[Upstream] = field(default_factory=list)


def write_ledger(ledger: Ledger) -> None:
    """What tasks and runs leave behind: three good runs, two pipelines in trouble, and one run that goes on."""
    now = datetime.now(UTC)
    stage = {"cache": "miss", "seconds": 3, "result": {"metrics": {"rows": 5000.0}, "outputs": {}}}
    returned: dict[str, Any] = {
        "preprocess": stage,
        "version": {"tag": "tiny/CV_x_DV_y", "files": 3, "size_bytes": 1_500_000},
        "train": {**stage, "result": {"metrics": {"train_loss": 0.1}, "outputs": {}}},
        "evaluate": {**stage, "cache": "hit", "result": {"metrics": {"accuracy": 0.97}, "outputs": {}}},
        "gate": {"verdict": "promoted", "metrics": {"accuracy": 0.97}, "champion_metrics": {"accuracy": 0.96}},
        "deploy": None,
        "verify": {"checked": 5, "equal": 5},
    }
    for number in range(3):
        run_id, start = f"manual__{number}", now - timedelta(minutes=30 - number)
        ledger.record_run("tiny", run_id, state="running", started_at=start)
        for task, value in returned.items():
            found = figures_of(task, value)
            ledger.record_task(
                TaskOutcome(
                    pipeline="tiny",
                    run_id=run_id,
                    task=task,
                    attempt=1,
                    state="success",
                    started_at=start,
                    finished_at=start + timedelta(seconds=3 + number),
                    seconds=3.0 + number,
                    cache=found.cache,
                    values=found.values,
                )
            )
        ledger.record_run("tiny", run_id, state="success", verdict="promoted", finished_at=start + timedelta(minutes=1))
    ledger.record_run("tiny", "manual__now", state="running", started_at=now)
    for number in range(3):
        start = now - timedelta(hours=3 - number)
        ledger.record_run(
            "stubborn", f"r{number}", state="success", verdict="rejected", started_at=start, finished_at=start
        )
    ledger.record_run("broken", "r1", state="failed", started_at=now, finished_at=now)


def keep_busy(stop: threading.Event, *actions: Callable[[], Any]) -> None:
    """Do all again and again: rates need counters that grow."""
    while not stop.is_set():
        for action in actions:
            with suppress(httpx.HTTPError):  # an answer that came too late: the next one may come in time
                action()
        stop.wait(0.05)


@pytest.fixture(scope="module")
def plugin_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_settings(tmp_path_factory.mktemp("monitoring"))


@pytest.fixture(scope="module")
def plugin(plugin_settings: Settings) -> Iterator[str]:
    """The app that Airflow's server mounts at /airloom, alone; `host:port`."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from airloom.airflow_pages import app as pages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "get_settings", lambda: plugin_settings)
        app = Starlette(routes=[Mount("/airloom", pages.create_app())])
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    plugin_settings: Settings,
    plugin: str,
    s3_store: ObjectStore,
    mlflow_settings: Settings,
    git_settings: Settings,
    session_settings: Settings,
) -> Iterator[World]:
    program("prometheus")  # before anything else is started for nothing
    folder = tmp_path_factory.mktemp("prometheus")
    write_ledger(Ledger.from_settings(plugin_settings))
    push_a_commit(git_settings, folder)
    exporter = Exporter()
    with ExitStack() as stack:
        stack.enter_context(running(gateway_server.service(plugin_settings), plugin_settings.log_dir))
        gateway = Gateway.from_settings(plugin_settings)
        releases = []
        for version, weight in (("1.0.0", 90), ("1.0.1", 10)):
            bundle = tiny.make_release(folder / "releases", version)
            served = stack.enter_context(process.ServingProcess(folder / version, bundle))
            releases.append(Upstream(url=served.url, weight=weight))
        gateway.set_upstreams("tiny", releases, max_body_bytes=100_000)
        addresses = {
            **embedded_addresses(plugin_settings),
            "airflow-api-server:8080": plugin,
            "mlflow:5000": f"127.0.0.1:{mlflow_settings.mlflow_port}",
            "forge:8081": f"127.0.0.1:{git_settings.git_port}",
            "seaweedfs:9327": embedded_addresses(session_settings)["seaweedfs:9327"],
            "statsd-exporter:9102": stack.enter_context(exposing(exporter.text)),
            "node-exporter:9100": stack.enter_context(exporter_of("prometheus-node-exporter", folder)),
            "pushgateway:9091": stack.enter_context(exporter_of("prometheus-pushgateway", folder)),
            "jenkins:8080": stack.enter_context(exposing(exposition("jenkins"))),
            **{host: stack.enter_context(exposing(exposition(job))) for job, host in TEXTS.items()},
        }
        stop = threading.Event()
        busy = threading.Thread(
            target=keep_busy,
            args=(
                stop,
                lambda: predict(gateway, tiny.picture(1, 2, 3, 4)),
                lambda: predict(gateway, b"this is no picture"),
                lambda: httpx.get(f"http://{addresses['mlflow:5000']}/version", trust_env=False, timeout=30),
                lambda: emit_airflow_statistics(exporter),
            ),
        )
        stack.callback(busy.join, 30)
        stack.callback(stop.set)
        busy.start()
        config, absent = local_config(addresses)
        url = stack.enter_context(running_prometheus(config, folder / "prometheus"))
        yield World(url, PrometheusApi(url), gateway, f"http://{plugin}", absent, releases)


def exporter_of(name: str, folder: Path) -> Any:
    """One of Debian's exporters on a port of its own; gives `host:port`."""
    from contextlib import contextmanager

    @contextmanager
    def started() -> Iterator[str]:
        address = f"127.0.0.1:{free_port()}"
        command = [program(name), f"--web.listen-address={address}"]
        with running_program(command, f"http://{address}/metrics", folder / f"{name}.log"):
            yield address

    return started()


def push_a_commit(settings: Settings, folder: Path) -> None:
    GitBucket.from_settings(settings).ensure_repo("monitored", "made by a test")
    work = folder / "work"
    git("init", "--quiet", "-b", "main", str(work), cwd=folder)
    git("commit", "--quiet", "--allow-empty", "-m", "One", cwd=work)
    user = f"{settings.git_user}:{settings.secret('git_password')}"
    address = f"{user}@127.0.0.1:{settings.git_port}/{settings.git_owner}/monitored.git"
    git("push", "--quiet", f"http://{address}", "main", cwd=work)


def predict(gateway: Gateway, body: bytes) -> None:
    url = f"{gateway.model_url('tiny')}/predict"
    httpx.post(url, content=body, headers={"Content-Type": "image/png"}, trust_env=False, timeout=30)


def emit_airflow_statistics(exporter: Exporter) -> None:
    """The calls that Airflow's scheduler, DAG processor and triggerer make, with their tags."""
    stats = airflow_statistics(exporter)
    for component in ("scheduler", "dag_processor", "triggerer"):
        stats.incr(f"{component}_heartbeat", 1, 1)
    for name, value in (("open_slots", 30), ("queued_tasks", 0), ("running_tasks", 2)):
        stats.gauge(f"executor.{name}", value=value, tags={"status": name, "executor_class_name": "LocalExecutor"})
    stats.timing("task.queued_duration", timedelta(seconds=0.4), tags={"dag_id": "tiny", "task_id": "train"})
    stats.gauge("dag_processing.import_errors", 0)
    stats.gauge("dag_processing.total_parse_time", 1.5)
    stats.gauge(
        "dag_processing.last_run.seconds_ago", 3, tags={"file_path": "/x", "bundle_name": "b", "file_name": "f"}
    )


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.2)
    return found


def test_every_panel_shows_data(world: World) -> None:
    left_out = wait_for_panels(world.url, absent_jobs=world.absent)
    assert left_out == []


def test_every_service_is_scraped(world: World) -> None:
    wait_until(lambda: all(health == ["up"] * len(health) for health in world.api.jobs().values()))
    assert world.absent == {"registry", "grafana"}
    assert len(world.api.jobs()["serving"]) == 2
    wait_for_no_problem(world.url)


def test_every_rule_is_evaluated_and_every_record_has_data(world: World) -> None:
    wait_for_panels(world.url, absent_jobs=world.absent)
    counts = check_rules(world.url)
    assert counts.keys() == {name for name, _ in rule_expressions()}
    assert [name for name, count in counts.items() if ":" in name and not count] == []
    loaded = {rule["name"] for group in world.api.get("rules")["groups"] for rule in group["rules"]}
    assert loaded == set(counts)


def test_alerts_see_what_is_wrong_and_nothing_else(world: World) -> None:
    wait_for_panels(world.url, absent_jobs=world.absent)

    def alerts() -> set[tuple[str, str]]:
        found = world.api.get("alerts")["alerts"]
        return {(alert["labels"]["alertname"], alert["labels"].get("pipeline", "")) for alert in found}

    expected = {("GateRejectsRepeatedly", "stubborn"), ("PipelineFailing", "broken")}
    # Of this machine's disks and memory nobody here knows anything. A scrape that came late is pending for a moment.
    machine = {"DiskAlmostFull", "DiskFillsUp", "MemoryShort", "ObjectStoreAlmostFull"}
    assert wait_until(lambda: {found for found in alerts() if found[0] not in machine} == expected)


def test_series_of_a_release_name_pipeline_and_release(world: World) -> None:
    def named() -> set[tuple[str, str]]:
        rows = world.api.query('sum by (pipeline, release) (airloom:serving_requests:rate5m{status="200"})')
        return {(row["metric"]["pipeline"], row["metric"]["release"]) for row in rows}

    assert wait_until(lambda: named() == {("tiny", "1.0.0"), ("tiny", "1.0.1")})


def test_images_labels_make_no_series_of_their_own(world: World) -> None:
    (row,) = wait_until(lambda: world.api.query('container_last_seen{service="redis"}'))
    assert not [label for label in row["metric"] if "opencontainers" in label]


def test_airflow_sends_nothing_that_makes_a_series_of_each_file(world: World) -> None:
    exporter = Exporter()
    emit_airflow_statistics(exporter)
    assert exporter.dropped == {"airflow.dag_processing.last_run.seconds_ago"}
    assert 'airflow_heartbeats_total{component="scheduler"} 1.0' in exporter.text()
    assert 'airflow_task_queued_duration_seconds_sum{dag_id="tiny",task_id="train"} 0.4' in exporter.text()


def test_a_release_without_traffic_is_no_target_any_more(world: World) -> None:
    last = [world.releases[1].model_copy(update={"weight": 100})]
    world.gateway.set_upstreams("tiny", last, max_body_bytes=100_000)
    wait_until(lambda: len(world.api.jobs().get("serving", [])) == 1)
    answer = httpx.get(f"{world.airflow_url}/airloom/targets", trust_env=False, timeout=60).json()
    assert answer == [{"targets": [urlsplit(last[0].url).netloc], "labels": {"pipeline": "tiny"}}]


def test_discovery_says_when_the_gateway_is_away(plugin_settings: Settings, tmp_path: Path) -> None:
    from airloom.airflow_pages.monitoring import serving_targets
    from airloom.errors import UnavailableError

    away = Gateway(f"unix:{tmp_path / 'nobody.sock'}", "http://127.0.0.1:1", tmp_path)
    with pytest.raises(UnavailableError, match="does not answer"):
        serving_targets(away)


@pytest.mark.parametrize("job", ["airloom", "serving", "git"])
def test_own_metrics_are_named_as_prometheus_wants_it(world: World, job: str) -> None:
    """Base units, `_total` for counters alone, a help text for each."""
    wait_until(lambda: job in world.api.jobs())
    targets = world.api.get("targets", state="active")["activeTargets"]
    url = next(target["scrapeUrl"] for target in targets if target["labels"]["job"] == job)
    text = httpx.get(url, trust_env=False, timeout=60).text
    assert "airloom_" in text
    command = [program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_rules_tests_hold() -> None:
    tests = sorted(str(path) for path in (MONITORING / "prometheus" / "tests").glob("*.yml"))
    done = subprocess.run(
        [program("promtool"), "test", "rules", *tests], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(tests) > 0


def test_the_configuration_is_valid() -> None:
    command = [program("promtool"), "check", "config", str(MONITORING / "prometheus" / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
