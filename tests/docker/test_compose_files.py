"""The compose files as written, read by the real Compose; nothing is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from airloom.errors import ConfigError
from airloom.settings import Settings
from airloom.stack.compose import GROUPS, ONE_SHOT, compose_command
from airloom.stack.doctor import check_machine

ROOT = Path(__file__).resolve().parents[2]
FILES = {group: ROOT / f"docker-compose-{group}.yml" for group in GROUPS}
ALL_PROFILES = "minio,seaweedfs,gitbucket,forge,jenkins,grafana,exporters,cadvisor,gpu,lab,provision,builder"
WHOLE = [choice for size in (1, 2, 3) for choice in combinations(GROUPS, size)]


@pytest.fixture(scope="module")
def compose() -> list[str]:
    try:
        return compose_command()
    except ConfigError as error:
        if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def config(compose: list[str], groups: tuple[str, ...] = GROUPS, **environment: str) -> dict[str, Any]:
    command = [*compose, "--env-file", str(ROOT / ".env")]
    for group in groups:
        command += ["-f", str(FILES[group])]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AIRLOOM_", "COMPOSE_"))}
    done = subprocess.run(
        [*command, "config", "--format", "json"],
        env={**clean, "COMPOSE_PROFILES": ALL_PROFILES, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def settings_file() -> dict[str, tuple[str, str]]:
    """Each variable of `.env` with its value and the comment right above it."""
    found: dict[str, tuple[str, str]] = {}
    comment = ""
    for line in (ROOT / ".env").read_text().splitlines():
        if line.startswith("#"):
            comment = line
        elif not line.strip():
            comment = ""
        else:
            name, _, value = line.partition("=")
            found[name], comment = (value, comment), ""
    return found


@pytest.mark.parametrize("groups", WHOLE, ids="+".join)
def test_valid_alone_and_together(compose: list[str], groups: tuple[str, ...]) -> None:
    assert config(compose, groups)["services"]


def test_every_variable_is_in_env_with_a_comment_of_its_own() -> None:
    documented = settings_file()
    assert [name for name, (_, comment) in documented.items() if not comment] == []
    for path in FILES.values():
        for name in set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", path.read_text())):
            assert name in documented, f"{path.name} uses {name}, which .env lacks"


def test_every_image_is_pinned() -> None:
    images = {name: value for name, (value, _) in settings_file().items() if name.endswith("_IMAGE") and value}
    assert len(images) > 15
    for name, image in images.items():
        tag = image.rpartition("/")[2].partition(":")[2]
        assert "@sha256:" in image or re.search(r"\d+[.-]\d+", tag), f"{name}={image}"


def test_images_come_from_env_alone() -> None:
    for path in FILES.values():
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            assert re.fullmatch(r"\$\{[A-Z_]+_IMAGE:\?see \.env\}", service["image"]), f"{path.name}: {name}"


def test_every_service_is_watched_bounded_and_closed(compose: list[str]) -> None:
    services = config(compose, AIRLOOM_BIND_HOST="127.0.0.9")["services"]
    assert len(services) > 25
    for name, service in services.items():
        one_shot = (service.get("labels") or {}).get(ONE_SHOT) == "true"
        assert int(service["mem_limit"]) > 0, name
        # One has no program that could ask: its job in prometheus.yml does.
        assert one_shot or name == "dcgm-exporter" or service["healthcheck"]["test"], name
        assert service["restart"] == ("no" if one_shot else "unless-stopped"), name
        assert service["logging"]["options"]["max-size"], name
        assert service["stop_grace_period"], name
        assert all(port["host_ip"] == "127.0.0.9" for port in service.get("ports", [])), name
        assert bool(service.get("privileged")) is (name == "builder"), name


def test_no_two_services_share_a_host_port(compose: list[str]) -> None:
    taken: dict[str, str] = {}
    alternatives = {"minio": "seaweedfs", "gitbucket": "forge"}
    for name, service in config(compose)["services"].items():
        for port in service.get("ports", []):
            other = taken.setdefault(port["published"], name)
            assert other in {name, alternatives.get(name), next((a for a, b in alternatives.items() if b == name), "")}


def test_only_the_proxy_and_cadvisor_see_the_socket(compose: list[str]) -> None:
    services = config(compose)["services"]
    holders = {n for n, s in services.items() if any("docker.sock" in v["target"] for v in s.get("volumes", []))}
    assert holders == {"docker-proxy", "cadvisor"}
    assert {n for n, s in services.items() if "docker" in s["networks"]} == {
        *("docker-proxy", "airflow-scheduler", "forge", "jenkins", "provision"),
    }
    assert "ports" not in services["docker-proxy"]


def test_who_builds_with_an_engine_beside_does_not_reach_the_other(compose: list[str]) -> None:
    chosen = {"AIRLOOM_BUILD_HOST": "tcp://builder:2376", "AIRLOOM_BUILD_CERTS": "builder-client"}
    services = config(compose, **chosen)["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    assert networks["docker-proxy"] == {"docker-running"}
    assert {name for name in networks if "docker-running" in networks[name]} == {
        *("docker-proxy", "airflow-scheduler", "provision"),
    }
    builders = {"airflow-scheduler", "forge", "jenkins", "provision"}
    assert {name for name in networks if "building" in networks[name]} == {"builder", *builders}
    assert "ports" not in services["builder"]
    for name, service in services.items():
        mounted = [
            volume["target"] for volume in service.get("volumes", []) if volume.get("source") == "builder-client"
        ]
        where = {"builder": ["/certs/client"], **{builds: ["/run/builder"] for builds in builders}}
        assert mounted == where.get(name, []), name
        if name in builders:
            assert service["environment"]["AIRLOOM_BUILD_CERTS"] == "/run/builder"


def test_what_is_built_reaches_neither_the_engine_nor_the_services(compose: list[str]) -> None:
    """Whatever is chosen: no network of the engine that builds has the proxy on it."""
    for host in ("", "tcp://builder:2376"):
        services = config(compose, AIRLOOM_BUILD_HOST=host)["services"]
        met = {
            name for name, service in services.items() if {"building", "outside"} & set(service["networks"])
        }  # fmt: skip
        assert met == {"builder", "registry", "airflow-scheduler", "forge", "jenkins", "provision"}
        assert set(services["builder"]["networks"]) == {"building", "outside"}
        assert not any("docker.sock" in volume["target"] for volume in services["builder"]["volumes"])


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_gitbucket_is_healthy_when_its_page_answers(compose: list[str], status: int | None, healthy: bool) -> None:
    """Its container has no other client than bash; the port alone is open as well when the application failed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/signin" and status else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    command = config(compose)["services"]["gitbucket"]["healthcheck"]["test"]
    assert command.pop(0) == "CMD"
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        command[-1] = command[-1].replace("$$", "$").replace("/8081", f"/{server.server_port}")
        if status is None:
            server.shutdown()
            server.server_close()
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        server.shutdown()
    assert (done.returncode == 0) is healthy, done.stderr


