"""Builds that make images, on the real engine: what a commit is checked in, and what is made good later."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from airloom.errors import BuildFailedError, NotFoundError, ServiceError
from airloom.flows import images
from airloom.flows.build import build, build_until, find_build
from airloom.flows.build_steps import Step
from airloom.flows.reconcile import reconcile
from airloom.flows.resolve import _image_of
from airloom.hooks.image_builder import ImageBuilder
from airloom.hooks.registry import Registry
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.build_bench import Bench
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.stage_image import BASE

REPO = "ds_mlmodeling"
STAGES = "runtime: preprocessing\nstages: {preprocess: {paths: [main.py]}}\n"
DOCKERFILE = "ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}\nWORKDIR /app\nCOPY main.py ./\n"
GOOD = {"main.py": "print('usage')\n", "Dockerfile": DOCKERFILE, "stages.yaml": STAGES}


def as_runtime(settings: Settings) -> None:
    """The plain base under a runtime's name: what is tested is what stands on it."""
    name, tag = images.runtime_reference(settings, "preprocessing")
    subprocess.run(["docker", "tag", BASE, f"{name}:{tag}"], check=True)


def remove_images(settings: Settings) -> None:
    for row in images.images_here(settings):
        subprocess.run(["docker", "rmi", "-f", f"{row['name']}:{row['tag']}"], capture_output=True, check=False)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    settings = make_settings(
        tmp_path / "home",
        image_namespace="airloom-build-test",
        python_image=BASE,
        runner="docker",
        torch_backend="",
    )
    as_runtime(settings)
    yield Bench(settings, tmp_path)
    remove_images(settings)


def test_main_is_loaded_in_the_image_that_holds_its_packages(bench: Bench) -> None:
    """The platform has neither, and knows of nothing that the Dockerfile installs."""
    package = "/usr/lib/python3/dist-packages/only_in_the_image.py"
    bench.commit(
        {
            **GOOD,
            "main.py": "import only_in_the_image, helper\n",
            "helper.py": "",
            "Dockerfile": f"{DOCKERFILE}COPY helper.py ./\nRUN touch {package}\n",
        }
    )
    record = bench.build()
    assert record.image is not None

    # What the Dockerfile forgets is missing, though the checkout has it.
    bench.commit({"Dockerfile": f"{DOCKERFILE}RUN touch {package}\n"})
    with pytest.raises(BuildFailedError, match="No module named 'helper'"):
        bench.build()
    assert bench.statuses[-1][0] == "failure"


def test_pushed_code_meets_nothing_of_the_platform(bench: Bench, tmp_path: Path) -> None:
    home, found = bench.hooks.settings.home_dir, tmp_path / "found"
    spy = f"import os, sys\nos.path.exists({str(home)!r}) and open({str(found)!r}, 'w')\n"
    sha = bench.commit({**GOOD, "main.py": f"{spy}sys.exit('uid %d' % os.getuid())\n"})
    with pytest.raises(BuildFailedError, match="ended with 1: uid 10001"):
        bench.build()
    assert not found.exists()
    assert find_build(bench.hooks, REPO, sha) is None


def reconciled(bench: Bench) -> list[tuple[str, str]]:
    return [(action.commit, action.did) for action in reconcile(bench.hooks, repos=[REPO], grace=timedelta(0))]


def test_an_image_that_was_removed_is_made_again_and_nothing_starts_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = bench.commit(GOOD)
    image = bench.build().image
    bench.commit({"README.md": "changes nothing"})
    assert reconciled(bench) == []
    subprocess.run(["docker", "rmi", "-f", image.pull_ref], check=True, capture_output=True)
    assert reconciled(bench) == [(sha, "left")], "it was tried a moment ago"
    later = datetime.now(UTC) + timedelta(minutes=3)
    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz: later)})
    monkeypatch.setattr("airloom.flows.reconcile.datetime", clock)
    assert reconciled(bench) == [(sha, "built")]
    record = find_build(bench.hooks, REPO, sha)
    assert record is not None
    assert record.image is not None
    assert images.is_there(bench.hooks.settings, record.image)
    assert (record.image.runtime, record.announced) == (image.runtime, True)
    assert reconciled(bench) == []
    assert bench.airflow.create_asset_event.call_count == 1


def test_a_run_takes_the_image_of_the_last_commit_that_changes_a_stage(bench: Bench) -> None:
    """Documentation is not built, so that it has no image of its own."""
    bench.commit(GOOD)
    image = bench.build().image
    bench.commit({"README.md": "changes nothing"})
    assert _image_of(bench.hooks, bench.hooks.git.commit(REPO, "main")) == image
    bench.commit({"main.py": "print('something else')\n"})
    with pytest.raises(NotFoundError, match="there is no image"):
        _image_of(bench.hooks, bench.hooks.git.commit(REPO, "main"))


