"""What becomes of pushes whose events are lost, doubled, late, out of order or not what they seem."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import requests

from airloom.embedded import builder, git_server, s3_server
from airloom.flows.build import built_commits, find_build
from airloom.flows.pushes import Push, list_pushes
from airloom.flows.reconcile import reconcile
from airloom.hooks.connect import Hooks
from airloom.hooks.git_command import run_git
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.pushes import GOOD, MAIN, AirflowDouble, builds_of, deliveries, status, wait_for
from tests.fixtures.recorded import REPO, SECRET, TAG, Recorded, make_history, recorded
from tests.fixtures.s3 import make_buckets
from tests.fixtures.services import running

ZERO = "0" * 40
VERSIONS = 500
TAGS_AT_ONCE = 100


@pytest.fixture
def unhooked(stage_repo: StageRepoFixture, s3_store: ObjectStore, airflow_double: AirflowDouble) -> StageRepoFixture:
    """A repo whose events the test makes."""
    return stage_repo


def send(settings: Settings, body: bytes, headers: dict[str, str]) -> requests.Response:
    return requests.post(builder.hook_url(settings), data=body, headers=headers, timeout=60)


def deliver(
    repo: StageRepoFixture, after: str, *, before: str = ZERO, name: str = "", **headers: str
) -> requests.Response:
    """Send the event of a push to main, as the hook would."""
    payload = {
        "ref": "refs/heads/main",
        "before": before,
        "after": after,
        "commits": [],
        "pusher": {"name": "ada"},
        "repository": {"name": repo.name, "full_name": f"airloom/{repo.name}"},
        "head_commit": {"message": "Told by the event"},
    }
    body = json.dumps(payload).encode()
    digest = hmac.new(repo.settings.secret("webhook_secret").encode(), body, hashlib.sha256).hexdigest()
    sent = {
        "Content-Type": "application/json",
        "X-Github-Event": "push",
        "X-Github-Delivery": name or f"delivery-of-{after[:8]}",
        "X-Hub-Signature-256": f"sha256={digest}",
        **headers,
    }
    return send(repo.settings, body, {key: value for key, value in sent.items() if value})


def told(airflow_double: AirflowDouble, repo: StageRepoFixture) -> list[str]:
    return [extra["commit"] for extra in airflow_double.of(repo.name)]


def pushes(repo: StageRepoFixture) -> dict[str, Push]:
    return {push.commit: push for push in list_pushes(Hooks(repo.settings), repo=repo.name).pushes}


def ended(repo: StageRepoFixture, commit: str) -> None:
    """Wait until a commit is built, and its builder has nothing left to do."""
    wait_for(lambda: find_build(Hooks(repo.settings), repo.name, commit), f"build of {commit[:8]}")
    idle(repo.settings)


def idle(settings: Settings) -> None:
    path = settings.data_dir / "git" / ".forge" / "forge.db"

    def count() -> int:
        with sqlite3.connect(path) as connection:
            asked = "SELECT (SELECT count(*) FROM wanted) + (SELECT count(*) FROM receipt)"
            return int(connection.execute(asked).fetchone()[0])

    wait_for(lambda: count() == 0, "end of all builds")


def test_a_lost_event_hides_no_change(unhooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    first = unhooked.commit_files("Start", GOOD)
    unhooked.push()
    assert deliver(unhooked, first).status_code == 202
    ended(unhooked, first)
    second = unhooked.commit_files("Change the model", {"main.py": f"{MAIN}# 2\n"})
    unhooked.push()  # and nobody is told
    third = unhooked.commit_files("Document it", {"README.md": "more"})
    unhooked.push()
    assert deliver(unhooked, third, before=second).json()["build"] == f"{unhooked.name}@{third}"
    ended(unhooked, third)
    assert told(airflow_double, unhooked) == [first, third]
    fourth = unhooked.commit_files("Document it more", {"README.md": "even more"})
    unhooked.push()
    assert deliver(unhooked, fourth, before=third).json() == {"ignored": "nothing that a stage is made of has changed"}
    idle(unhooked.settings)
    found = pushes(unhooked)
    assert set(found) == {first, third, fourth}
    assert (found[third].build, found[third].airflow, found[third].pusher) == ("built", "told", "ada")
    assert (found[fourth].build, found[fourth].message) == ("none", "Told by the event")


def test_a_doubled_event_builds_and_starts_once(unhooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    sha = unhooked.commit_files("Start", GOOD)
    unhooked.push()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda number: deliver(unhooked, sha, name=f"copy-{number}"), range(8)))
    assert {answer.status_code for answer in answers} <= {200, 202}
    ended(unhooked, sha)
    assert deliver(unhooked, sha, name="late-copy").json() == {"ignored": "the commit has been built"}
    idle(unhooked.settings)
    assert told(airflow_double, unhooked) == [sha]
    (push,) = pushes(unhooked).values()
    assert len(push.deliveries) == 9
    log = unhooked.settings.log_dir / "builds" / f"{unhooked.name}-{sha[:12]}.log"
    assert log.read_text().count(" built in ") == 1


def test_a_doubled_event_of_a_bad_commit_fails_once(unhooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    bad = unhooked.commit_files("Bad", {**GOOD, "main.py": "x ="})
    unhooked.push()
    deliver(unhooked, bad)
    wait_for(lambda: status(unhooked, bad)[0] == "failure", "failure")
    idle(unhooked.settings)
    assert deliver(unhooked, bad, name="again").status_code == 200
    good = unhooked.commit_files("Good", GOOD)
    unhooked.push()
    assert deliver(unhooked, good).status_code == 202
    ended(unhooked, good)
    assert told(airflow_double, unhooked) == [good]
    found = pushes(unhooked)
    assert (found[bad].build, found[bad].builds) == ("failed", 1)
    assert "main.py:1: invalid syntax" in found[bad].reason


def test_late_and_reordered_events_build_the_tip_alone(
    unhooked: StageRepoFixture, airflow_double: AirflowDouble
) -> None:
    commits = []
    for number in range(3):
        commits.append(unhooked.commit_files(f"Change {number}", {**GOOD, "main.py": f"{MAIN}# {number}\n"}))
        unhooked.push()
    first, second, third = commits
    for after, before in ((second, first), (third, second), (first, ZERO)):
        deliver(unhooked, after, before=before)
    ended(unhooked, third)
    assert deliver(unhooked, first, name="very-late").status_code == 200
    idle(unhooked.settings)
    assert built_commits(Hooks(unhooked.settings), unhooked.name) == {third}
    assert told(airflow_double, unhooked) == [third]
    found = pushes(unhooked)
    assert f"main is at {third[:8]} by now" in found[second].reason
    assert found[first].build == "none"


def test_what_is_not_to_be_trusted_leaves_no_trace(unhooked: StageRepoFixture) -> None:
    sha = unhooked.commit_files("Start", GOOD)
    unhooked.push()
    wrong: list[tuple[dict[str, str], int]] = [
        ({"X-Hub-Signature-256": ""}, 401),
        ({"X-Hub-Signature-256": "sha256=" + "0" * 64}, 401),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
        ({"X-Github-Event": "ping"}, 200),
        ({"X-Github-Event": ""}, 200),
    ]
    for headers, code in wrong:
        answer = deliver(unhooked, sha, **headers)
        assert answer.status_code == code, headers
        assert "build" not in answer.json()
    idle(unhooked.settings)
    assert pushes(unhooked) == {}
    assert status(unhooked, sha) == ("", "")
    # An event that was signed tells nothing when its body is another's.
    event = recorded("branch-created")
    assert send(unhooked.settings, event.body, event.headers).status_code == 401


def test_the_reconciler_finds_what_was_lost(unhooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    hooks = Hooks(unhooked.settings)
    sha = unhooked.commit_files("Start", GOOD)
    unhooked.push()

    def look() -> list[tuple[str, str]]:
        found = reconcile(hooks, repos=[unhooked.name], grace=timedelta(0))
        return [(action.commit, action.did) for action in found]

    assert look() == [(sha, "built")]
    assert look() == []
    assert deliver(unhooked, sha).json() == {"ignored": "the commit has been built"}  # the event was only late
    assert told(airflow_double, unhooked) == [sha]
    idle(unhooked.settings)
    (push,) = pushes(unhooked).values()
    assert (push.asked_by, push.build, push.deliveries) == ("reconciler", "built", [f"delivery-of-{sha[:8]}"])


def test_a_build_that_is_killed_after_it_has_told_starts_nothing_twice(
    unhooked: StageRepoFixture, airflow_double: AirflowDouble
) -> None:
    sha = unhooked.commit_files("Start", GOOD)
    unhooked.push()
    airflow_double.gate.clear()
    try:
        deliver(unhooked, sha)
        wait_for(lambda: told(airflow_double, unhooked), "event")
        (pid,) = builds_of(sha)
        os.killpg(pid, signal.SIGKILL)
    finally:
        airflow_double.gate.set()
    idle(unhooked.settings)
    hooks = Hooks(unhooked.settings)
    record = find_build(hooks, unhooked.name, sha)
    assert record is not None
    assert (record.announced, record.airflow) == (False, "due")
    assert pushes(unhooked)[sha].build == "running or killed"
    (action,) = reconcile(hooks, repos=[unhooked.name], grace=timedelta(0))
    assert (action.commit, action.did) == (sha, "told")
    assert told(airflow_double, unhooked) == [sha]


def test_five_hundred_data_versions_start_no_build(hooked: StageRepoFixture, airflow_double: AirflowDouble) -> None:
    sha = hooked.commit_files("Start", GOOD)
    hooked.push()
    ended(hooked, sha)
    names = [f"digits/CV_start_{sha[:8]}_DV_20261101T{number:06d}000Z" for number in range(VERSIONS)]
    make_versions(hooked, sha, names)
    for start in range(0, VERSIONS, TAGS_AT_ONCE):
        hooked.push(*(f"refs/tags/{name}" for name in names[start : start + TAGS_AT_ONCE]))

    def arrived() -> bool:
        rows = [row for row in deliveries(hooked) if row["ref"].startswith("refs/tags/")]
        return len(rows) == VERSIONS and all(row["state"] == "delivered" for row in rows)

    wait_for(arrived, f"{VERSIONS} deliveries")
    idle(hooked.settings)
    assert {row["answer"] for row in deliveries(hooked) if row["ref"].startswith("refs/tags/")} == {
        '200 {"ignored":"a tag is not built"}'
    }
    logs = (hooked.settings.log_dir / "builds").glob(f"{hooked.name}-*")
    assert [path.name for path in logs] == [f"{hooked.name}-{sha[:12]}.log"]
    assert built_commits(Hooks(hooked.settings), hooked.name) == {sha}
    assert set(pushes(hooked)) == {sha}
    assert told(airflow_double, hooked) == [sha]
    assert reconcile(Hooks(hooked.settings), repos=[hooked.name], grace=timedelta(0)) == []


def make_versions(repo: StageRepoFixture, code: str, names: list[str]) -> None:
    """Tags as `version` writes them: each on a commit of its own above the code, with a pointer and a message."""
    lines = []
    for number, name in enumerate(names):
        pointer, message = f"outs:\n- md5: {number:032x}.dir\n", json.dumps({"pipeline": "digits", "number": number})
        lines += [
            f"commit refs/versions/{number}",
            f"mark :{number + 1}",
            f"committer Airloom <airloom@localhost> {1_793_500_000 + number} +0000",
            f"data {len(f'Data version {name}')}\nData version {name}",
            f"from {code}",
            f"M 100644 inline data/digits.dvc\ndata {len(pointer)}\n{pointer}",
            f"tag {name}",
            f"from :{number + 1}",
            f"tagger Airloom <airloom@localhost> {1_793_500_000 + number} +0000",
            f"data {len(message)}\n{message}",
        ]
    script = ("\n".join(lines) + "\n").encode()
    run_git(("fast-import", "--quiet"), git_dir=repo.work / ".git", stdin=script)


# As GitBucket sends them


class Stand:
    """A git server of its own that trusts the recorded hook's secret, and the repository that the files tell of."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.repo = StageRepoFixture(settings, REPO, folder / REPO)
        self.commits = make_history(self.repo.work)

    def main_is(self, commit: str) -> None:
        self.repo.push("--force", f"{commit}:refs/heads/main")

    def send(self, event: Recorded, **headers: str) -> tuple[int, dict]:
        answer = send(self.settings, event.body, {**event.headers, **headers})
        return answer.status_code, answer.json()


