"""GitBucket's API and pages, by the client that speaks to both servers."""

from __future__ import annotations

import re

import pytest
import requests

from airloom.errors import AuthError, NotFoundError, UnavailableError
from airloom.hooks.git import GitRemote
from airloom.hooks.gitbucket import GitBucket
from tests.fixtures.git import StageRepoFixture
from tests.fixtures.services import free_port

EVIL = '<script>alert("x")</script>'


def page(repo: StageRepoFixture, path: str) -> requests.Response:
    return requests.get(
        f"{repo.settings.git_base_url}/{path}", auth=("airloom", repo.settings.secret("git_password")), timeout=10
    )


def test_repos_and_hooks_are_made_once(stage_repo: StageRepoFixture, gitbucket: GitBucket) -> None:
    gitbucket.ensure_repo(stage_repo.name, "another text")
    found = [repo for repo in gitbucket.list_repos() if repo["name"] == stage_repo.name]
    assert [repo["description"] for repo in found] == ["made by a test"]
    for secret in ("one", "two"):
        gitbucket.ensure_hook(stage_repo.name, "http://127.0.0.1:9/hook", secret)
    hooks = gitbucket.hooks(stage_repo.name)
    assert [hook["config"] for hook in hooks] == [{"content_type": "json", "url": "http://127.0.0.1:9/hook"}]
    assert hooks[0]["events"] == ["push"]


def test_a_second_hook_with_one_address_is_refused(stage_repo: StageRepoFixture) -> None:
    url = f"{stage_repo.settings.git_base_url}/api/v3/repos/airloom/{stage_repo.name}/hooks"
    auth = ("airloom", stage_repo.settings.secret("git_password"))
    body = {"name": "web", "config": {"url": "http://127.0.0.1:9/x", "content_type": "json"}, "events": ["push"]}
    assert [requests.post(url, json=body, auth=auth, timeout=10).status_code for _ in range(2)] == [200, 500]
    body["events"] = ["release_everything"]
    assert requests.post(url, json=body, auth=auth, timeout=10).status_code == 400


def test_the_api_takes_json_alone(stage_repo: StageRepoFixture) -> None:
    # A form is all that a page of another site can make a browser send.
    url = f"{stage_repo.settings.git_base_url}/api/v3/user/repos"
    auth = ("airloom", stage_repo.settings.secret("git_password"))
    assert requests.post(url, data={"name": "evil"}, auth=auth, timeout=10).status_code == 415
    for body in (b"{", b"[]", b'{"name": ""}', b'{"name": "../x"}', b'{"name": ".git"}', b'{"name": 3}'):
        answer = requests.post(url, data=body, headers={"Content-Type": "application/json"}, auth=auth, timeout=10)
        assert answer.status_code == 400, body


def test_a_status_replaces_the_one_before(stage_repo: StageRepoFixture, gitbucket: GitBucket) -> None:
    sha = stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    for state in ("pending", "success"):
        gitbucket.set_status(
            stage_repo.name, sha, state=state, context="airloom/build", description=state, target_url="http://x/y"
        )
    gitbucket.set_status(stage_repo.name, sha, state="failure", context="gate", description="x" * 5000)
    found = {status["context"]: status for status in gitbucket.statuses(stage_repo.name, sha)}
    assert found["airloom/build"]["state"] == "success"
    assert found["airloom/build"]["target_url"] == "http://x/y"
    assert found["airloom/build"]["creator"]["login"] == "airloom"
    assert len(found["gate"]["description"]) == 999
    combined = page(stage_repo, f"api/v3/repos/airloom/{stage_repo.name}/commits/main/status").json()
    assert (combined["state"], combined["total_count"]) == ("failure", 2)


def test_an_unusable_status_is_refused(stage_repo: StageRepoFixture, gitbucket: GitBucket) -> None:
    sha = stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    with pytest.raises(NotFoundError):
        gitbucket.set_status(stage_repo.name, "1" * 40, state="success", context="x")
    with pytest.raises(NotFoundError):
        gitbucket.set_status(stage_repo.name, sha, state="great", context="x")  # type: ignore[arg-type]
    gitbucket.set_status(stage_repo.name, sha, state="success", context="x", target_url="javascript:alert(1)")
    assert gitbucket.statuses(stage_repo.name, sha)[0]["target_url"] is None