@pytest.fixture
def pushing(login_settings: Settings, login_registry: ImageRegistry, tmp_path: Path) -> Iterator[Bench]:
    """Builds push to a registry with a login, whose password is wrong."""
    secrets = tmp_path / "home" / "secrets"
    settings = make_settings(
        tmp_path / "home",
        registry=login_registry.host,
        registry_user=USER,
        image_namespace="airloom-build-test",
        python_image=BASE,
        runner="docker",
        torch_backend="",
    )
    (secrets / "registry_password").write_text("wrong-one")
    as_runtime(settings)
    yield Bench(settings, tmp_path)
    remove_images(settings)


def test_a_registry_that_refuses_is_said_on_the_commit_and_the_next_push_works(
    pushing: Bench, login_settings: Settings, login_registry: ImageRegistry
) -> None:
    refused = pushing.commit(GOOD)
    with pytest.raises(ServiceError):
        pushing.build(asked_by="push")
    state, description = pushing.statuses[-1]
    assert state == "error"
    name = f"{login_registry.host}/airloom-build-test/{REPO}:{refused}"
    assert f"could not be built: the registry refuses the push of {name}" in description
    assert f"to user {USER}" in description
    assert "wrong-one" not in description
    assert find_build(pushing.hooks, REPO, refused) is None
    pushing.airflow.create_asset_event.assert_not_called()
    registry = Registry(login_settings, login_registry.host)
    repository = f"airloom-build-test/{REPO}"
    assert registry.tags(repository) == []

    right = login_settings.secret("registry_password")
    (pushing.hooks.settings.secrets_dir / "registry_password").write_text(right)
    good = pushing.commit({"main.py": "print('another')\n"})
    record = pushing.build(asked_by="push")
    assert (record.commit, record.airflow) == (good, "told")
    assert record.image is not None
    assert record.image.pushed
    assert registry.digest_of(repository, good) == record.image.digest
    assert registry.tags(repository) == [good]
    assert pushing.statuses[-1][0] == "success"
    pushing.airflow.create_asset_event.assert_called_once()

    # Once the registry takes it, the first one is built too, when somebody wants it.
    assert build(pushing.hooks, REPO, refused, asked_by="push").airflow == "superseded"

    (row,) = [row for row in images.images_here(pushing.hooks.settings) if row["tag"] == good]
    assert (row["digest"], row["pushed"]) == (record.image.digest, True)


def test_each_step_is_a_call_of_its_own_and_none_is_done_twice(
    pushing: Bench, login_settings: Settings, login_registry: ImageRegistry
) -> None:
    repository = f"airloom-build-test/{REPO}"
    registry = Registry(login_settings, login_registry.host)
    before = registry.tags(repository)
    sha = pushing.commit({**GOOD, "main.py": "print('in steps')\n"})
    found: dict[str, list[str]] = {}

    def until(step: Step) -> None:
        found[step] = []
        assert build_until(pushing.hooks, REPO, sha, step, found[step].append, asked_by="push") is None

    until("inspect")
    assert [row["tag"] for row in images.images_here(pushing.hooks.settings) if row["tag"] == sha] == []
    until("build")
    (row,) = [row for row in images.images_here(pushing.hooks.settings) if row["tag"] == sha]
    until("test")
    with pytest.raises(ServiceError, match="refuses the push"):  # the password is wrong
        until("push")
    assert registry.tags(repository) == before
    right = login_settings.secret("registry_password")
    (pushing.hooks.settings.secrets_dir / "registry_password").write_text(right)
    until("push")
    assert registry.tags(repository) == sorted([*before, sha])
    assert [line.partition(": ")[2] for line in found["push"]][:3] == [
        "inspected already",
        "its image was built already",
        "tested already",
    ]
    record = build(pushing.hooks, REPO, sha, found["push"].append, asked_by="push")
    assert record.image is not None
    assert record.image.digest == registry.digest_of(repository, sha)
    facts = ImageBuilder(pushing.hooks.settings).find(record.image.pull_ref)
    assert facts is not None
    assert facts["Id"] == row["digest"], "what was built first is what was pushed"
    ended = [entry["outcome"] for entry in pushing.store.entries("end")]
    assert (ended, len(pushing.store.entries("start"))) == (["error", "built"], 2)
