"""The embedded platform with stages in containers: the same results as from processes, from images of each commit."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import certifi
import httpx
import pytest
import yaml
from dotenv import dotenv_values

from airloom.cli.runs import summarize
from airloom.contract import DataVersion, Release, RunPlan, Stage, StageOutcome
from airloom.contract.plan import safe_run_id
from airloom.errors import NotFoundError
from airloom.flows.build import find_build
from airloom.flows.deployments import deployment
from airloom.flows.release import release_of
from tests.e2e.actions import PARAMS, STAGES, caches, edit, wait_for_build
from tests.e2e.conftest import ROOT, RUN_SECONDS, Platform
from tests.fixtures.airflow import kill_worker
from tests.fixtures.stage_image import BASE

NAME = "digits_docker"
MARK = f"airloom-{uuid.uuid4()}"

pytestmark = pytest.mark.timeout(2400)  # the first build of the runtimes downloads their packages


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout.strip()


def _without_engine() -> str | None:
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no Docker engine answers: {done.stderr.strip()[-300:]}"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """Both pipelines have run once: `digits` as processes, its copy `digits_docker` as containers."""
    reason = _without_engine()
    if reason is not None:
        if os.environ.get("AIRLOOM_REQUIRE_DOCKER") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    # A mark in the authorities' certificates shows where a build has left them.
    bundle = tmp_path_factory.mktemp("authorities") / "bundle.crt"
    bundle.write_text(f"{Path(os.environ.get('AIRLOOM_CA_BUNDLE') or certifi.where()).read_text()}\n# {MARK}\n")
    found = Platform(
        tmp_path_factory.mktemp("docker"),
        image_namespace="airloom-test",
        python_image=os.environ.get("AIRLOOM_TEST_PYTHON_IMAGE", BASE),
        torch_backend="" if os.environ.get("AIRLOOM_WHEELS") else "cpu",
        wheels=os.environ.get("AIRLOOM_WHEELS", ""),
        ca_bundle=str(bundle),
    )
    shutil.copytree(ROOT / "images", found.project / "images")
    shutil.copytree(ROOT / "requirements", found.project / "requirements")
    shutil.copy(ROOT / "pyproject.toml", found.project)
    config = yaml.safe_load(found.config.read_text())
    config |= {"name": NAME, "runner": "docker"}
    (found.config.with_name(f"{NAME}.yaml")).write_text(yaml.safe_dump(config, sort_keys=False))
    found.airloom("init")
    found.airloom("images", "build", timeout=1800)
    try:  # a start that fails half way has services running too
        found.airloom("up", "--embedded")
        found.first = found.run()
        yield found
    finally:
        found.airloom("down", check=False)
        own = f"label=airloom.instance={found.settings.instance_id}"
        for volume in docker("volume", "ls", "-q", "--filter", own).split():
            subprocess.run(["docker", "volume", "rm", "-f", volume], capture_output=True, check=False)
        for image in docker("images", "-q", "--filter", "reference=airloom-test/d*").split():
            subprocess.run(["docker", "rmi", "-f", image], capture_output=True, check=False)


def run(platform: Platform, *arguments: str) -> dict[str, Any]:
    done = platform.airloom("run", NAME, "--json", *arguments)
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["state"] == "success", summary
    return summary


@pytest.fixture(scope="module")
def contained(platform: Platform) -> dict[str, Any]:
    """The first run in containers."""
    return run(platform)


def handed_on(platform: Platform, pipeline: str, summary: dict[str, Any], task: str) -> dict[str, Any]:
    value: dict[str, Any] = platform.hooks.airflow.xcom(pipeline, summary["run_id"], task)
    return value


def test_results_are_those_of_processes(platform: Platform, contained: dict[str, Any]) -> None:
    """Same bytes, same metrics, same tag but for the run's own name and time."""
    outcomes = {
        pipeline: {task: StageOutcome.model_validate(handed_on(platform, pipeline, summary, task)) for task in STAGES}
        for pipeline, summary in (("digits", platform.first), (NAME, contained))
    }
    as_process, as_container = outcomes["digits"], outcomes[NAME]
    assert caches(contained) == dict.fromkeys(STAGES, "miss"), contained
    versions = [
        DataVersion.model_validate(handed_on(platform, pipeline, summary, "version"))
        for pipeline, summary in (("digits", platform.first), (NAME, contained))
    ]
    assert versions[0].md5 == versions[1].md5
    assert versions[0].digest == versions[1].digest
    assert as_process["evaluate"].result.metrics == as_container["evaluate"].result.metrics
    if as_container["train"].cache == "miss":  # and not taken by a later try from the one that ran
        assert as_container["train"].peak_memory_bytes > 50 * 2**20

    def said(version: DataVersion) -> dict[str, Any]:
        message = json.loads(platform.hooks.git.read_tag(version.repo, version.tag).message)
        message["source"].pop("manifest")
        own = {"pipeline", "run_id", "plan", "created_at", "tag", "path", "environment"}
        return {key: value for key, value in message.items() if key not in own}

    assert said(versions[0]) == said(versions[1])


