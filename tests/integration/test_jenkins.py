"""Push events on their way to Jenkins: hooks as they are provisioned, and what each event starts there."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterator

import pytest
import requests

from airloom.embedded.provision import ensure_receiver
from airloom.errors import AuthError, NotFoundError, ServiceError, UnavailableError
from airloom.hooks.connect import Hooks
from airloom.hooks.gitbucket import GitBucket
from airloom.hooks.jenkins import hook_url
from airloom.settings import Settings
from airloom.stack.git_users import ensure_git_users
from airloom.stack.jenkins import Job
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.gitbucket_server import GitBucketServer, Hook
from tests.fixtures.jenkins_server import NO_JOBS, JenkinsServer
from tests.fixtures.recorded import REPO, SECRET, recorded
from tests.fixtures.stage_repo import wait_until

REPOS = ("de_datapreprocessing", "ds_mlmodeling", "ds_modelserving")
ZERO, OLD, NEW = "0" * 40, "a" * 40, "b" * 40
MAIN = "refs/heads/main"


class Stack:
    """GitBucket and Jenkins of one installation."""

    def __init__(self, settings: Settings, git_server: GitBucketServer, jenkins: JenkinsServer) -> None:
        self.settings = settings.model_copy(update={"git_url": git_server.url, "jenkins_url": jenkins.url})
        self.git, self.jenkins = git_server, jenkins

    def provision(self, **changes: str) -> None:
        hooks = Hooks(self.settings.model_copy(update=changes))
        ensure_git_users(hooks.settings)
        for repo in REPOS:
            hooks.gitbucket.ensure_repo(repo, "A stage repo")
            ensure_receiver(hooks, repo)

    def hooks(self, repo: str = "ds_mlmodeling") -> list[Hook]:
        return list(self.git.repos["airloom", repo].hooks.values())

    def push(
        self, repo: str = "ds_mlmodeling", *, ref: str = MAIN, before: str = OLD, after: str = NEW
    ) -> list[tuple[int, str]]:
        return self.git.push("airloom", repo, ref=ref, before=before, after=after, pusher="ada")


@pytest.fixture
def stack(settings: Settings, gitbucket_server: GitBucketServer, jenkins_server: JenkinsServer) -> Iterator[Stack]:
    return Stack(settings, gitbucket_server, jenkins_server)


# Provisioning


def test_hooks_lead_to_jenkins(stack: Stack) -> None:
    stack.provision()
    assert set(stack.git.repos) == {("airloom", repo) for repo in REPOS}
    for repo in REPOS:
        (hook,) = stack.hooks(repo)
        token = stack.settings.secret("jenkins_hook_token")
        assert hook.url == f"{stack.jenkins.url}/generic-webhook-trigger/invoke?token={token}"
        assert (hook.content_type, hook.events) == ("json", ("push",))
        assert hook.secret == stack.settings.secret("webhook_secret")


def test_a_second_run_changes_nothing(stack: Stack) -> None:
    stack.provision()
    before = stack.git.state()
    stack.git.calls.clear()
    stack.provision()
    assert stack.git.state() == before
    # GitBucket does not show a hook's secret: it is written again, and nothing else is.
    assert [write.partition(" ")[0] for write in stack.git.writes()] == ["PATCH"] * len(REPOS)


def test_what_builds_may_change(stack: Stack) -> None:
    """One receiver at a time, or every push would be built twice; hooks that people made stay."""
    stack.provision()
    people = Hook(99, "http://chat.example.org/hook", "form", None, ("push",))
    stack.git.repos["airloom", "ds_mlmodeling"].hooks[99] = people
    stack.provision(jenkins_url="")
    assert [hook.url for hook in stack.hooks()] == [people.url, f"{stack.git.url}/-/hooks/push"]
    stack.provision()
    assert [hook.url for hook in stack.hooks()] == [people.url, hook_url(stack.settings)]
    (stack.settings.secrets_dir / "jenkins_hook_token").write_text("another")
    stack.provision()
    assert [hook.url.rpartition("=")[2] for hook in stack.hooks()] == ["http://chat.example.org/hook", "another"]
    assert len(stack.hooks("ds_modelserving")) == 1


@pytest.mark.parametrize("answers", range(2, 16, 3))
def test_cut_off_anywhere_it_is_finished_by_the_next_run(stack: Stack, answers: int) -> None:
    stack.git.answers_left = answers
    with pytest.raises(UnavailableError):
        stack.provision()
    stack.git.answers_left = None
    stack.provision()
    assert [len(stack.hooks(repo)) for repo in REPOS] == [1, 1, 1]
    assert all(hook.url == hook_url(stack.settings) for repo in REPOS for hook in stack.hooks(repo))


@pytest.mark.parametrize(("status", "error"), [(403, AuthError), (404, NotFoundError), (500, ServiceError)])
def test_refused_hooks(stack: Stack, status: int, error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stack.git.faults = [("POST .*/ds_mlmodeling/hooks", status)]
    with pytest.raises(error, match=f"ds_mlmodeling/hooks: {status}") as caught:
        stack.provision()
    token = stack.settings.secret("jenkins_hook_token")
    assert token not in str(caught.value)
    assert token not in caplog.text
    stack.provision()
    assert len(stack.hooks()) == 1


# Events


def test_a_push_starts_the_repos_own_job(stack: Stack) -> None:
    stack.provision()
    ((status, text),) = stack.push()
    assert (status, json.loads(text)["message"]) == (200, "Triggered jobs.")
    (started,) = stack.jenkins.started
    assert started.job == "ds_mlmodeling"
    assert started.variables["push_after"] == NEW
    assert started.variables["push_user"] == "ada"


@pytest.mark.parametrize(
    ("ref", "after"),
    [
        (MAIN, ZERO),
        ("refs/heads/dev", NEW),
        ("refs/heads/main/x", NEW),
        ("refs/tags/digits/CV_fix_aaaaaaaa_DV_20261121T040000000Z", NEW),
        ("refs/tags/main", NEW),
    ],
)
def test_what_starts_nothing(stack: Stack, ref: str, after: str) -> None:
    stack.provision()
    assert [status for status, _ in stack.push(ref=ref, after=after)] == [200]
    assert stack.jenkins.started == []


def test_500_version_tags_start_nothing(stack: Stack) -> None:
    stack.provision()
    for number in range(500):
        stack.push(ref=f"refs/tags/digits/CV_{number}", before=ZERO, after=f"{number:040x}")
    assert len(stack.jenkins.answers) == 500
    assert stack.jenkins.started == []


def test_forged_and_unsigned_events_are_refused(stack: Stack) -> None:
    stack.provision()
    (hook,) = stack.hooks()
    hook.secret = "another"
    assert [status for status, _ in stack.push()] == [403]
    hook.secret = None
    assert [status for status, _ in stack.push()] == [403]
    assert stack.jenkins.started == []


def test_a_form_is_refused(stack: Stack) -> None:
    """What GitBucket sends when a hook is made without a content type."""
    stack.provision()
    (hook,) = stack.hooks()
    hook.content_type = "form"
    assert [status for status, _ in stack.push()] == [403]
    assert stack.jenkins.started == []


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/generic-webhook-trigger/invoke", 404, "No token was supplied"),
        ("/generic-webhook-trigger/invoke?token=wrong", 404, "A token was supplied"),
        ("/generic-webhook-trigger?token={token}", 404, "Not Found"),
        ("/gitbucket-webhook/", 404, "Not Found"),
    ],
)
def test_other_addresses(stack: Stack, path: str, status: int, words: str) -> None:
    stack.provision()
    (hook,) = stack.hooks()
    hook.url = stack.jenkins.url + path.format(token=stack.jenkins.token)
    ((code, text),) = stack.push()
    assert code == status
    assert words in text
    if "supplied" in words:
        assert json.loads(text)["message"].startswith(NO_JOBS)
    assert stack.jenkins.started == []


def test_an_event_without_its_header_starts_nothing(stack: Stack) -> None:
    body = json.dumps({"ref": MAIN, "after": NEW, "repository": {"full_name": "airloom/ds_mlmodeling"}}).encode()
    key = stack.settings.secret("webhook_secret").encode()
    headers = {
        "Content-Type": "application/json",
        "X-Hub-Signature-256": "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest(),
    }
    url = hook_url(stack.settings)
    assert requests.post(url, data=body, headers=headers, timeout=5).status_code == 200
    assert stack.jenkins.started == []
    requests.post(url, data=body, headers={**headers, "X-Github-Event": "push"}, timeout=5)
    assert [started.job for started in stack.jenkins.started] == ["ds_mlmodeling"]


@pytest.mark.parametrize(
    ("name", "status", "starts"),
    [
        ("branch-created", 200, True),
        ("branch-updated", 200, True),
        ("two-commits", 200, True),
        # Whether a stage's files have changed is for `airloom build --once` to say.
        ("documentation", 200, True),
        ("other-branch-created", 200, False),
        ("other-branch-deleted", 200, False),
        ("tag-created", 200, False),
        ("tag-deleted", 200, False),
        ("as-a-form", 403, False),
    ],
)
def test_recorded_events(settings: Settings, name: str, status: int, starts: bool) -> None:
    (settings.secrets_dir / "webhook_secret").write_text(SECRET)
    server = JenkinsServer(settings, [Job(REPO, "airloom")])
    try:
        event = recorded(name)
        url = hook_url(settings.model_copy(update={"jenkins_url": server.url}))
        assert requests.post(url, data=event.body, headers=event.headers, timeout=5).status_code == status
        assert len(server.started) == starts
        if starts:
            variables = server.started[0].variables
            assert variables["push_after"] == json.loads(event.body)["after"]
            assert variables["x_github_delivery"] == event.headers["X-Github-Delivery"]
    finally:
        server.close()


# Airloom's own git server delivers to Jenkins as well


def test_a_real_push_reaches_jenkins(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, git_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = JenkinsServer(git_settings)
    try:
        hooks = Hooks(git_settings.model_copy(update={"jenkins_url": server.url}))
        gitbucket.ensure_repo("ds_modelserving", "made by a test")
        ensure_receiver(hooks, "ds_modelserving")
        sha = stage_repo.commit("One", main__py="1")
        url = stage_repo.url.replace(f"/{stage_repo.name}.git", "/ds_modelserving.git")
        git("push", "--quiet", "--force", url, "main", cwd=stage_repo.work)
        wait_until(lambda: server.started, "the event at Jenkins")
        git("tag", "-m", "x", "d/CV_a", cwd=stage_repo.work)
        git("push", "--quiet", url, "d/CV_a", cwd=stage_repo.work)
        wait_until(lambda: len(server.answers) == 2, "the tag's event at Jenkins")
        (started,) = server.started
        assert (started.job, started.variables["push_after"]) == ("ds_modelserving", sha)
        assert started.variables["push_user"] == "airloom"
        assert [status for status, _ in server.answers] == [200, 200]
    finally:
        for hook in gitbucket.hooks("ds_modelserving"):
            gitbucket._call("DELETE", f"repos/airloom/ds_modelserving/hooks/{hook['id']}")
        server.close()
