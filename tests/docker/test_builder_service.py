"""The stack's rootless engine that builds, from the project's own compose files with stand-in images."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from airloom.errors import AuthError, NotFoundError, UnavailableError
from airloom.hooks.docker_engine import connect_builder
from airloom.hooks.engine_images import EngineImages
from airloom.hooks.image_builder import ImageBuilder
from airloom.settings import Settings
from airloom.stack import doctor
from airloom.stack.compose import Compose
from airloom.stack.secret_files import write_secret_files
from tests.conftest import ROOT, make_settings
from tests.fixtures.rootless_engine import no_network
from tests.fixtures.services import free_port

NAME = f"airloom-builder-test-{os.getpid()}"
BASE = "airloom/standin-python:bookworm"


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The stack, of which builder and registry run."""
    reason = no_network()
    if reason:
        if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    port = free_port()
    settings = make_settings(
        tmp_path_factory.mktemp("home"),
        stack=NAME,
        registry=f"127.0.0.1:{port}",
        registry_port=port,
        registry_user="airloom",
    )
    write_secret_files(settings)
    standins = (ROOT / "tests" / "standin.env").read_text().splitlines()
    chosen = dict(line.split("=", 1) for line in standins if line and not line.startswith("#"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in chosen.items():
            patch.setenv(name, value)
        patch.setenv("COMPOSE_PROFILES", f"{chosen['COMPOSE_PROFILES']},builder")
        patch.setenv("AIRLOOM_STACK", NAME)
        patch.setenv("AIRLOOM_REGISTRY", settings.registry)
        patch.setenv("AIRLOOM_REGISTRY_USER", "airloom")
        patch.setenv("AIRLOOM_REGISTRY_PORT", str(port))
        patch.setenv("AIRLOOM_STANDINS", "builder registry docker-cli")
        subprocess.run(["bash", "images/standin/build.sh"], cwd=ROOT, capture_output=True, check=True)
        found = Compose(settings)
        try:
            found.run("up", "--detach", "--wait", "--wait-timeout", "400", "builder", "registry")
            yield found
        finally:
            found.run("--profile", "*", "down", "--volumes", "--remove-orphans")


def facts(compose: Compose, service: str) -> dict[str, Any]:
    inspected: dict[str, Any] = json.loads(docker("inspect", compose.run("ps", "-q", service).strip()))[0]
    return inspected


@pytest.fixture(scope="module")
def builds(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """As the services that build are told, but for the address: this machine has another name for it."""
    told = compose.config()["services"]["forge"]["environment"]
    assert told["AIRLOOM_BUILD_HOST"] == "tcp://builder:2376"
    container = facts(compose, "builder")
    certificates = tmp_path_factory.mktemp("certificates") / "client"
    docker("cp", f"{container['Id']}:/certs/client", str(certificates))
    address = container["NetworkSettings"]["Networks"][f"{NAME}-building"]["IPAddress"]
    named = {"build_host": f"tcp://{address}:2376", "build_certs": str(certificates)}
    return compose.settings.model_copy(update={**named, "build_registry": told["AIRLOOM_BUILD_REGISTRY"]})


def test_it_is_rootless_and_takes_who_has_its_certificate(compose: Compose, builds: Settings, tmp_path: Path) -> None:
    info = connect_builder(builds).info()
    assert "name=rootless" in info["SecurityOptions"]
    # It has nothing of the other engine's.
    assert info["Containers"] == 0
    container = facts(compose, "builder")
    programs = [line.split() for line in docker("top", container["Id"], "-eo", "uid,pid,comm").splitlines()[1:]]
    assert ("1000", "dockerd") in {(user, name) for user, _, name in programs}
    assert {user for user, _, _ in programs} == {"1000"}, "none of it is root on this machine"
    assert not any("docker.sock" in mount["Destination"] for mount in container["Mounts"])
    for certificates in ("", str(tmp_path)):
        with pytest.raises(AuthError, match="the Docker engine that builds and this client don't trust each other"):
            connect_builder(builds.model_copy(update={"build_certs": certificates})).info()


def test_services_find_it_by_its_name_and_may_read_the_certificate(compose: Compose) -> None:
    """As the git server does: a user of no name there, with the volume and the network of the compose files."""
    forge = compose.config()["services"]["forge"]
    host, folder = forge["environment"]["AIRLOOM_BUILD_HOST"], forge["environment"]["AIRLOOM_BUILD_CERTS"]
    (volume,) = [mount["source"] for mount in forge["volumes"] if mount["target"] == folder]
    assert "building" in forge["networks"]
    said = docker(
        *("run", "--rm", "--user", "12345:12345", "--network", f"{NAME}-building"),
        *("--volume", f"{NAME}_{volume}:{folder}:ro", "--env", f"DOCKER_HOST={host}"),
        *("--env", "DOCKER_TLS_VERIFY=1", "--env", f"DOCKER_CERT_PATH={folder}"),
        *("airloom/standin-docker-cli:1", "info", "--format", "{{.SecurityOptions}}"),
    )
    assert "name=rootless" in said


def test_doctor_knows_of_it(compose: Compose, builds: Settings) -> None:
    def found(settings: Settings, **changes: str) -> doctor.Check:
        changed = settings.model_copy(update=changes)
        (check,) = doctor._builder(changed, Compose(changed))
        return check

    (own,) = [check for check in doctor.check_machine(compose.settings) if check.name == "builder"]
    assert (own.ok, own.found) == (True, compose.settings.registry)
    without = found(compose.settings, registry="")
    assert (without.ok, without.found) == (False, "no registry")
    assert "AIRLOOM_REGISTRY=" in without.advice
    # One that somebody names
    named = found(builds)
    assert named.ok
    assert named.found.endswith(", rootless")
    away = found(builds, build_host=builds.build_host.replace(":2376", ":1"))
    assert not away.ok
    assert "the Docker engine that builds does not answer" in away.found
    for address in ("unix:///run/user/1001/docker.sock", "tcp://127.0.0.1:2376", "tcp://localhost:2376"):
        unreached = found(builds, build_host=address)
        assert (unreached.ok, unreached.found) == (False, address)
        assert "containers find nothing there" in unreached.advice


def test_what_it_builds_gets_to_the_other_engine_by_the_registry(
    compose: Compose, builds: Settings, tmp_path: Path
) -> None:
    """By two names of the same registry, with a login."""
    name, tag = f"{builds.registry}/airloom/ds_mlmodeling", "one"
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY content /\n")
    (tmp_path / "content").write_text("built\n")
    builder, here = ImageBuilder(builds), EngineImages(builds)
    image = builder.build(
        context=tmp_path, dockerfile=tmp_path / "Dockerfile", reference=f"{name}:{tag}", arguments={}, labels={},
        on_progress=print,
    )  # fmt: skip
    assert builder.find(f"{name}:{tag}")["Id"] == image  # type: ignore[index]
    assert here.find(image) is None
    digest = builder.push(name, tag)
    assert here.find(image) is None
    here.pull(f"{name}@{digest}")
    assert here.find(f"{name}@{digest}")["Id"] == image  # type: ignore[index]
    docker("rmi", f"{name}@{digest}")

    # And back: what this machine pushes, such as a runtime.
    docker("tag", BASE, f"{name}:two")
    with pytest.raises(NotFoundError, match="registry:5000/airloom/ds_mlmodeling:two cannot be pulled"):
        builder.pull(f"{name}:two")
    docker("rmi", f"{name}:two")
    compose.run("stop", "builder")
    with pytest.raises(UnavailableError, match="the Docker engine that builds"):
        builder.find(image)
