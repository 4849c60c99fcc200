"""The stack comes up from the project's own compose files with stand-in images, twice, and leaves nothing behind."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pymysql
import pytest
import requests

from airloom.contract import ImageRef, Release
from airloom.contract.push import PushSeen
from airloom.embedded.seed import digits
from airloom.errors import ConfigError
from airloom.flows.build import STATUS_CONTEXT, find_build
from airloom.flows.push_entry import write_entry
from airloom.hooks.connect import Hooks
from airloom.hooks.registry import find_image
from airloom.settings import Settings
from airloom.stack.compose import compose_command
from tests.fixtures.browser import browser
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.services import free_port
from tests.fixtures.stage_repo import wait_until

ROOT = Path(__file__).resolve().parents[2]
PORTS = (
    *("AIRFLOW", "GIT", "MLFLOW", "S3", "GATEWAY", "MYSQL", "PHPMYADMIN", "S3_CONSOLE", "JENKINS", "REGISTRY"),
    *("PROMETHEUS", "GRAFANA", "JUPYTER"),
)
PLATFORM = "airloom/platform:0.1.0"
UID = os.getuid() or 12345
AIRLOOM = (sys.executable, "-c", "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()")

pytestmark = pytest.mark.timeout(2700)


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
        # None that the kernel may give to somebody before the stack has started.
        self.ports = {name: free_port() for name in PORTS}
        self.environment = {
            **os.environ,
            **chosen,
            "AIRLOOM_HOME": str(home),
            "AIRLOOM_STACK": self.name,
            # As where an ordinary user starts it: what root may do in a container hides what others may not.
            "AIRLOOM_UID": str(UID),
            "AIRLOOM_GID": str(UID),
            # Runtimes are shared with other tests; wheels that this machine has need no index of PyTorch's.
            "AIRLOOM_IMAGE_NAMESPACE": "airloom-test",
            "AIRLOOM_TORCH_BACKEND": "" if os.environ.get("AIRLOOM_WHEELS") else "cpu",
            # Tests start the reconciler themselves.
            "AIRLOOM_RECONCILE_MINUTES": "0",
            # Images go through the stack's own registry.
            "AIRLOOM_REGISTRY": self.registry,
            "AIRLOOM_REGISTRY_USER": "airloom",
            **{f"AIRLOOM_{name}_PORT": str(port) for name, port in self.ports.items()},
        }

    @property
    def registry(self) -> str:
        """The stack's own, as the engine calls it."""
        return f"127.0.0.1:{self.ports['REGISTRY']}"

    def hooks(self) -> Hooks:
        """As this machine's commands reach the stack."""
        ports = {f"{name.lower()}_port": self.ports[name] for name in ("AIRFLOW", "GIT", "S3")}
        login = {"registry": self.registry, "registry_user": "airloom"}
        return Hooks(Settings(_env_file=None, project=ROOT, home=self.home, **ports, **login))

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """What images containers of stages and releases are made of meanwhile, as they were named."""
        made: list[str] = []
        # From now on, however long the client takes to start.
        shown = ["--filter", "event=create", "--format", "{{.Actor.Attributes.image}}", "--since", f"{time.time():f}"]
        command = ["docker", "events", "--filter", f"label=airloom.instance={self.name}", *shown]
        with subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True) as events:
            thread = Thread(target=lambda: made.extend(line.strip() for line in events.stdout or ()), daemon=True)
            thread.start()
            yield made
            events.terminate()
            thread.join(60)

    def id_of(self, image: str) -> str:
        """Empty where the engine has none."""
        return self.run(["docker", "image", "inspect", "--format", "{{.Id}}", image]).stdout.strip()

    def images(self) -> list[str]:
        """Every reference in the engine to the stack's registry; what was pulled by its digest has no tag."""
        shown = "{{.Repository}}:{{.Tag}}@{{.Digest}}"
        listed = self.run(["docker", "images", "--digests", "--format", shown]).stdout.split()
        own = [name for name in listed if name.startswith(f"{self.registry}/")]
        return [name.replace(":<none>", "") if ":<none>@" in name else name.partition("@")[0] for name in own]

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
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=90) as answer:
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
        for path in [found.home, *found.home.rglob("*")]:
            os.chown(path, UID, UID)
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
        for image in found.images():
            found.run(["docker", "rmi", "--force", image])