@pytest.fixture
def stand(session_settings: Settings, s3_store: ObjectStore, airflow_double: AirflowDouble, tmp_path: Path):
    ports = {name: getattr(session_settings, name) for name in ("s3_port", "airflow_port")}
    own = make_settings(tmp_path / "home", **ports)
    (own.secrets_dir / "webhook_secret").write_text(SECRET)
    with running(git_server.service(own), own.log_dir):
        Hooks(own).gitbucket.ensure_repo(REPO)
        yield Stand(own, tmp_path)


def test_recorded_events_build_what_they_should(stand: Stand) -> None:
    first, second, third, fourth = stand.commits
    taken = {"build": f"{REPO}@{first}", "reason": "nothing before it has been built"}
    stand.main_is(first)
    assert stand.send(recorded("branch-created")) == (202, taken)
    ended(stand.repo, first)
    stand.main_is(second)
    assert stand.send(recorded("branch-updated"))[0] == 202
    ended(stand.repo, second)
    stand.main_is(third)
    nothing = {"ignored": "nothing that a stage is made of has changed"}
    assert stand.send(recorded("documentation")) == (200, nothing)
    stand.repo.push(f"{second}:refs/tags/{TAG}", f"{fourth}:refs/heads/dev")
    assert stand.send(recorded("tag-created")) == (200, {"ignored": "a tag is not built"})
    assert stand.send(recorded("tag-deleted")) == (200, {"ignored": "a tag is not built"})
    assert stand.send(recorded("other-branch-created")) == (200, {"ignored": "only main is built"})
    assert stand.send(recorded("other-branch-deleted")) == (200, {"ignored": "a deletion is not built"})
    stand.main_is(fourth)
    assert stand.send(recorded("two-commits"))[1]["build"] == f"{REPO}@{fourth}"
    ended(stand.repo, fourth)
    for name in ("branch-updated-again", "branch-created", "branch-updated", "documentation"):  # late, and out of order
        assert stand.send(recorded(name)) == (200, {"ignored": "the commit has been built"})
    assert built_commits(Hooks(stand.settings), REPO) == {first, second, fourth}
    idle(stand.settings)
    found = pushes(stand.repo)
    assert found[third].message == "Explain the model 🎉"
    assert found[first].deliveries == [recorded("branch-created").headers["X-Github-Delivery"]] * 2