def test_stages_ran_from_the_images_of_their_commits(platform: Platform, contained: dict[str, Any]) -> None:
    plan = RunPlan.model_validate(handed_on(platform, NAME, contained, "resolve"))
    for stage in (Stage.PREPROCESS, Stage.TRAIN, Stage.EVALUATE):
        pin = plan.stages[stage]
        assert pin.image is not None
        assert pin.image.tag == plan.code_of(stage).commit
        labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", pin.image.pull_ref))
        assert labels["org.opencontainers.image.revision"] == plan.code_of(stage).commit
        user = docker("inspect", "--format", "{{.Config.User}}", pin.image.pull_ref)
        assert user == "10001"
    own = f"label=airloom.instance={platform.settings.instance_id}"
    assert docker("ps", "-aq", "--filter", own) == ""
    assert docker("volume", "ls", "-q", "--filter", own) == f"airloom-{platform.settings.instance_id}-dvc-cache"


def test_second_run_starts_no_container(platform: Platform, contained: dict[str, Any]) -> None:
    again = run(platform)
    assert caches(again) == dict.fromkeys(STAGES, "hit"), again


def test_push_makes_an_image_in_seconds_and_its_model_is_served(platform: Platform, contained: dict[str, Any]) -> None:
    clone = platform.clone("ds_mlmodeling", platform.project / "clone")
    edit(clone / "modeling" / "train.py", PARAMS, f'{PARAMS}.model_copy(update={{"epochs": 5}})')
    commit = platform.push(clone, "Learn for longer")
    record = wait_for_build(platform, "ds_mlmodeling", commit)
    assert record.image is not None
    assert record.image.tag == commit
    print(f"code-only push to image: {record.seconds:.1f} s")
    before = docker("inspect", "--format", "{{.Created}}", record.image.pull_ref)
    said = platform.airloom("build", f"ds_mlmodeling@{commit}").stderr
    assert "built already" in said
    assert docker("inspect", "--format", "{{.Created}}", record.image.pull_ref) == before

    def pushed() -> tuple[str, RunPlan] | None:
        for found in platform.hooks.airflow.runs(NAME, limit=10):
            with suppress(NotFoundError):  # it is not that far yet
                plan = RunPlan.model_validate(handed_on(platform, NAME, {"run_id": found["dag_run_id"]}, "resolve"))
                if plan.code_of(Stage.TRAIN).commit == commit:
                    return found["dag_run_id"], plan
        return None

    run_id, plan = platform.wait_for("the run that the push starts", pushed)
    assert plan.trigger.kind == "push"
    assert plan.stages[Stage.TRAIN].image == record.image
    ended = platform.ended(run_id, NAME)
    assert ended["state"] == "success", platform.reasons(run_id, NAME)
    assert caches(summarize(platform.hooks, NAME, ended))["train"] == "miss"

    first, release = (
        Release.model_validate(handed_on(platform, NAME, {"run_id": of}, "release"))
        for of in (contained["run_id"], run_id)
    )
    assert release.lineage == first.lineage | {"ds_mlmodeling": commit}
    assert release.model_digest != first.model_digest
    info = httpx.get(platform.hooks.gateway.model_url(NAME) + "/info", timeout=90, trust_env=False).json()
    served = (info["release"], info["model_version"], info["model_digest"], info["run_id"], info["data_tag"])
    assert served == (release.version, release.model_version, release.model_digest, run_id, release.data_tag)
    shown = platform.airloom("lineage", f"{NAME}-{info['release']}").stdout
    for part in (run_id, release.data_tag, f"{NAME}/{release.model_version}", commit[:8]):
        assert part in shown