def image_of(hooks: Hooks, repo: str, commit: str) -> ImageRef:
    """What `airloom build` recorded."""
    record = find_build(hooks, repo, commit)
    assert record is not None
    assert record.image is not None
    assert record.image.pushed
    return record.image


def containers(stack: Stack) -> dict[str, Any]:
    return {s["Service"]: s for s in json.loads(stack.airloom("status", "--json"))["services"]}


def test_every_service_is_healthy(stack: Stack) -> None:
    found = containers(stack)
    assert {"mysql", "seaweedfs", "forge", "airflow-scheduler", "mlflow", "gateway", "prometheus"} <= found.keys()

    def wrong() -> dict[str, str]:
        services = containers(stack).items()
        return {n: s["Health"] for n, s in services if s["State"] != "exited" and s["Health"] != "healthy"}

    # On a busy machine, one may have answered its last check too late.
    wait_until(lambda: not wrong(), wrong, seconds=240)


def test_a_second_up_changes_nothing(stack: Stack) -> None:
    before = {name: s["ID"] for name, s in containers(stack).items() if s["State"] == "running"}
    said = stack.airloom("up")
    assert {name: s["ID"] for name, s in containers(stack).items() if s["State"] == "running"} == before
    assert "first time" not in said
    assert "were loaded before" in said
    assert "myairflow_dags is as dags/ here" in said


def test_source_tables_are_seen_in_phpmyadmin(stack: Stack) -> None:
    """By the user who may only read, through the real login page."""
    url = f"http://127.0.0.1:{stack.ports['PHPMYADMIN']}/"
    with requests.Session() as browser:
        token = re.search(r'name="token" value="([^"]+)"', browser.get(url, timeout=60).text)
        assert token
        login = {
            "pma_username": "source_reader",
            "pma_password": (stack.home / "secrets" / "mysql_source_reader_password").read_text().strip(),
            "server": "1",
            "token": html.unescape(token[1]),
        }
        browser.post(f"{url}index.php?route=/", data=login, timeout=60)
        page = browser.get(f"{url}index.php?route=/sql&db=source&table=airlines", timeout=60).text
    assert "Endeavor Air Inc." in page
    assert "CC0" in page, "the table says where it comes from"
    reader = pymysql.connect(
        host="127.0.0.1", port=stack.ports["MYSQL"], user="source_reader", password=login["pma_password"]
    )
    with reader, reader.cursor() as cursor:
        cursor.execute("SELECT (SELECT COUNT(*) FROM source.flights), (SELECT COUNT(*) FROM source.weather)")
        assert cursor.fetchone() == (336776, 26115)


