"""From a push to a build: the real git server, the real object store, the real command."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import requests

from airloom.contract import Stage
from airloom.embedded import builder, git_server
from airloom.errors import BuildFailedError
from airloom.flows.build import STATUS_CONTEXT, build, find_build
from airloom.flows.pushes import list_pushes
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.pushes import GOOD, MAIN, STAGES, AirflowDouble, builds_of, deliveries, status, wait_for
from tests.fixtures.services import running


def test_a_push_is_built_and_a_bad_one_says_why(hooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    hooks = Hooks(hooked.settings)
    bad = hooked.commit_files("Bad", {**GOOD, "main.py": MAIN + "def f(:\n"})
    hooked.push()
    wait_for(lambda: status(hooked, bad)[0] == "failure", "failure")
    assert "main.py:3: invalid syntax" in status(hooked, bad)[1]
    assert find_build(hooks, hooked.name, bad) is None
    good = hooked.commit_files("Good", GOOD)
    hooked.push()
    wait_for(lambda: find_build(hooks, hooked.name, good), "record")
    record = find_build(hooks, hooked.name, good)
    assert record is not None
    assert (record.commit, record.pusher, set(record.stages)) == (good, "airloom", {Stage.TRAIN})
    wait_for(lambda: airflow_double.of(hooked.name), "event")
    page = f"{hooked.settings.git_page_url}/airloom/{hooked.name}/builds/"
    assert record.url == f"{page}{good}"
    rows = hooks.gitbucket.statuses(hooked.name, good)
    assert {row["target_url"] for row in rows if row["context"] == STATUS_CONTEXT} == {record.url}
    login = (hooked.settings.git_user, hooked.settings.secret("git_password"))
    assert "built in" in requests.get(record.url, auth=login, timeout=10).text
    assert "invalid syntax" in requests.get(f"{page}{bad}", auth=login, timeout=10).text
    assert requests.get(record.url, timeout=10).status_code == 401
    (hooked.settings.log_dir / "builds" / f"{hooked.name}-{good[:12]}.log").unlink()
    for gone in (good, "0" * 40, "..%2f..%2fetc%2fpasswd"):
        assert requests.get(f"{page}{gone}", auth=login, timeout=10).status_code == 404
    assert airflow_double.of(hooked.name) == [
        {"repo": hooked.name, "commit": good, "pusher": "airloom", "message": "Good"}
    ]


def test_data_versions_start_no_build(hooked: StageRepoFixture) -> None:
    sha = hooked.commit_files("Good", GOOD)
    hooked.push()
    hooks = Hooks(hooked.settings)
    wait_for(lambda: find_build(hooks, hooked.name, sha), "record")
    folder = hooked.settings.log_dir / "builds"
    commits = [
        hooks.git.write_version(
            hooked.name,
            parent=sha,
            files={"main.py": str(number).encode()},
            tag=f"d/{number}",
            message="{}",
            commit_message="m",
        )
        for number in range(10)
    ]
    wait_for(
        lambda: (
            sum(row["ref"].startswith("refs/tags/") and row["state"] == "delivered" for row in deliveries(hooked)) == 10
        ),
        "ten deliveries",
    )
    assert {path.name for path in folder.glob(f"{hooked.name}-*")} == {f"{hooked.name}-{sha[:12]}.log"}
    assert all(status(hooked, commit) == ("", "") for commit in commits)


def test_many_pushes_end_with_the_last_one_built(hooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    shas = []
    for number in range(20):
        shas.append(hooked.commit_files(f"Change {number}", {**GOOD, "main.py": f"{MAIN}# {number}\n"}))
        hooked.push()
    hooks = Hooks(hooked.settings)
    wait_for(lambda: find_build(hooks, hooked.name, shas[-1]), "record of the last")
    logs = [path.read_text() for path in (hooked.settings.log_dir / "builds").glob(f"{hooked.name}-*.log")]
    assert all(text.count("built in") <= 1 for text in logs)
    wait_for(lambda: shas[-1] in [extra["commit"] for extra in airflow_double.of(hooked.name)], "event of the last")
    told = [extra["commit"] for extra in airflow_double.of(hooked.name)]
    assert told == sorted(set(told), key=shas.index)
    assert status(hooked, shas[-1])[0] == "success"
    ended = {"built", "failed"}
    wait_for(lambda: list_pushes(hooks, repo=hooked.name, limit=1).pushes[0].build in ended, "end of the last build")
    found = list_pushes(hooks, repo=hooked.name, limit=100).pushes
    assert max(push.builds for push in found) == 1
    assert [push.commit for push in found if push.build == "built"] == told[::-1]


def test_two_builds_of_one_commit_are_one(hooked: StageRepoFixture) -> None:
    sha = hooked.commit_files("Good", GOOD)
    git("push", "--quiet", hooked.url, "main:side", cwd=hooked.work)
    hooks = Hooks(hooked.settings)
    records = []
    threads = [
        threading.Thread(target=lambda: records.append(build(hooks, hooked.name, sha, announce=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(record.created for record in records) == [False, False, True]


def test_a_build_that_was_killed_with_the_server_is_taken_up(
    session_settings: Settings, s3_store: ObjectStore, airflow_double: AirflowDouble, tmp_path: Path
) -> None:
    # A git server of its own, beside the store that the tests share.
    ports = {name: getattr(session_settings, name) for name in ("s3_port", "airflow_port")}
    own = make_settings(tmp_path / "home", **ports)
    hooks = Hooks(own)
    work = tmp_path / "slow"
    git("init", "--quiet", "-b", "main", str(work), cwd=tmp_path)
    repo = StageRepoFixture(own, "slow", work)
    marker = tmp_path / "started"
    first = f"p = pathlib.Path({str(marker)!r})\nif not p.exists():\n    p.touch()\n    time.sleep(60)\n"
    slow = f"import pathlib, time\n{first}"
    with running(git_server.service(own), own.log_dir) as process:
        hooks.gitbucket.ensure_repo("slow")
        hooks.gitbucket.ensure_hook("slow", builder.hook_url(own), own.secret("webhook_secret"))
        sha = repo.commit_files("Slow", {"stages.yaml": STAGES, "main.py": slow + MAIN})
        repo.push()
        wait_for(marker.exists, "start of the build")
        # What the supervisor's guard does: nothing of the platform stays.
        for pid in (process.pid, *builds_of(sha)):
            os.killpg(pid, signal.SIGKILL)
        process.wait()
    with running(git_server.service(own), own.log_dir):
        wait_for(lambda: find_build(hooks, "slow", sha), "record")
        wait_for(lambda: status(repo, sha)[0] == "success", "success")
    record = find_build(hooks, "slow", sha)
    assert record is not None
    assert (record.repo, record.commit) == ("slow", sha)


def test_a_dependency_that_does_not_exist_fails_the_command(hooked: StageRepoFixture) -> None:
    sha = hooked.commit_files("Bad", {**GOOD, "main.py": "import no_such_package\n"})
    git("push", "--quiet", hooked.url, "main:side", cwd=hooked.work)
    with pytest.raises(BuildFailedError, match="no_such_package"):
        build(Hooks(hooked.settings), hooked.name, sha)
    assert status(hooked, sha)[0] == "failure"