def test_releases_of_tags_with_slashes(
    stage_repo: StageRepoFixture, gitbucket: GitBucket, git_remote: GitRemote
) -> None:
    sha = stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    tag = "digits/CV_one_12345678_DV_20261121T040000000Z"
    git_remote.write_version(
        stage_repo.name, parent=sha, files={"d.dvc": b"1"}, tag=tag, message="{}", commit_message="m"
    )
    for body in ("# First", "# Second"):
        gitbucket.create_release(stage_repo.name, tag, "digits 1.0.1", body)
    found = gitbucket.releases(stage_repo.name)
    assert [(r["tag_name"], r["name"], r["body"]) for r in found] == [(tag, "digits 1.0.1", "# First")]
    assert gitbucket.tags(stage_repo.name) == [tag]


def test_commits_by_the_api(stage_repo: StageRepoFixture) -> None:
    sha = stage_repo.commit_files("One", {"a/b.txt": "x"})
    stage_repo.push()
    api = f"api/v3/repos/airloom/{stage_repo.name}"
    got = page(stage_repo, f"{api}/commits/{sha}").json()
    assert (got["sha"], got["commit"]["message"], got["files"]) == (
        sha,
        "One",
        [{"filename": "a/b.txt", "status": "added"}],
    )
    assert [commit["sha"] for commit in page(stage_repo, f"{api}/commits").json()] == [sha]
    assert page(stage_repo, f"{api}/commits/none").status_code == 404
    assert page(stage_repo, "api/v3/repos/airloom/none").status_code == 404


def test_errors_of_the_client(stage_repo: StageRepoFixture, gitbucket: GitBucket) -> None:
    url = stage_repo.settings.git_base_url
    with pytest.raises(AuthError, match="git_password"):
        GitBucket(base_url=url, owner="airloom", user="airloom", password="no").list_repos()
    with pytest.raises(NotFoundError):
        gitbucket.hooks("none")
    absent = GitBucket(base_url=f"http://127.0.0.1:{free_port()}", owner="a", user="a", password="b")
    with pytest.raises(UnavailableError, match="did not answer"):
        absent.list_repos()


def test_pages_show_and_escape(stage_repo: StageRepoFixture, gitbucket: GitBucket, git_remote: GitRemote) -> None:
    sha = stage_repo.commit_files(f"Fix {EVIL}", {"<b>.txt": "x", "stages.yaml": "x"})
    stage_repo.push()
    gitbucket.set_status(stage_repo.name, sha, state="failure", context=EVIL, description=EVIL)
    message = '{"data": {"rows": 5000, "note": "<i>ü</i>"}, "metrics": {"accuracy": 0.97}}'
    git_remote.write_version(
        stage_repo.name, parent=sha, files={"d.dvc": b"1"}, tag="digits/CV_a", message=message, commit_message="m"
    )
    gitbucket.create_release(stage_repo.name, "digits/CV_a", EVIL, EVIL)
    base = f"airloom/{stage_repo.name}"
    for path in (
        "",
        base,
        f"{base}/commit/{sha}",
        f"{base}/tree/digits/CV_a",
        f"{base}/releases",
        f"{base}/commits/main",
    ):
        answer = page(stage_repo, path)
        assert answer.status_code == 200, path
        assert "<script" not in answer.text
        assert "<b>" not in answer.text
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    commit = page(stage_repo, f"{base}/commit/{sha}").text
    assert "Fix &lt;script&gt;" in commit
    assert '<td class="failure">failure</td>' in commit
    assert "&lt;b&gt;.txt" in commit
    tree = page(stage_repo, f"{base}/tree/digits/CV_a").text
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", tree)
    assert rows == [("data.rows", "5000"), ("data.note", "&lt;i&gt;ü&lt;/i&gt;"), ("metrics.accuracy", "0.97")]
    assert gitbucket.commit_url(stage_repo.name, sha).endswith(f"/{base}/commit/{sha}")
    assert gitbucket.tag_url(stage_repo.name, "digits/CV_a").endswith(f"/{base}/tree/digits/CV_a")


@pytest.mark.parametrize("path", ["airloom/none", "airloom/none/commit/x", "none/none/releases", "x/y/tree/z"])
def test_a_page_of_nothing_is_404(stage_repo: StageRepoFixture, path: str) -> None:
    assert page(stage_repo, path).status_code == 404


def test_pages_of_an_empty_repo(stage_repo: StageRepoFixture) -> None:
    answer = page(stage_repo, f"airloom/{stage_repo.name}")
    assert answer.status_code == 200
    assert "Nothing has been pushed" in answer.text
    assert page(stage_repo, f"airloom/{stage_repo.name}/commit/main").status_code == 404


def test_metrics_count_pushes(stage_repo: StageRepoFixture) -> None:
    stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    text = requests.get(f"{stage_repo.settings.git_base_url}/metrics", timeout=10).text
    assert 'airloom_git_request_seconds_count{kind="push",status="200"}' in text