def test_prometheus_asks_what_is_there(compose: list[str]) -> None:
    """A fixed address is one of every installation's, and a name that is looked up is one service's and no alias."""
    jobs = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    everything = config(compose)["services"]
    for profiles in (settings_file()["COMPOSE_PROFILES"][0], "seaweedfs,forge"):
        always = config(compose, COMPOSE_PROFILES=profiles)["services"]
        for job in jobs:
            urls = [f"//{target}" for group in job.get("static_configs", []) for target in group["targets"]]
            urls += [discovery["url"] for discovery in job.get("http_sd_configs", [])]
            for url in urls:
                assert urlsplit(url).hostname in always, f"{job['job_name']}, with the profiles {profiles}"
    # Whatever Compose cannot ask is asked by Prometheus.
    looked_up = {name for job in jobs for found in job.get("dns_sd_configs", []) for name in found["names"]}
    assert looked_up <= everything.keys()
    assert {"forge", "statsd-exporter", "cadvisor", "dcgm-exporter"} <= looked_up
    for name in looked_up:
        assert everything[name]["networks"].keys() & everything["prometheus"]["networks"].keys(), name


def test_only_prometheus_reaches_cadvisor(compose: list[str]) -> None:
    services = config(compose)["services"]
    assert list(services["cadvisor"]["networks"]) == ["watching"]
    assert {name for name, s in services.items() if "watching" in s["networks"]} == {"cadvisor", "prometheus"}
    assert "ports" not in services["cadvisor"]
    devices = [device.get("source") for device in services["cadvisor"]["devices"]]
    assert (devices, services["cadvisor"]["cap_add"]) == (["/dev/kmsg"], ["SYSLOG"])


