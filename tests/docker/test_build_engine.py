"""Images built by another engine than the one that runs them: a rootless one, of an ordinary user."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.contract import ImageRef
from airloom.errors import BuildFailedError, UnavailableError
from airloom.flows import images
from airloom.flows.build import find_build, lost_image
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.engine_images import EngineImages
from airloom.hooks.registry import Registry
from airloom.hooks.runner import ExitReason
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.build_bench import Bench
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.own_engine import job_of
from tests.fixtures.rootless_engine import MACHINE, RootlessEngine, rootless_engine
from tests.fixtures.stage_repo import MAIN

REPO = "ds_mlmodeling"
NAMESPACE = "airloom-build-engine-test"
# In a container of the machine's own engine, all users are the machine's.
ELSEWHERE = "' 4294967295$' /proc/self/uid_map"
DOCKERFILE = f"""\
ARG RUNTIME_IMAGE
FROM ${{RUNTIME_IMAGE}}
WORKDIR /app
COPY main.py ./
RUN ! grep -q {ELSEWHERE}
"""
# `python -m pytest` finds it first.
PYTEST = """\
import sys
from pathlib import Path
print("tested by", Path("/proc/self/uid_map").read_text().split())
sys.exit(Path("/proc/self/uid_map").read_text().split()[2] == "4294967295")
"""
GOOD = {
    "main.py": MAIN,
    "Dockerfile": DOCKERFILE,
    "pytest.py": PYTEST,
    "stages.yaml": "runtime: preprocessing\nstages: {preprocess: {paths: [main.py]}}\ntests: [pytest.py]\n",
}


@pytest.fixture(scope="module")
def builder() -> Iterator[RootlessEngine]:
    with rootless_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def registry(login_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRegistry]:
    """One with a login, for both engines."""
    path = str(login_settings.secrets_dir / "registry_htpasswd")
    found = ImageRegistry(tmp_path_factory.mktemp("registry"), {"htpasswd": {"realm": "Airloom", "path": path}})
    found.start()
    yield found
    found.kill()


@pytest.fixture
def bench(
    builder: RootlessEngine,
    registry: ImageRegistry,
    login_settings: Settings,
    stage_image: str,
    tmp_path: Path,
) -> Iterator[Bench]:
    """Builds in the one engine of what the other has pushed: the tiny stage image, as a runtime."""
    running = make_settings(
        tmp_path / "home",
        registry=registry.host,
        registry_user=USER,
        image_namespace=NAMESPACE,
        python_image="python:3.11.0",
        runner="docker",
        torch_backend="",
    )
    (running.secrets_dir / "registry_password").write_text(login_settings.secret("registry_password"))
    name, tag = images.runtime_reference(running, "preprocessing")
    subprocess.run(["docker", "tag", stage_image, f"{name}:{tag}"], check=True)
    said: list[str] = []
    images.ensure_runtime(running, "preprocessing", said.append, pushed=True)
    assert said in ([], [f"pushing {name}:{tag}"])
    port = registry.host.rpartition(":")[2]
    yield Bench(
        running.model_copy(update={"build_host": builder.host, "build_registry": f"{MACHINE}:{port}"}), tmp_path
    )
    for row in images.images_here(running):
        subprocess.run(["docker", "rmi", "-f", f"{row['name']}:{row['tag']}"], capture_output=True, check=False)


def here(bench: Bench, image: ImageRef) -> list[str]:
    """What the engine that runs stages has of an image."""
    engine = EngineImages(bench.hooks.settings)
    return [found for found in (f"{image.name}:{image.tag}", image.pull_ref) if engine.find(found)]


def test_built_and_tested_there_and_run_here(bench: Bench, builder: RootlessEngine, tmp_path: Path) -> None:
    settings = bench.hooks.settings
    commit = bench.commit(GOOD)
    image = bench.build().image
    assert image is not None
    assert image.pushed
    assert (image.name, image.tag) == (images.image_name(settings, REPO), commit)
    assert bench.statuses[-1][0] == "success"
    assert any(line.endswith("testing") for line in bench.lines)
    registry = Registry(settings, settings.registry)
    assert registry.digest_of(f"{NAMESPACE}/{REPO}", commit) == image.digest
    there = f"{settings.build_registry}/{NAMESPACE}/{REPO}:{commit}"
    assert builder.run("image", "inspect", there).returncode == 0
    assert here(bench, image) == []
    assert lost_image(bench.hooks, bench.build()) is None
    assert here(bench, image) == [], "whether it is there is asked of the registry"

    runner, job, lines = (
        DockerRunner(settings, poll_seconds=0.05),
        job_of(settings, image.pull_ref, lines=2, pause=0),
        [],
    )
    handle = runner.start(job)
    ended = runner.wait(handle, lines.append, lambda: False)
    runner.mark_collected(handle)
    assert (ended.reason, ended.exit_code, lines) == (ExitReason.EXITED, 0, ["line 0", "line 1"])
    assert here(bench, image) == [image.pull_ref], "pulled, and by its digest"
    subprocess.run(["docker", "rmi", "-f", image.pull_ref], check=True, capture_output=True)


def test_a_test_that_fails_there_keeps_the_image_from_the_registry(bench: Bench) -> None:
    commit = bench.commit({**GOOD, "pytest.py": "import sys\nprint('one of them failed')\nsys.exit(1)\n"})
    with pytest.raises(BuildFailedError, match="its tests failed: one of them failed"):
        bench.build()
    assert bench.statuses[-1][0] == "failure"
    settings = bench.hooks.settings
    assert Registry(settings, settings.registry).digest_of(f"{NAMESPACE}/{REPO}", commit) is None


def test_an_engine_that_is_away_is_said_on_the_commit_and_the_next_push_works(
    bench: Bench, builder: RootlessEngine
) -> None:
    commit = bench.commit(GOOD)
    builder.stop()
    try:
        with pytest.raises(UnavailableError, match="the Docker engine that builds does not answer") as caught:
            bench.build(asked_by="push")
    finally:
        builder.start()
    assert caught.value.hint == "does it run? see AIRLOOM_BUILD_HOST"
    state, description = bench.statuses[-1]
    assert state == "error"
    assert "the Docker engine that builds does not answer" in description
    assert find_build(bench.hooks, REPO, commit) is None
    later = bench.commit({"main.py": f"{MAIN}# another\n"})
    image = bench.build(asked_by="push").image
    assert image is not None
    assert (image.tag, bench.statuses[-1][0]) == (later, "success")
    assert here(bench, image) == []