def test_twenty_quick_pushes_end_with_the_last_one_served(platform: Platform, contained: dict[str, Any]) -> None:
    """Whoever is overtaken may not be built or served; nobody is built twice."""
    clone = platform.clone("ds_modelserving", platform.project / "quick")
    app, commits = clone / "serving" / "app.py", []
    good = app.read_text()
    for number in range(20):
        app.write_text(f"{good}\n# Push {number}.\n")
        commits.append(platform.push(clone, f"Change {number}"))

    def served() -> Release | None:
        now = deployment(platform.hooks, NAME)
        found = release_of(platform.hooks, NAME, now.release) if now is not None and now.state == "live" else None
        return found if found is not None and found.serving_commit == commits[-1] else None

    def known() -> object:
        pushes = platform.airloom("pushes", "--repo", "ds_modelserving", "-n", "20", "--json").stdout
        runs = [run["dag_run_id"] for run in platform.hooks.airflow.runs(NAME, limit=3)]
        return "\n".join([pushes, *(platform.reasons(run_id, NAME) for run_id in runs)])

    release = platform.wait_for("the last one's release", served, 1200, evidence=known)
    state = platform.ended(release.run_id, NAME)["state"]
    assert state == "success", platform.reasons(release.run_id, NAME)
    info = httpx.get(platform.hooks.gateway.model_url(NAME) + "/info", timeout=90, trust_env=False).json()
    assert (info["release"], info["run_id"]) == (release.version, release.run_id)

    listed = json.loads(platform.airloom("pushes", "--repo", "ds_modelserving", "-n", "40", "--json").stdout)
    pushes = {push["commit"]: push for push in listed if push["commit"] in commits}
    assert max(push["builds"] for push in pushes.values()) == 1, pushes
    built = {commit for commit, push in pushes.items() if push["build"] == "built"}
    assert commits[-1] in built
    tags = set(docker("images", "--format", "{{.Tag}}", "airloom-test/ds_modelserving").split())
    assert tags & set(commits) == built, "an image for each commit that was built, and for no other"


def test_broken_dockerfile_fails_on_the_commit_and_the_next_push_works(platform: Platform) -> None:
    clone = platform.clone("de_datapreprocessing", platform.project / "broken")
    dockerfile = clone / "Dockerfile"
    good = dockerfile.read_text()
    dockerfile.write_text(good.replace("COPY main.py", "COPY no-such-file main.py"))
    source = clone / "main.py"
    source.write_text(source.read_text() + "\n# another commit\n")
    commit = platform.push(clone, "Break the Dockerfile")

    def failed() -> dict[str, Any] | None:
        rows = platform.hooks.gitbucket.statuses("de_datapreprocessing", commit)
        return next((row for row in rows if row["state"] == "failure"), None)

    statuses = platform.hooks.gitbucket.statuses
    status = platform.wait_for(
        "the commit's failure", failed, RUN_SECONDS, evidence=lambda: statuses("de_datapreprocessing", commit)
    )
    assert "no-such-file" in status["description"]
    assert find_build(platform.hooks, "de_datapreprocessing", commit) is None
    dockerfile.write_text(good)
    source.write_text(source.read_text() + "# and another\n")
    mended = platform.push(clone, "Mend the Dockerfile")
    wait_for_build(platform, "de_datapreprocessing", mended)


