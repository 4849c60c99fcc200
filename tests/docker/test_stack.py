"""The stack comes up from the project's own compose files with stand-in images, twice, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from airloom.embedded.seed import digits
from airloom.errors import ConfigError
from airloom.stack.compose import compose_command

ROOT = Path(__file__).resolve().parents[2]
PORTS = (
    *("AIRFLOW", "GIT", "MLFLOW", "S3", "GATEWAY", "MYSQL", "PHPMYADMIN", "S3_CONSOLE", "JENKINS", "REGISTRY"),
    *("PROMETHEUS", "GRAFANA", "JUPYTER"),
)
PLATFORM = "airloom/platform:0.1.0"
AIRLOOM = (sys.executable, "-c", "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()")

pytestmark = pytest.mark.timeout(1500)


class Stack:
    """One installation with names and ports of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.name = f"airloom-test-{os.getpid()}"
        chosen = dict(
            line.split("=", 1)
            for line in (ROOT / "tests" / "standin.env").read_text().splitlines()
            if line and not line.startswith("#")
        )
        with ExitStack() as held:
            sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
            self.ports = {name: found.getsockname()[1] for name, found in zip(PORTS, sockets, strict=True)}
        self.environment = {
            **os.environ,
            **chosen,
            "AIRLOOM_HOME": str(home),
            "AIRLOOM_STACK": self.name,
            # Runtimes are shared with other tests; wheels that this machine has need no index of PyTorch's.
            "AIRLOOM_IMAGE_NAMESPACE": "airloom-test",
            "AIRLOOM_TORCH_BACKEND": "" if os.environ.get("AIRLOOM_WHEELS") else "cpu",
            **{f"AIRLOOM_{name}_PORT": str(port) for name, port in self.ports.items()},
        }

    def airloom(self, *arguments: str) -> str:
        done = self.run([*AIRLOOM, *arguments])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    def things(self, kind: str) -> list[str]:
        label = f"label=com.docker.compose.project={self.name}"
        everything = ["--all"] if kind == "container" else []
        return self.run(["docker", kind, "ls", "-q", *everything, "--filter", label]).stdout.split()

    def page(self, port: str, path: str = "/") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=20) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    try:
        compose_command()
    except ConfigError as error:
        if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    found = Stack(tmp_path_factory.mktemp("stack"))
    bundle = os.environ.get("AIRLOOM_CA_BUNDLE", "")
    secret = ["--secret", f"id=ca,src={bundle}"] if bundle else []
    found.environment["DOCKER_BUILDKIT"] = "1"
    build = ["docker", "build", "-q", *secret, "--build-arg", "AIRLOOM_PYTHON_IMAGE", "--build-arg", "DOCKER_CLI_IMAGE"]
    build += ["-f", "images/airflow/Dockerfile", "-t", PLATFORM, "."]
    for command in (["bash", "images/standin/build.sh"], build):
        done = found.run(command)
        assert done.returncode == 0, done.stderr[-3000:]
    try:
        found.airloom("init")
        assert json.loads(found.airloom("doctor", "--json"))["ok"]
        found.airloom("up")
        yield found
    finally:
        own = f"label=airloom.instance={found.name}"
        for container in found.run(["docker", "ps", "-aq", "--filter", own]).stdout.split():
            found.run(["docker", "rm", "-f", container])
        command = [*compose_command(), "-p", found.name, "down", "--volumes", "--remove-orphans"]
        found.run(command)
        journals = found.run(["docker", "volume", "ls", "-q", "--filter", own]).stdout.split()
        for volume in [*found.things("volume"), *journals]:
            found.run(["docker", "volume", "rm", "--force", volume])


def containers(stack: Stack) -> dict[str, Any]:
    return {s["Service"]: s for s in json.loads(stack.airloom("status", "--json"))["services"]}


def test_every_service_is_healthy(stack: Stack) -> None:
    found = containers(stack)
    assert {"mysql", "seaweedfs", "forge", "airflow-scheduler", "mlflow", "gateway", "prometheus"} <= found.keys()
    wrong = {n: s["Health"] for n, s in found.items() if s["State"] != "exited" and s["Health"] != "healthy"}
    assert not wrong


def test_a_second_up_changes_nothing(stack: Stack) -> None:
    before = {name: s["ID"] for name, s in containers(stack).items() if s["State"] == "running"}
    said = stack.airloom("up")
    assert {name: s["ID"] for name, s in containers(stack).items() if s["State"] == "running"} == before
    assert "first time" not in said


def test_pipeline_runs_and_its_release_answers(stack: Stack) -> None:
    """From raw files to a receipt: every stage and the release in a container of its own."""
    summary = json.loads(stack.airloom("run", "digits", "--json"))
    assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
    _, picture = next(digits())
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.ports['GATEWAY']}/digits/predict", data=picture, headers={"Content-Type": "image/png"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        predicted = json.load(answer)
    assert predicted["release"] == "1.0.0"

    deadline = time.monotonic() + 30
    while True:
        done = stack.run([*AIRLOOM, "receipt", predicted["id"], "--json"])
        if not done.returncode or time.monotonic() > deadline:
            break
        time.sleep(0.5)  # an answer reaches the prediction log a moment after its client
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["release"]["run_id"] == summary["run_id"]
    assert receipt["release"]["image"]["tag"] == receipt["release"]["serving_commit"]

    (container,) = stack.run(["docker", "ps", "-q", "--filter", f"label=airloom.instance={stack.name}"]).stdout.split()
    facts = json.loads(stack.run(["docker", "inspect", container]).stdout)[0]
    assert facts["Config"]["Labels"]["airloom.release"] == "1.0.0"
    assert facts["Config"]["User"].startswith("10001")
    assert facts["HostConfig"]["ReadonlyRootfs"]
    assert not facts["HostConfig"]["PortBindings"], "only the gateway is reached from outside"
    secrets = [path.read_text().strip() for path in (stack.home / "secrets").iterdir()]
    assert not [secret for secret in secrets if len(secret) >= 16 and secret in json.dumps(facts)]

    again = json.loads(stack.airloom("run", "digits", "--json"))
    assert {t["cache"] for t in again["tasks"] if t["task"] in {"preprocess", "train"}} == {"hit"}


def test_logs_are_those_of_the_containers(stack: Stack) -> None:
    assert "gateway" in stack.airloom("logs", "gateway", "--lines", "5")


def test_pages_are_seen_in_a_browser(stack: Stack) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    for port, word in (("PHPMYADMIN", "phpMyAdmin"), ("AIRFLOW", "Airflow")):
        url = f"http://127.0.0.1:{stack.ports[port]}/"
        done = stack.run([browser, "--headless", "--no-sandbox", "--virtual-time-budget=15000", "--dump-dom", url])
        assert word in done.stdout


def test_down_keeps_the_data_and_nothing_else(stack: Stack) -> None:
    stack.airloom("down")
    assert stack.things("container") == []
    assert stack.things("network") == []
    assert stack.things("volume")
    own = f"label=airloom.instance={stack.name}"
    assert stack.run(["docker", "ps", "-aq", "--filter", own]).stdout == ""


def test_clean_removes_the_data_too(stack: Stack) -> None:
    """The last test of this file: nothing of the stack is left on the machine."""
    assert "are removed" in stack.airloom("clean", "--yes")
    assert stack.things("volume") == []
    own = f"label=airloom.instance={stack.name}"
    assert stack.run(["docker", "volume", "ls", "-q", "--filter", own]).stdout == ""
    assert not stack.home.exists()
