"""Errors of git and GitBucket, sorted; addresses quoted; texts cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    ContractError,
    NotFoundError,
    ServiceError,
    StorageFullError,
    UnavailableError,
)
from airloom.hooks.git import GitRemote
from airloom.hooks.git_command import git_error
from airloom.hooks.git_tree import export_tree
from airloom.hooks.gitbucket import GitBucket, status_error
from tests.fixtures.git import git

BUCKET = GitBucket(base_url="http://h:1/", owner="airloom", user="airloom", password="p")


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("fatal: Authentication failed for 'http://h/x.git/'", AuthError),
        ("fatal: could not read Username for 'http://h': terminal prompts disabled", AuthError),
        ("error: The requested URL returned error: 403", AuthError),
        ("fatal: unable to access 'http://h/': Failed to connect to h port 1: Connection refused", UnavailableError),
        ("fatal: unable to access 'http://h/': Could not resolve host: h", UnavailableError),
        ("error: RPC failed; HTTP 502 curl 22 The requested URL returned error: 502", UnavailableError),
        ("fatal: the remote end hung up unexpectedly", UnavailableError),
        ("error: RPC failed; HTTP 507 curl 22 The requested URL returned error: 507", StorageFullError),
        ("remote: fatal: write error: No space left on device", StorageFullError),
        ("fatal: repository 'http://h/x.git/' not found", NotFoundError),
        ("fatal: something else", ServiceError),
        ("", ServiceError),
    ],
)
def test_what_git_says_is_sorted(said: str, kind: type[Exception]) -> None:
    assert type(git_error("push", said, 128)) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (401, AuthError),
        (403, AuthError),
        (404, NotFoundError),
        (409, ConflictError),
        (429, UnavailableError),
        (500, ServiceError),
        (503, UnavailableError),
        (507, StorageFullError),
        (418, ServiceError),
    ],
)
def test_http_statuses_are_sorted(code: int, kind: type[Exception]) -> None:
    error = status_error(code, "GET http://h/x", "because\n")
    assert type(error) is kind
    assert error.message == f"GET http://h/x: {code} because"


def test_addresses_for_people() -> None:
    assert BUCKET.repo_url("a b") == "http://h:1/airloom/a%20b"
    assert BUCKET.commit_url("x", "1f") == "http://h:1/airloom/x/commit/1f"
    assert BUCKET.tag_url("x", "digits/CV_a b#1") == "http://h:1/airloom/x/tree/digits/CV_a%20b%231"


@pytest.mark.parametrize("repo", ["", "../x", "a/b", "x.git", "-x", ".x", "a b", "a?b"])
def test_bad_names_of_repos(repo: str, tmp_path: Path) -> None:
    remote = GitRemote(base_url="http://h", owner="airloom", user="u", password="p", mirrors=tmp_path)
    with pytest.raises(ConfigError, match="not a repo's name"):
        remote.clone_url(repo)
    with pytest.raises(ConfigError):
        remote.commit(repo, "main")


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "sub/../../x", ".."])
def test_links_that_lead_out_are_refused(tmp_path: Path, target: str) -> None:
    work = tmp_path / "work"
    git("init", "--quiet", str(work), cwd=tmp_path)
    (work / "link").symlink_to(target)
    git("add", "-A", cwd=work)
    git("commit", "--quiet", "-m", "m", cwd=work)
    sha = git("rev-parse", "HEAD", cwd=work).stdout.strip()
    with pytest.raises(ContractError, match="leads out"):
        export_tree(work / ".git", sha, tmp_path / "out", read_only=True)
    assert not (tmp_path / "out").exists()


def test_links_and_modes_inside_are_kept(tmp_path: Path) -> None:
    work = tmp_path / "work"
    git("init", "--quiet", str(work), cwd=tmp_path)
    (work / "sub").mkdir()
    (work / "sub" / "run.sh").write_text("#!/bin/sh\n")
    (work / "sub" / "run.sh").chmod(0o755)
    (work / "sub" / "link").symlink_to("../plain")
    (work / "plain").write_text("x")
    git("add", "-A", cwd=work)
    git("commit", "--quiet", "-m", "m", cwd=work)
    export_tree(work / ".git", "HEAD", tmp_path / "out", read_only=False)
    assert (tmp_path / "out/sub/link").read_text() == "x"
    assert (tmp_path / "out/sub/run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out/plain").stat().st_mode & 0o777 == 0o644