def test_pipeline_runs_and_its_release_answers(stack: Stack) -> None:
    """From raw files to a receipt: every stage and the release in a container of its own, of an image by its digest."""
    with stack.watched() as made:
        summary = json.loads(stack.airloom("run", "digits", "--json"))
    assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
    _, picture = next(digits())
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.ports['GATEWAY']}/digits/predict", data=picture, headers={"Content-Type": "image/png"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        predicted = json.load(answer)
    assert predicted["release"] == "1.0.0"

    deadline = time.monotonic() + 120
    while True:
        done = stack.run([*AIRLOOM, "receipt", predicted["id"], "--json"])
        if not done.returncode or time.monotonic() > deadline:
            break
        time.sleep(0.5)  # an answer reaches the prediction log a moment after its client
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    assert receipt["release"]["run_id"] == summary["run_id"]
    assert receipt["release"]["image"]["tag"] == receipt["release"]["serving_commit"]

    hooks = stack.hooks()
    release = Release.model_validate(receipt["release"])
    commits = {**release.lineage, release.serving_repo: release.serving_commit}
    images = {repo: image_of(hooks, repo, commit) for repo, commit in commits.items()}
    assert len(images) == 3
    assert {name for name in made if not name.startswith("sha256:")} == {i.pull_ref for i in images.values()}
    for image in (*images.values(), ImageRef.model_validate(receipt["image"])):
        assert image.pull_ref.startswith(f"{stack.registry}/airloom-test/")
        assert find_image(hooks.settings, image.name, image.tag) == image.digest

    shown = ["--format", "{{.Names}} of {{.Image}}: {{.Command}}", "--filter", f"label=airloom.instance={stack.name}"]
    running = stack.run(["docker", "ps", *shown]).stdout.splitlines()
    assert len(running) == 1, running
    container = running[0].split()[0]
    facts = json.loads(stack.run(["docker", "inspect", container]).stdout)[0]
    assert facts["Config"]["Labels"]["airloom.release"] == "1.0.0"
    assert facts["Config"]["User"].startswith("10001")
    assert facts["HostConfig"]["ReadonlyRootfs"]
    assert not facts["HostConfig"]["PortBindings"], "only the gateway is reached from outside"
    secrets = [path.read_text().strip() for path in (stack.home / "secrets").iterdir()]
    assert not [secret for secret in secrets if len(secret) >= 16 and secret in json.dumps(facts)]

    replayed = json.loads(stack.airloom("replay", predicted["id"], "--json"))
    assert replayed["same"], replayed

    # The engine loses an image that a task needs: it is pulled by its digest, with the login.
    lost = images["ds_mlmodeling"].pull_ref
    assert stack.run(["docker", "rmi", "--force", stack.id_of(lost)]).returncode == 0
    assert stack.id_of(lost) == ""
    bucket = hooks.settings.bucket_airloom
    for found in list(hooks.store.list(bucket, "cache/evaluate/")):
        hooks.store.remove(bucket, found.key)
    with stack.watched() as made:
        again = json.loads(stack.airloom("run", "digits", "--json"))
    used = {task["task"]: task["cache"] for task in again["tasks"]}
    assert (used["preprocess"], used["train"], used["evaluate"]) == ("hit", "hit", "miss"), again
    assert set(made) == {lost}
    assert stack.id_of(lost)


def test_a_push_whose_event_is_lost_is_built_by_the_reconciler(stack: Stack, tmp_path: Path) -> None:
    """Its DAG builds the image from within Airflow's container, and says so on the commit."""
    hooks, name, dag = stack.hooks(), "ds_modelserving", "airloom__reconcile"
    for hook in hooks.gitbucket.hooks(name):
        hooks.gitbucket._call("DELETE", f"repos/airloom/{name}/hooks/{hook['id']}")
    repo = StageRepoFixture(hooks.settings, name, tmp_path / name)
    git("clone", "--quiet", repo.url, str(repo.work), cwd=tmp_path)
    app = (repo.work / "serving" / "app.py").read_text()
    commit = repo.commit_files("Tell nobody", {"serving/app.py": f"{app}\n# Found by the reconciler.\n"})
    repo.push()
    hooks.airflow.pause("digits")  # what a told pipeline does is tested elsewhere
    # As if a look an hour ago had met it: its event is no longer waited for.
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    write_entry(hooks, PushSeen(repo=name, commit=commit, id=commit, at=an_hour_ago))
    run_id = hooks.airflow.trigger(dag)
    state = hooks.airflow.wait(dag, run_id, timeout_seconds=1200)["state"]
    assert state == "success", [hooks.airflow.task_log(dag, run_id, "reconcile", number)[-30:] for number in (1, 2)]
    actions = hooks.airflow.xcom(dag, run_id, "reconcile")
    # A try whose end Airflow did not learn of has done it already, and the next one finds nothing to do.
    if actions or hooks.airflow.task_instance(dag, run_id, "reconcile")["try_number"] == 1:
        (action,) = actions
        assert (action["repo"], action["commit"], action["did"]) == (name, commit, "built"), action
    image, record = image_of(hooks, name, commit), find_build(hooks, name, commit)
    assert (record and record.airflow, image.tag) == ("told", commit)
    assert find_image(hooks.settings, image.name, commit) == image.digest
    facts = json.loads(stack.run(["docker", "inspect", image.pull_ref]).stdout)[0]
    assert facts["Config"]["Labels"]["org.opencontainers.image.revision"] == commit
    statuses = {row["context"]: row for row in hooks.gitbucket.statuses(name, commit)}
    assert statuses[STATUS_CONTEXT]["state"] == "success"
    assert "Airflow has been told" in statuses[STATUS_CONTEXT]["description"]


