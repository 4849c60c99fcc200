"""Provisioning on a real object store, git server and Airflow."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path
from typing import Any

import pytest

from airloom.embedded import provision as provisioning
from airloom.embedded import seed
from airloom.embedded.provision import description, push_template
from airloom.errors import NotFoundError
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.fixtures.airflow import RunningAirflow
from tests.fixtures.git import StageRepoFixture


@pytest.fixture
def hooks(git_settings: Settings) -> Hooks:
    return Hooks(git_settings)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    for name, text in {
        "README.md": "# Title\n\nCleans the data. And more.\n",
        "main.py": "print(1)\n",
        "ünï code.txt": "x\n",
        "__pycache__/a.pyc": "x",
        ".mypy_cache/b": "x",
        ".gitignore": "secret.txt\n",
        "secret.txt": "x",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "main.py").chmod(0o755)
    return folder


def test_template_is_the_first_commit_without_leftovers(
    hooks: Hooks,
    stage_repo: StageRepoFixture,
    template: Path,
    tmp_path: Path,
) -> None:
    assert push_template(hooks, stage_repo.name, template)
    head = hooks.git.head(stage_repo.name)
    pin = hooks.git.commit(stage_repo.name, head)
    assert pin.message.strip() == "Start from the template"
    hooks.git.export(stage_repo.name, head, tmp_path / "out")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*"))
    assert names == [".gitignore", "README.md", "main.py", "ünï code.txt"]
    assert not (template / ".git").exists()


def test_what_people_pushed_is_never_written_over(
    hooks: Hooks,
    stage_repo: StageRepoFixture,
    template: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = stage_repo.commit("mine", README__md="mine")
    stage_repo.push()
    assert not push_template(hooks, stage_repo.name, template)
    assert hooks.git.head(stage_repo.name) == commit
    # Nor when it comes between the look and the push.
    answers = iter([False, True])
    monkeypatch.setattr(provisioning, "_has_main", lambda *_: next(answers))
    assert not push_template(hooks, stage_repo.name, template)
    assert hooks.git.head(stage_repo.name) == commit


def test_description_is_the_first_sentence(template: Path, tmp_path: Path) -> None:
    assert description(template) == "Cleans the data"
    assert description(tmp_path) == ""


def test_digits_are_written_once_and_then_left_to_people(
    s3_store: ObjectStore,
    session_settings: Settings,
) -> None:
    hooks = Hooks(session_settings)
    bucket = session_settings.bucket_raw
    seen: list[tuple[int, int]] = []
    # As a start that was killed leaves it: some are there, one of them other than it should be.
    first = list(zip(range(3), seed.digits(), strict=False))
    for _, (key, content) in first:
        s3_store.put_bytes(bucket, key, content)
    wrong_key = first[0][1][0]
    s3_store.put_bytes(bucket, wrong_key, b"half")
    assert seed.seed_digits(hooks, lambda done, total: seen.append((done, total))) == 4998
    assert seen[-1] == (4752, 5000) or seen[-1][0] <= 5000
    keys = [item.key for item in s3_store.list(bucket, "digits/")]
    assert len(keys) == 5000
    assert {key.split("/")[1] for key in keys} == set("0123456789")
    from PIL import Image

    picture = Image.open(io.BytesIO(s3_store.get_bytes(bucket, wrong_key)))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (28, 28), "L")

    s3_store.remove(bucket, wrong_key)
    assert seed.seed_digits(hooks) == 0
    with pytest.raises(NotFoundError):
        s3_store.get_bytes(bucket, wrong_key)


def pool_of(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("name", "slots", "description", "include_deferred")}


def test_whole_provisioning_twice(
    airflow: RunningAirflow,
    s3_store: ObjectStore,
    git_settings: Settings,
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Repositories are made with their hook, buckets keep versions where they should, connections are there."""
    project = tmp_path / "project"
    (project / "gitbucket_repos").mkdir(parents=True)
    template.rename(project / "gitbucket_repos" / "provisioned")
    hooks = Hooks(git_settings.model_copy(update={"project": project}))
    hooks.__dict__["airflow"] = airflow.api
    built: list[str] = []
    monkeypatch.setattr("airloom.flows.build.build", lambda hooks, repo, rev, announce: built.append(repo))
    states: dict[str, str] = {}
    provisioning.provision(hooks, states.__setitem__, seed=False)
    head = hooks.git.head("provisioned")
    # A person's choice, which stays, and a value that is the installation's.
    pool = airflow.api._call("GET", "pools/airloom_stages")
    assert pool["slots"] == 4
    airflow.api._call("PATCH", "pools/airloom_stages", json={**pool_of(pool), "slots": 2})
    airflow.api.ensure_variable("airloom_images", "elsewhere", "changed")
    provisioning.provision(hooks, states.__setitem__, seed=False)

    assert built == ["provisioned"]
    assert hooks.git.head("provisioned") == head
    assert [repo["description"] for repo in hooks.gitbucket.list_repos() if repo["name"] == "provisioned"] == [
        "Cleans the data"
    ]
    admin = ObjectStore.from_settings(git_settings, user="admin")
    assert admin.is_versioned(git_settings.bucket_raw)
    assert not admin.is_versioned(git_settings.bucket_dvc)
    assert all(state.startswith("done") for state in states.values())
    found = airflow.api._call("GET", "connections")["connections"]
    by_id = {connection["connection_id"]: connection for connection in found}
    assert {"airloom_s3", "airloom_git", "airloom_mlflow"} <= set(by_id)
    assert by_id["airloom_git"]["login"] == "airloom"
    assert git_settings.secret("git_password") not in str(found)
    assert airflow.api._call("GET", "pools/airloom_stages")["slots"] == 2
    found = airflow.api._call("GET", "variables")["variables"]
    assert {variable["key"]: variable["value"] for variable in found} == {
        "airloom_images": "airloom",
        "airloom_docker_network": "host",
    }


def test_git_folder_above_is_of_no_concern(
    hooks: Hooks,
    stage_repo: StageRepoFixture,
    template: Path,
) -> None:
    """The templates lie in a repository of their own project, which must stay as it is."""
    subprocess.run(["git", "init", "-q", str(template.parent)], check=True)
    assert push_template(hooks, stage_repo.name, template)
    status = subprocess.run(
        ["git", "-C", str(template.parent), "status", "--short"], check=True, capture_output=True, text=True
    )
    assert not [line for line in status.stdout.splitlines() if line.startswith("A")]
