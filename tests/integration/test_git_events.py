"""Push events: from a real push to a real receiver."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import requests

from airloom.embedded import builder, git_server
from airloom.hooks.git import GitRemote
from airloom.hooks.gitbucket import GitBucket
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.services import running

ZERO = "0" * 40
SECRET = "shared-secret"
STAGES = "stages: {train: {paths: [main.py, model]}}\n"


@dataclass
class Delivery:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def payload(self) -> dict:
        return json.loads(self.body)


@dataclass
class Receiver:
    """Takes deliveries; `answers` are given first, then 200."""

    url: str
    got: queue.Queue[Delivery] = field(default_factory=queue.Queue)
    answers: queue.Queue[int] = field(default_factory=queue.Queue)
    gate: threading.Event = field(default_factory=threading.Event)

    def next(self) -> Delivery:
        return self.got.get(timeout=120)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            held.got.put(Delivery(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            held.gate.wait(120)
            try:
                status = held.answers.get_nowait()
            except queue.Empty:
                status = 200
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held = Receiver(f"http://127.0.0.1:{server.server_port}/generic-webhook-trigger/invoke?token=a%20b")
    held.gate.set()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield held
    held.gate.set()
    server.shutdown()
    server.server_close()


def wait_for(found: Callable[[], object], what: str) -> object:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"still no {what}")


def metric(settings: Settings, name: str) -> float:
    text = requests.get(f"{settings.git_base_url}/metrics", timeout=60).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_a_push_is_told_as_gitbucket_tells_it(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, receiver: Receiver
) -> None:
    gitbucket.ensure_hook(stage_repo.name, receiver.url, SECRET)
    first = stage_repo.commit_files("One", {"a.txt": "1", "b ü.txt": "2"})
    stage_repo.push()
    got = receiver.next()
    assert got.path == "/generic-webhook-trigger/invoke?token=a%20b"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["x-github-event"] == "push"
    assert len(got.headers["x-github-delivery"]) == 36
    key = SECRET.encode()
    assert got.headers["x-hub-signature"] == "sha1=" + hmac.new(key, got.body, hashlib.sha1).hexdigest()
    assert got.headers["x-hub-signature-256"] == "sha256=" + hmac.new(key, got.body, hashlib.sha256).hexdigest()
    payload = got.payload
    assert (payload["ref"], payload["before"], payload["after"]) == ("refs/heads/main", ZERO, first)
    assert payload["pusher"]["name"] == "airloom"
    assert payload["repository"]["full_name"] == f"airloom/{stage_repo.name}"
    assert payload["repository"]["clone_url"].endswith(f"/git/airloom/{stage_repo.name}.git")
    assert [(c["id"], c["added"]) for c in payload["commits"]] == [(first, ["a.txt", "b ü.txt"])]
    assert payload["head_commit"]["id"] == first

    second = stage_repo.commit_files("Two 🎉\n\nbody", {"a.txt": "3"})
    (stage_repo.work / "b ü.txt").unlink()
    third = stage_repo.commit("Three", c__txt="4")
    stage_repo.push()
    payload = receiver.next().payload
    assert (payload["before"], payload["after"]) == (first, third)
    told = [(c["id"], c["message"], c["added"], c["removed"], c["modified"]) for c in payload["commits"]]
    assert told == [
        (second, "Two 🎉\n\nbody", [], [], ["a.txt"]),
        (third, "Three", ["c.txt"], ["b ü.txt"], []),
    ]


def test_tags_and_deletions_are_told_without_commits(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, git_remote: GitRemote, receiver: Receiver
) -> None:
    sha = stage_repo.commit("One", a__txt="1")
    stage_repo.push("main", "main:dev")
    gitbucket.ensure_hook(stage_repo.name, receiver.url, SECRET)
    git_remote.write_version(
        stage_repo.name, parent=sha, files={"d.dvc": b"1"}, tag="digits/CV_a", message="{}", commit_message="m"
    )
    made = receiver.next().payload
    assert (made["ref"], made["before"], made["commits"]) == ("refs/tags/digits/CV_a", ZERO, [])
    assert made["after"] == git_remote.read_tag(stage_repo.name, "digits/CV_a").object_id
    assert made["head_commit"] is None
    stage_repo.push(":refs/tags/digits/CV_a")
    assert receiver.next().payload["after"] == ZERO
    stage_repo.push(":dev")
    gone = receiver.next().payload
    assert (gone["ref"], gone["before"], gone["after"], gone["commits"]) == ("refs/heads/dev", sha, ZERO, [])


def test_who_pushes_does_not_wait_for_receivers(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, receiver: Receiver
) -> None:
    receiver.gate.clear()
    gitbucket.ensure_hook(stage_repo.name, receiver.url, SECRET)
    stage_repo.commit("One", a__txt="1")
    done = stage_repo.push()  # ends although nobody has answered yet
    assert "remote: Airloom: 1 webhook will be told" in done.stderr
    receiver.next()
    receiver.gate.set()


def page_of(repo: StageRepoFixture) -> str:
    return requests.get(
        f"{repo.settings.git_base_url}/airloom/{repo.name}",
        auth=("airloom", repo.settings.secret("git_password")),
        timeout=60,
    ).text


def test_a_receiver_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, receiver: Receiver
) -> None:
    receiver.answers.put(503)
    receiver.answers.put(200)
    receiver.answers.put(403)
    gitbucket.ensure_hook(stage_repo.name, receiver.url, SECRET)
    stage_repo.commit("One", a__txt="1")
    stage_repo.push()
    assert receiver.next().headers["x-github-delivery"] == receiver.next().headers["x-github-delivery"]
    before = metric(stage_repo.settings, 'airloom_git_webhook_deliveries_total{outcome="failed"}')
    stage_repo.commit("Two", a__txt="2")
    stage_repo.push()
    receiver.next()
    name = 'airloom_git_webhook_deliveries_total{outcome="failed"}'
    # Other tests' deliveries may fail beside it: they are counted too.
    wait_for(lambda: metric(stage_repo.settings, name) > before, "failed delivery")
    wait_for(lambda: '<td class="failed">failed</td>' in page_of(stage_repo), "failed delivery on the repo's page")
    page = page_of(stage_repo)
    assert '<td class="delivered">delivered</td>' in page
    log = (stage_repo.settings.log_dir / "git.log").read_text()
    for secret in (SECRET, "token=", stage_repo.settings.secret("git_password")):
        assert secret not in page
        assert secret not in log


def test_a_form_hook_gets_a_form(stage_repo: StageRepoFixture, receiver: Receiver) -> None:
    settings = stage_repo.settings
    answer = requests.post(
        f"{settings.git_base_url}/api/v3/repos/airloom/{stage_repo.name}/hooks",
        json={"name": "web", "config": {"url": receiver.url}, "events": ["push"]},
        auth=("airloom", settings.secret("git_password")),
        timeout=60,
    )
    assert answer.json()["config"]["content_type"] == "form"
    sha = stage_repo.commit("One", a__txt="1")
    stage_repo.push()
    got = receiver.next()
    assert got.headers["content-type"].startswith("application/x-www-form-urlencoded")
    assert "x-hub-signature" not in got.headers
    assert json.loads(parse_qs(got.body.decode())["payload"][0])["after"] == sha


def test_what_was_pushed_before_a_kill_is_delivered_after_it(
    settings: Settings, receiver: Receiver, tmp_path: Path
) -> None:
    service = git_server.service(settings)
    client = GitBucket.from_settings(settings)
    work = tmp_path / "killed"
    with running(service, settings.log_dir) as process:
        client.ensure_repo("killed")
        client.ensure_hook("killed", receiver.url, SECRET)
        git("init", "--quiet", "-b", "main", str(work), cwd=tmp_path)
        repo = StageRepoFixture(settings, "killed", work)
        sha = repo.commit("One", a__txt="1")
        receiver.gate.clear()
        repo.push()
        receiver.next()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    receiver.gate.set()
    # A push that the server did not live to see.
    spool = settings.data_dir / "git" / ".forge" / "spool"
    bare = settings.data_dir / "git" / "airloom" / "killed.git"
    (spool / "1-1.push").write_text(f"{bare}\nada\n{ZERO} {sha} refs/heads/late\nend\n")
    (spool / "2-1.push").write_text("no push at all\n")
    with running(service, settings.log_dir):
        refs = {receiver.next().payload["ref"] for _ in range(2)}
        assert refs == {"refs/heads/main", "refs/heads/late"}
        assert wait_for(lambda: not list(spool.glob("*.push")), "empty spool")


def signed(settings: Settings, payload: dict, **headers: str) -> requests.Response:
    body = json.dumps(payload).encode()
    digest = hmac.new(settings.secret("webhook_secret").encode(), body, hashlib.sha256).hexdigest()
    sent = {
        "Content-Type": "application/json",
        "X-Github-Event": "push",
        "X-Hub-Signature-256": f"sha256={digest}",
        **headers,
    }
    sent = {name: value for name, value in sent.items() if value}
    return requests.post(builder.hook_url(settings), data=body, headers=sent, timeout=60)


def event(repo: str, **changes: str) -> dict:
    return {
        "ref": "refs/heads/main",
        "before": ZERO,
        "after": "1" * 40,
        "commits": [],
        "pusher": {"name": "ada"},
        "repository": {"name": repo, "full_name": f"airloom/{repo}"},
        **changes,
    }


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({"X-Hub-Signature-256": ""}, "unsigned"),
        ({"X-Hub-Signature-256": "sha256=" + "0" * 64}, "forged"),
        ({"X-Hub-Signature-256": "sha1=x"}, "forged"),
        ({"X-Hub-Signature-256": "", "X-Hub-Signature": "sha1=x"}, "unsigned"),
    ],
)
def test_unsigned_and_forged_events_are_refused_and_counted(
    stage_repo: StageRepoFixture, headers: dict[str, str], outcome: str
) -> None:
    settings = stage_repo.settings
    name = f'airloom_git_push_events_total{{outcome="{outcome}"}}'
    before, builds = metric(settings, name), metric(settings, "airloom_git_builds_total")
    answer = signed(settings, event(stage_repo.name), **headers)
    assert answer.status_code == 401
    assert metric(settings, name) == before + 1
    assert metric(settings, "airloom_git_builds_total") == builds


@pytest.mark.parametrize(
    ("payload", "headers", "status"),
    [
        ({}, {}, 400),
        ({"ref": "refs/heads/main"}, {}, 400),
        (event("none"), {}, 404),
        (event("none"), {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (event("x", ref="refs/tags/d/x") | {"repository": {"full_name": "other/x"}}, {}, 200),
        (event("x"), {"X-Github-Event": "issues"}, 200),
    ],
)
def test_unusable_events_start_nothing(
    git_settings: Settings, payload: dict, headers: dict[str, str], status: int
) -> None:
    answer = signed(git_settings, payload, **headers)
    assert answer.status_code == status
    assert "build" not in answer.json()


def test_only_changes_of_stages_on_main_call_for_a_build(stage_repo: StageRepoFixture, s3_store: ObjectStore) -> None:
    settings, name = stage_repo.settings, stage_repo.name
    statuses = GitBucket.from_settings(settings).statuses
    first = stage_repo.commit_files(
        "One", {"stages.yaml": STAGES, "main.py": "1", "README.md": "hi", "model/net.py": ""}
    )
    stage_repo.push()
    GitBucket.from_settings(settings).set_status(name, first, state="success", context="airloom/build")
    second = stage_repo.commit_files("Docs", {"README.md": "ho", "model_notes.md": "x"})
    stage_repo.push("main", "main:dev")

    def ask(**changes: str) -> dict:
        return signed(settings, event(name, **changes)).json()

    assert ask(before=first, after=second) == {"ignored": "nothing that a stage is made of has changed"}
    assert ask(ref="refs/tags/d/CV_a", after=second) == {"ignored": "a tag is not built"}
    assert ask(before=second, after=ZERO) == {"ignored": "a deletion is not built"}
    assert ask(ref="refs/heads/dev", after=second) == {"ignored": "only main is built"}
    third = stage_repo.commit_files("Model", {"model/net.py": "1"})
    stage_repo.push()
    # The tip is built, whatever order events come in.
    assert ask(before=first, after=second)["build"] == f"{name}@{third}"
    wait_for(lambda: [s for s in statuses(name, third) if s["state"] == "success"], "status of the build")
    assert statuses(name, second) == []


def test_who_pushes_is_told_of_the_build(stage_repo: StageRepoFixture, gitbucket: GitBucket) -> None:
    settings = stage_repo.settings
    gitbucket.ensure_hook(stage_repo.name, builder.hook_url(settings), settings.secret("webhook_secret"))
    sha = stage_repo.commit_files("One", {"stages.yaml": STAGES, "main.py": "1", "model/a.py": ""})
    said = stage_repo.push().stderr
    assert f"remote: Airloom: build of {stage_repo.name}@{sha[:8]} started" in said
    assert gitbucket.commit_url(stage_repo.name, sha) in said
    wait_for(lambda: gitbucket.statuses(stage_repo.name, sha), "the build's start")
    stage_repo.commit_files("Docs", {"README.md": "ho"})
    assert "no build" in stage_repo.push().stderr
    git("tag", "-m", "x", "d/CV_a", cwd=stage_repo.work)
    assert "Airloom" not in stage_repo.push("d/CV_a").stderr


def test_the_hook_scripts_route_is_closed_to_others(git_settings: Settings) -> None:
    url = f"{git_settings.git_base_url}/-/received"
    assert requests.post(url, data=b"x", timeout=60).status_code == 401
    assert requests.post(url, data=b"x", headers={"Authorization": "Bearer "}, timeout=60).status_code == 401