def test_prometheus_reaches_everything_that_it_asks(stack: Stack) -> None:
    """Now that a release answers: no target is down, and so no alert says so."""
    jobs = {"prometheus", "airloom", "serving", "gateway", "mlflow", "seaweedfs", "git", "registry", "pushgateway"}
    deadline = time.monotonic() + 400  # an alert on the start is over two rounds after it
    while True:
        targets = json.loads(stack.page("PROMETHEUS", "/api/v1/targets?state=active"))["data"]["activeTargets"]
        alerts = json.loads(stack.page("PROMETHEUS", "/api/v1/alerts"))["data"]["alerts"]
        down = {t["scrapeUrl"]: t["lastError"] or t["health"] for t in targets if t["health"] != "up"}
        gone = {a["labels"]["alertname"] for a in alerts} & {"TargetDown", "JobGone", "ServiceGone"}
        if not (down or gone) or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert (down, gone) == ({}, set())
    assert {target["labels"]["job"] for target in targets} == jobs
    status = ["status", "--json"]
    wait_until(lambda: json.loads(stack.airloom(*status))["ready"], lambda: stack.airloom(*status), seconds=240)
    metrics = stack.page("AIRFLOW", "/airloom/metrics")
    for name, port in (("airflow", "AIRFLOW"), ("git", "GIT"), ("mlflow", "MLFLOW")):
        assert f'{name}="http://127.0.0.1:{stack.ports[port]}"' in metrics, "dashboards' links are for browsers"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        stack.page("GATEWAY", "/-/metrics")  # they name every model's traffic


def test_gc_sees_the_workspaces_of_the_stack(stack: Stack) -> None:
    said = json.loads(stack.airloom("gc", "--keep-days", "0", "--dry-run", "--json"))
    assert "digits" in {item["pipeline"] for item in said["removed"]}
    assert said["size_bytes"] > 0


def test_logs_are_those_of_the_containers(stack: Stack) -> None:
    assert "gateway" in stack.airloom("logs", "gateway", "--lines", "5")


LOG_IN = """
    fetch('/auth/token', {
      method: 'POST', headers: {'Content-Type': 'application/json'},
      body: JSON.stringify({username: 'admin', password: PASSWORD}),
    }).then(answer => answer.json()).then(body => document.cookie = `_token=${body.access_token}; path=/`)
"""


def test_pages_are_seen_in_a_browser(stack: Stack, tmp_path: Path) -> None:
    """As a person sees them who has logged in: with what their scripts have put there."""
    airflow = f"http://127.0.0.1:{stack.ports['AIRFLOW']}"
    password = (stack.home / "secrets" / "admin_password").read_text().strip()
    with browser(tmp_path) as tab:
        tab.open(f"http://127.0.0.1:{stack.ports['PHPMYADMIN']}/")
        tab.wait_for_text("Welcome to phpMyAdmin", "Username:")
        tab.open(f"{airflow}/")
        tab.wait_for_text("Sign in")
        assert tab.run(LOG_IN.replace("PASSWORD", json.dumps(password)))
        tab.open(f"{airflow}/dags/digits")
        tab.wait_for_text("digits", "preprocess", "Trigger")
        tab.open(f"{airflow}/airloom/")
        tab.wait_for_text("digits", "success")
        tab.open(f"{airflow}/airloom/receipts")
        tab.wait_for_text("Latest of digits", "1.0.0")


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
