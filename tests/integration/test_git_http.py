"""git over HTTP: clone, push, authentication."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import requests

from airloom.settings import Settings
from tests.fixtures.git import StageRepoFixture, git


def test_push_and_clone_give_the_bytes_back(stage_repo: StageRepoFixture, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    sha = stage_repo.commit_files("Add data", {"a/b.bin": content, "läng ü.txt": "hi"})
    stage_repo.push()
    git("clone", "--quiet", stage_repo.url, "copy", cwd=tmp_path)
    assert (tmp_path / "copy/a/b.bin").read_bytes() == content
    assert git("rev-parse", "HEAD", cwd=tmp_path / "copy").stdout.strip() == sha


def test_gitbuckets_clone_address_works_too(stage_repo: StageRepoFixture, tmp_path: Path) -> None:
    sha = stage_repo.commit("Add x", x__txt="x")
    stage_repo.push()
    url = stage_repo.url.replace("/airloom/repo", "/git/airloom/repo")
    assert sha in git("ls-remote", url, cwd=tmp_path).stdout


def test_a_push_of_many_megabytes_arrives(stage_repo: StageRepoFixture) -> None:
    # More than http.postBuffer: git then sends chunks without a length.
    stage_repo.commit_files("Add much", {f"{n}.bin": os.urandom(4 * 1024 * 1024) for n in range(6)})
    stage_repo.push()
    assert "refs/heads/main" in git("ls-remote", stage_repo.url, cwd=stage_repo.work).stdout


def test_a_compressed_body_is_understood(stage_repo: StageRepoFixture) -> None:
    sha = stage_repo.commit("Start", x__txt="0")
    stage_repo.push()
    settings = stage_repo.settings
    answer = requests.post(
        f"{settings.git_base_url}/airloom/{stage_repo.name}.git/git-upload-pack",
        data=gzip.compress(b"0014command=ls-refs\n00010000"),
        headers={
            "Content-Type": "application/x-git-upload-pack-request",
            "Content-Encoding": "gzip",
            "Git-Protocol": "version=2",
        },
        auth=("airloom", settings.secret("git_password")),
        timeout=60,
    )
    assert f"{sha} refs/heads/main".encode() in answer.content


@pytest.mark.parametrize(("user", "password"), [("airloom", "wrong"), ("nobody", "x"), ("airloom", "")])
def test_a_wrong_password_is_refused(stage_repo: StageRepoFixture, user: str, password: str) -> None:
    stage_repo.commit("Add x", x__txt="x")
    done = git("push", stage_repo.url_of(user, password), "main", cwd=stage_repo.work, check=False)
    assert done.returncode != 0
    assert "Authentication failed" in done.stderr
    assert git("ls-remote", stage_repo.url, cwd=stage_repo.work).stdout == ""


def test_the_administrator_may_push(stage_repo: StageRepoFixture) -> None:
    sha = stage_repo.commit("Add x", x__txt="x")
    url = stage_repo.url_of("admin", stage_repo.settings.secret("admin_password"))
    git("push", "--quiet", url, "main", cwd=stage_repo.work)
    assert sha in git("ls-remote", stage_repo.url, cwd=stage_repo.work).stdout


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/airloom/x",
        "/api/v3/user/repos",
        "/airloom/x.git/info/refs?service=git-upload-pack",
        "/airloom/x.git/HEAD",
    ],
)
def test_nothing_is_shown_without_a_password(git_settings: Settings, path: str) -> None:
    answer = requests.get(f"{git_settings.git_base_url}{path}", timeout=60)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/airloom/none.git/info/refs?service=git-upload-pack", 404),
        ("/airloom/..%2f..%2fx.git/info/refs?service=git-upload-pack", 404),
        ("/airloom/REPO.git/HEAD", 403),
        ("/airloom/REPO.git/config", 403),
        ("/airloom/REPO.git/info/refs?service=git-upload-archive", 403),
    ],
)
def test_only_gits_smart_protocol_is_spoken(stage_repo: StageRepoFixture, path: str, status: int) -> None:
    settings = stage_repo.settings
    session = requests.Session()
    request = requests.Request(
        "GET", f"{settings.git_base_url}{path}", auth=("airloom", settings.secret("git_password"))
    )
    prepared = session.prepare_request(request)
    prepared.url = f"{settings.git_base_url}{path}"
    assert session.send(prepared, timeout=60).status_code in {status, 404}


def test_a_broken_push_leaves_nothing(stage_repo: StageRepoFixture) -> None:
    settings = stage_repo.settings
    answer = requests.post(
        f"{settings.git_base_url}/airloom/{stage_repo.name}.git/git-receive-pack",
        data=b"0095garbage",
        headers={"Content-Type": "application/x-git-receive-pack-request"},
        auth=("airloom", settings.secret("git_password")),
        timeout=60,
    )
    assert b"unpack ok" not in answer.content
    assert git("ls-remote", stage_repo.url, cwd=stage_repo.work).stdout == ""
    stage_repo.commit("Add x", x__txt="x")
    stage_repo.push()