def files_of(references: list[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in every layer of images, their configurations among them; each layer once."""
    with subprocess.Popen(["docker", "save", *references], stdout=subprocess.PIPE) as save:
        with tarfile.open(fileobj=save.stdout, mode="r|") as images:
            for member in images:
                inner = images.extractfile(member) if member.isfile() else None
                if inner is None:
                    continue
                blob = io.BufferedReader(inner)  # type: ignore[arg-type]
                head = blob.peek(512)
                # An engine may keep layers compressed.
                if head[:2] != b"\x1f\x8b" and head[257:262] != b"ustar":
                    yield member.name, blob.read()
                    continue
                with tarfile.open(fileobj=blob, mode="r|*") as layer:
                    for file in layer:
                        content = layer.extractfile(file) if file.isfile() else None
                        if content is not None:
                            yield file.name.removeprefix("./"), content.read()
        assert save.wait() == 0


def test_no_secret_is_in_any_layer(platform: Platform, contained: dict[str, Any]) -> None:
    """Of runtimes, stage images, and the platform's own where this engine has them.

    Searched are all the installation's secrets, and the bundle of authorities that builds have mounted meanwhile.
    """
    serving = platform.hooks.git.head("ds_modelserving", "main")
    wait_for_build(platform, "ds_modelserving", serving)
    own = docker("images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference=airloom-test/*").split()
    names = {name.partition(":")[0].rpartition("/")[2] for name in own}
    assert names >= {"runtime-training", "de_datapreprocessing", "ds_mlmodeling", "ds_modelserving"}
    newest = {name.partition(":")[0]: name for name in reversed(own)}  # by time
    values = dotenv_values(ROOT / ".env")
    platforms = [values["AIRLOOM_PLATFORM_IMAGE"] or "", values["JENKINS_IMAGE"] or ""]
    there = [name for name in platforms if name and docker("images", "-q", name)]
    secrets = [path.read_bytes().strip() for path in platform.settings.secrets_dir.iterdir() if path.is_file()]
    wanted = [MARK.encode(), *(secret for secret in secrets if len(secret) >= 16)]
    assert len(wanted) > 10
    seen = 0
    for path, content in files_of([*newest.values(), *there]):
        seen += 1
        assert path != "etc/airloom-ca.crt" or not content, "the build's mount"
        assert not path.startswith(("run/secrets/", "opt/project/.airloom", "opt/project/.env.local"))
        assert not [secret for secret in wanted if secret in content], path
    assert seen > 10_000


# Kills


def containers(platform: Platform, *labels: str) -> list[str]:
    filters = [f"label={label}" for label in (f"airloom.instance={platform.settings.instance_id}", *labels)]
    return docker("ps", "-aq", "--no-trunc", *(part for one in filters for part in ("--filter", one))).split()


def start_forced(platform: Platform) -> str:
    said = json.loads(platform.airloom("run", NAME, "--force", "--no-wait", "--json").stdout)
    return str(said["run_id"])


def end_of(platform: Platform, run_id: str) -> dict[str, dict[str, Any]]:
    """Wait for the run's success; its tasks. Nothing is left of it but one tag."""
    state = platform.ended(run_id, NAME)["state"]
    assert state == "success", platform.reasons(run_id, NAME)
    tasks = {task["task_id"]: dict(task) for task in platform.hooks.airflow.task_instances(NAME, run_id)}
    wait_for_no_container(platform, run_id)
    tags = platform.hooks.git.list_tags("de_datapreprocessing", f"{NAME}/")
    assert len([tag for tag in tags if json.loads(tag.message or "{}").get("run_id") == run_id]) == 1
    return tasks


def wait_for_no_container(platform: Platform, run_id: str) -> None:
    def left() -> list[str]:
        return containers(platform, f"airloom.run={run_id}")

    platform.wait_for(f"the end of all containers of {run_id}", lambda: not left(), evidence=left)


def running_stage(platform: Platform, run_id: str, stage: str) -> str:
    """The stage's container, which has started: one that was only made is no work that anybody could take over."""
    own = f"label=airloom.instance={platform.settings.instance_id}"
    filters = ("--filter", own, "--filter", f"label=airloom.run={run_id}", "--filter", f"label=airloom.stage={stage}")
    return str(
        platform.wait_for(
            f"the container of {stage}",
            lambda: docker("ps", "-q", "--no-trunc", *filters),
            RUN_SECONDS,
            evidence=lambda: platform.reasons(run_id, NAME),
        )
    )


@contextmanager
def held(container: str) -> Iterator[None]:
    """Let a container do nothing meanwhile."""
    docker("pause", container)
    try:
        yield
    finally:
        subprocess.run(["docker", "unpause", container], capture_output=True, check=False, timeout=300)


def test_killed_worker_leaves_its_container_to_the_next_try(platform: Platform, contained: dict[str, Any]) -> None:
    run_id = start_forced(platform)
    container = running_stage(platform, run_id, "train")
    with held(container):  # else it may be done before its worker is found
        tasks = {task["task_id"]: task for task in platform.hooks.airflow.task_instances(NAME, run_id)}
        kill_worker(tasks["train"])
    assert end_of(platform, run_id)["train"]["try_number"] >= 2
    log = platform.settings.workspaces_dir / NAME / safe_run_id(run_id) / "train" / "container-exit.json"
    assert json.loads(log.read_bytes())["id"] == container, "training ran twice"


def test_container_that_is_removed_by_hand_is_run_again(platform: Platform, contained: dict[str, Any]) -> None:
    run_id = start_forced(platform)
    container = running_stage(platform, run_id, "train")
    workspace = platform.settings.workspaces_dir / NAME / safe_run_id(run_id) / "train"
    # Who waits for the container begins with its log; before, its start may not be over.
    platform.wait_for("the task's wait for its container", (workspace / "log.txt").exists)
    with held(container):  # else it may be done before it is removed
        docker("rm", "-f", container)
    assert end_of(platform, run_id)["train"]["try_number"] >= 2
    reasons = [found.reason for found in platform.hooks.ledger.tasks(NAME, run_id) if found.state == "failed"]
    # Who looks between the kill and the removal sees the kill.
    assert any("was removed" in reason or "SIGKILL" in reason for reason in reasons), reasons


def test_marked_as_failed_ends_the_container(platform: Platform, contained: dict[str, Any]) -> None:
    run_id = start_forced(platform)

    def train() -> dict[str, Any]:
        found = platform.hooks.airflow.task_instances(NAME, run_id)
        return next(task for task in found if task["task_id"] == "train")

    with held(running_stage(platform, run_id, "train")):
        before = train()
        platform.hooks.airflow.mark(NAME, run_id, "failed")
    wait_for_no_container(platform, run_id)
    after = train()
    # Whatever try it was, none came after it.
    assert (after["state"], after["try_number"]) == ("failed", before["try_number"]), platform.reasons(run_id, NAME)


def test_too_little_memory_is_said_and_leaves_nothing(platform: Platform, contained: dict[str, Any]) -> None:
    config = platform.config.with_name(f"{NAME}.yaml")
    good = config.read_text()
    spec = yaml.safe_load(good)
    # The libraries fit; the first batch does not, by far. A limit near to what the libraries need would let the kernel
    # read their pages from the disk again and again, for minutes, before it ends the stage.
    spec["stages"]["train"]["resources"]["memory"] = "640MiB"
    spec["stages"]["train"]["params"] |= {"width": 1024, "batch_size": 2048}
    config.write_text(yaml.safe_dump(spec, sort_keys=False))
    try:
        done = platform.airloom("run", NAME, "--force", "--json", check=False)
    finally:
        config.write_text(good)
    summary = json.loads(done.stdout)
    assert summary["state"] == "failed", summary
    train = next(task for task in summary["tasks"] if task["task"] == "train")
    assert train["state"] == "failed"
    assert "its limit is 640 MiB" in train["reason"]
    assert "raise stages.train.resources.memory" in train["reason"]
    # The try that met the limit is the last: more would end alike. None takes the kernel's kill for somebody else's.
    ended = [task for task in platform.hooks.ledger.tasks(NAME, summary["run_id"]) if task.task == "train"]
    reasons = [task.reason for task in ended]
    assert ["its limit is 640 MiB" in reason for reason in reasons].count(True) == 1, reasons
    assert not any("SIGKILL" in reason for reason in reasons), reasons
    wait_for_no_container(platform, summary["run_id"])
    tags = platform.hooks.git.list_tags("de_datapreprocessing", f"{NAME}/")
    assert len([tag for tag in tags if json.loads(tag.message or "{}").get("run_id") == summary["run_id"]]) <= 1
