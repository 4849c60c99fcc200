"""The compose files as written, read by the real Compose; nothing is started."""

from __future__ import annotations

import json
import os
import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from airloom.errors import ConfigError
from airloom.stack.compose import GROUPS, ONE_SHOT, compose_command

ROOT = Path(__file__).resolve().parents[2]
FILES = {group: ROOT / f"docker-compose-{group}.yml" for group in GROUPS}
ALL_PROFILES = "minio,seaweedfs,gitbucket,forge,jenkins,buildkit,grafana,exporters,cadvisor,gpu,lab,provision"
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
    """Each variable of `.env` with its value and the comment above it or its paragraph's."""
    found: dict[str, tuple[str, str]] = {}
    comment = ""
    for line in (ROOT / ".env").read_text().splitlines():
        if line.startswith("#"):
            comment = line
        elif not line.strip():
            comment = ""
        else:
            name, _, value = line.partition("=")
            found[name] = (value, comment)
    return found


@pytest.mark.parametrize("groups", WHOLE, ids="+".join)
def test_valid_alone_and_together(compose: list[str], groups: tuple[str, ...]) -> None:
    assert config(compose, groups)["services"]


def test_every_variable_is_in_env_with_a_comment() -> None:
    documented = settings_file()
    for path in FILES.values():
        for name in set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", path.read_text())):
            assert name in documented, f"{path.name} uses {name}, which .env lacks"
            assert documented[name][1], f"{name} has no comment in .env"


def test_every_image_is_pinned() -> None:
    images = {name: value for name, (value, _) in settings_file().items() if name.endswith("_IMAGE") and value}
    assert len(images) > 15
    for name, image in images.items():
        tag = image.rpartition("/")[2].partition(":")[2]
        assert "@sha256:" in image or (tag and tag != "latest" and re.search(r"\d", tag)), f"{name}={image}"


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
        assert one_shot or service["healthcheck"]["test"], name
        assert service["restart"] == ("no" if one_shot else "unless-stopped"), name
        assert service["logging"]["options"]["max-size"], name
        assert service["stop_grace_period"], name
        assert all(port["host_ip"] == "127.0.0.9" for port in service.get("ports", [])), name
        assert not service.get("privileged"), name


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


def test_secrets_are_files_and_none_is_in_an_environment(compose: list[str]) -> None:
    found = config(compose)
    files = {Path(secret["file"]) for name, secret in found["secrets"].items() if name != "ca_bundle"}
    assert {path.parent.name for path in files} == {"secrets"}
    for name, service in found["services"].items():
        for variable, value in (service.get("environment") or {}).items():
            secretive = re.search(r"PASSWORD|SECRET|TOKEN", variable) and value not in ("", None, "0")
            assert not secretive or str(value).startswith("/run/secrets"), f"{name}: {variable}"