def test_a_recorded_event_counts_only_as_it_was_sent(stand: Stand) -> None:
    stand.main_is(stand.commits[0])
    event = recorded("branch-created")
    assert stand.send(recorded("as-a-form"))[0] == 415
    assert stand.send(event, **{"Content-Type": "text/plain"})[0] == 415
    assert stand.send(event, **{"X-Hub-Signature-256": event.headers["X-Hub-Signature"]})[0] == 401
    assert stand.send(Recorded("changed", event.headers, event.body.replace(b'"ada"', b'"eve"')))[0] == 401
    assert stand.send(Recorded("spaced", event.headers, event.body + b" "))[0] == 401
    wrong_path = requests.post(f"{stand.settings.git_base_url}/-/hooks/pushes", data=event.body, headers=event.headers)
    assert wrong_path.status_code in {401, 404}
    idle(stand.settings)
    assert not (stand.settings.log_dir / "builds").exists()
    assert status(stand.repo, stand.commits[0]) == ("", "")


def test_the_ledger_catches_up_when_the_store_is_back(tmp_path: Path) -> None:
    own = make_settings(tmp_path / "home")
    repo = StageRepoFixture(own, "patient", tmp_path / "patient")
    with ExitStack() as stack:
        stack.enter_context(running(git_server.service(own), own.log_dir))
        Hooks(own).gitbucket.ensure_repo(repo.name)
        git("init", "--quiet", "-b", "main", str(repo.work), cwd=tmp_path)
        sha = repo.commit_files("Start", GOOD)
        repo.push()
        Hooks(own).gitbucket.set_status(repo.name, sha, state="success", context="airloom/build")
        docs = repo.commit_files("Document it", {"README.md": "more"})
        repo.push()
        assert deliver(repo, docs, before=sha).status_code == 200  # there is no store at all
        stack.enter_context(running(s3_server.service(own), own.log_dir))
        make_buckets(own)
        idle(own)
        (push,) = list_pushes(Hooks(own)).pushes
        assert (push.commit, push.reason) == (docs, "nothing that a stage is made of has changed")
