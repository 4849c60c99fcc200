"""GitBucket's JSON and signatures, held against literals."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from airloom.embedded.forge.repositories import ZERO, Commit, Repository
from airloom.embedded.forge.shapes import Shapes, delivery_request, dumps

SHAPES = Shapes("http://git.example:8081/")
WHEN = datetime(2026, 11, 21, 5, 0, 0, 123456, tzinfo=UTC)


def commit(number: int) -> Commit:
    return Commit(
        id=f"{number:040d}",
        parents=[],
        author_name="Ada",
        author_email="ada@example.org",
        authored_at=WHEN,
        committer_name="Ada",
        committer_email="ada@example.org",
        committed_at=WHEN,
        message="Änder\n\nmehr",
        added=["a ü.txt"],
        removed=["b"],
        modified=[],
    )


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    (tmp_path / "description").write_text("what it is\n")
    return Repository("airloom", "ds_mlmodeling", tmp_path)


def test_the_payload_of_a_push(repository: Repository) -> None:
    payload = SHAPES.push_payload(
        repository, ref="refs/heads/main", before=ZERO, after="1".zfill(40), commits=[commit(1)], pusher="ada"
    )
    sha = "0000000000000000000000000000000000000001"
    person = {"name": "Ada", "email": "ada@example.org", "date": "2026-11-21T05:00:00Z"}
    pushed = {
        "id": sha,
        "message": "Änder\n\nmehr",
        "timestamp": "2026-11-21T05:00:00Z",
        "added": ["a ü.txt"],
        "removed": ["b"],
        "modified": [],
        "author": person,
        "committer": person,
        "url": f"http://git.example:8081/api/v3/airloom/ds_mlmodeling/commits/{sha}",
        "html_url": f"http://git.example:8081/airloom/ds_mlmodeling/commit/{sha}",
    }
    assert payload == {
        "pusher": {"name": "ada", "email": "ada@localhost"},
        "sender": {
            "login": "ada",
            "email": "ada@localhost",
            "type": "User",
            "site_admin": False,
            "created_at": "2026-01-01T00:00:00Z",
            "url": "http://git.example:8081/api/v3/users/ada",
            "html_url": "http://git.example:8081/ada",
        },
        "ref": "refs/heads/main",
        "before": "0000000000000000000000000000000000000000",
        "after": sha,
        "commits": [pushed],
        "repository": {
            "id": 3093582176,
            "name": "ds_mlmodeling",
            "full_name": "airloom/ds_mlmodeling",
            "description": "what it is",
            "watchers": 0,
            "forks": 0,
            "private": True,
            "default_branch": "main",
            "owner": {
                "login": "airloom",
                "email": "airloom@localhost",
                "type": "User",
                "site_admin": False,
                "created_at": "2026-01-01T00:00:00Z",
                "url": "http://git.example:8081/api/v3/users/airloom",
                "html_url": "http://git.example:8081/airloom",
            },
            "has_issues": False,
            "forks_count": 0,
            "watchers_count": 0,
            "url": "http://git.example:8081/api/v3/repos/airloom/ds_mlmodeling",
            "clone_url": "http://git.example:8081/git/airloom/ds_mlmodeling.git",
            "html_url": "http://git.example:8081/airloom/ds_mlmodeling",
        },
        "compare": f"http://git.example:8081/airloom/ds_mlmodeling/commit/{sha}",
        "head_commit": pushed,
    }


@pytest.mark.parametrize(
    ("before", "numbers", "compare"),
    [
        (ZERO, [], ""),
        ("9" * 40, [1], "/commit/" + "2" * 40),
        (ZERO, [1, 2], f"/compare/{'1'.zfill(40)}%5E...{'2' * 40}"),
        ("9" * 40, [1, 2], f"/compare/{'9' * 40}...{'2' * 40}"),
    ],
)
def test_what_to_compare(repository: Repository, before: str, numbers: list[int], compare: str) -> None:
    payload = SHAPES.push_payload(
        repository, ref="r", before=before, after="2" * 40, commits=[commit(n) for n in numbers], pusher="ada"
    )
    assert payload["compare"] == f"http://git.example:8081/airloom/ds_mlmodeling{compare}"


def test_a_signature_is_the_one_that_openssl_gives() -> None:
    # printf '{"ref":"ä"}' | openssl dgst -sha256 -hmac 'it is a secret'
    body, headers = delivery_request('{"ref":"ä"}', content_type="json", secret="it is a secret", guid="g-1")
    assert body == b'{"ref":"\xc3\xa4"}'
    assert headers == {
        "Content-Type": "application/json",
        "X-Github-Event": "push",
        "X-Github-Delivery": "g-1",
        "X-Hub-Signature": "sha1=839a1de6a75e866e10d5ecd4c4c209b51f2242da",
        "X-Hub-Signature-256": "sha256=1faca96ac92cc8c5511a9a8b21722c3b704b5c6d27250bed1ed9c5f5ba03eec7",
    }


@pytest.mark.parametrize("secret", [None, "", "  "])
def test_a_hook_without_a_secret_gets_no_signature(secret: str | None) -> None:
    _, headers = delivery_request("{}", content_type="json", secret=secret, guid="g")
    assert set(headers) == {"Content-Type", "X-Github-Event", "X-Github-Delivery"}


def test_a_form_quotes_the_payload() -> None:
    body, headers = delivery_request('{"a": "b&c"}', content_type="form", secret=None, guid="g")
    assert body == b"payload=%7B%22a%22%3A+%22b%26c%22%7D"
    assert headers["Content-Type"] == "application/x-www-form-urlencoded; charset=UTF-8"


@pytest.mark.parametrize(
    ("states", "combined"),
    [
        ([], "pending"),
        (["success"], "success"),
        (["success", "pending"], "pending"),
        (["pending", "error"], "failure"),
        (["success", "failure"], "failure"),
    ],
)
def test_the_combined_status(repository: Repository, states: list[str], combined: str) -> None:
    rows = [
        {
            "id": 1,
            "repo": "airloom/x",
            "sha": "1",
            "state": state,
            "context": "c",
            "target_url": None,
            "description": None,
            "creator": "airloom",
            "created_at": "2026-11-21T05:00:00.000000Z",
            "updated_at": "2026-11-21T05:00:00.000000Z",
        }
        for state in states
    ]
    assert SHAPES.combined_status(repository, "1", rows)["state"] == combined  # type: ignore[arg-type]


def test_addresses_are_quoted() -> None:
    assert SHAPES.url("a b/ü", "x?y#z") == "http://git.example:8081/a%20b/%C3%BC/x%3Fy%23z"
    assert dumps({"a": "ü"}) == '{"a":"ü"}'