def test_services_that_are_meant_to_end_are_no_alarm(compose: list[str]) -> None:
    """cAdvisor makes the label of a container one of its metrics."""
    rules = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "rules" / "down.yml").read_text())["groups"][0][
        "rules"
    ]
    (expression,) = [rule["expr"] for rule in rules if rule["alert"] == "ServiceGone"]
    label = "container_label_" + re.sub(r"[^a-zA-Z0-9_]", "_", ONE_SHOT)
    assert f'{label}=""' in expression
    ending = {n for n, s in config(compose)["services"].items() if (s.get("labels") or {}).get(ONE_SHOT)}
    assert ending == {"mysql-users", "minio-users", "seaweedfs-volume", "airflow-init", "provision"}


def test_links_lead_to_where_browsers_find_this_machine(compose: list[str]) -> None:
    ports = {"AIRFLOW": "18080", "GIT": "18081", "MLFLOW": "15000", "PHPMYADMIN": "18082", "JENKINS": "18083"}
    chosen = {f"AIRLOOM_{name}_PORT": port for name, port in ports.items()}
    services = config(compose, AIRLOOM_BIND_HOST="0.0.0.0", AIRLOOM_PUBLIC_HOST="data.example", **chosen)["services"]
    for name in ("airflow-api-server", "airflow-scheduler", "provision"):
        for service in ("AIRFLOW", "GIT", "MLFLOW"):
            found = services[name]["environment"][f"AIRLOOM_{service}_PUBLIC_URL"]
            assert found == f"http://data.example:{ports[service]}"
    assert services["phpmyadmin"]["environment"]["PMA_ABSOLUTE_URI"] == "http://data.example:18082/"
    assert services["jenkins"]["environment"]["AIRLOOM_JENKINS_PUBLIC_URL"] == "http://data.example:18083/"
    assert "GITBUCKET_BASE_URL" not in services["gitbucket"]["environment"], "containers find it at another address"
    assert config(compose)["services"]["provision"]["environment"]["AIRLOOM_GIT_PUBLIC_URL"] == "http://127.0.0.1:8081"


def test_services_that_only_answer_write_nowhere(compose: list[str]) -> None:
    services = config(compose)["services"]
    found = {name for name, service in services.items() if service.get("read_only")}
    assert found >= {"redis", "gateway", "mlflow", "pushgateway", "statsd-exporter", "mysql-users"}


def test_doctor_says_that_no_engine_answers(compose: list[str], settings: Settings, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"docker_host": f"unix://{tmp_path}/nobody.sock"})
    checks = {check.name: check for check in check_machine(nowhere)}
    assert not checks["engine"].ok
    assert "AIRLOOM_DOCKER_HOST" in checks["engine"].advice
    assert {"secrets", "compose", "object store", "git server", "ports"} <= checks.keys(), "the others are made"


def test_secrets_are_files_and_none_is_in_an_environment(compose: list[str]) -> None:
    found = config(compose)
    files = {Path(secret["file"]) for name, secret in found["secrets"].items() if name != "ca_bundle"}
    assert {path.parent.name for path in files} == {"secrets"}
    for name, service in found["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            secretive = re.search(r"PASSWORD|SECRET|TOKEN", variable) and value not in ("", None, "0")
            assert not secretive or str(value).startswith("/run/secrets"), f"{name}: {variable}"
