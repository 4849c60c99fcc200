"""GitBucket's users, from its first start on: the administrator is made, root/root is closed, and what goes wrong."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import requests

from airloom.errors import AuthError, ServiceError, UnavailableError
from airloom.settings import Settings
from airloom.stack.git_users import ensure_git_users
from tests.fixtures.gitbucket_server import GitBucketServer, User
from tests.fixtures.services import free_port


@pytest.fixture
def fresh(settings: Settings, gitbucket_server: GitBucketServer) -> Settings:
    """Settings whose git server is GitBucket after its first start."""
    return settings.model_copy(update={"git_url": gitbucket_server.url})


def test_the_first_time_and_the_second(fresh: Settings, gitbucket_server: GitBucketServer) -> None:
    assert ensure_git_users(fresh) == "airloom made, root/root closed"
    assert gitbucket_server.writes() == ["POST /api/v3/admin/users", "PUT /api/v3/users/root/suspended"]
    assert gitbucket_server.users == {
        "root": User("root", admin=True, suspended=True),
        "airloom": User(fresh.secret("git_password"), admin=True),
    }
    user = f"{gitbucket_server.url}/api/v3/user"
    assert requests.get(user, auth=("root", "root"), timeout=5).status_code == 401
    before = gitbucket_server.state()
    gitbucket_server.calls.clear()
    assert ensure_git_users(fresh) == "airloom, root/root is closed"
    assert gitbucket_server.writes() == []
    assert gitbucket_server.state() == before


@pytest.mark.parametrize("answers", [0, 1, 2, 3])
def test_cut_off_anywhere_it_is_finished_by_the_next_run(
    fresh: Settings, gitbucket_server: GitBucketServer, answers: int
) -> None:
    gitbucket_server.answers_left = answers
    with pytest.raises(UnavailableError, match="does not answer"):
        ensure_git_users(fresh)
    gitbucket_server.answers_left = None
    assert "closed" in ensure_git_users(fresh)
    assert gitbucket_server.users["root"].suspended
    assert gitbucket_server.users["airloom"].admin
    posts = [call for call in gitbucket_server.calls if call[0] == "POST"]
    assert [status for _, _, status in posts] == [200]


def test_a_password_that_somebody_changed(fresh: Settings, gitbucket_server: GitBucketServer) -> None:
    ensure_git_users(fresh)
    gitbucket_server.users["airloom"].password = "another"
    with pytest.raises(AuthError, match="refuses the user 'airloom', and root/root") as caught:
        ensure_git_users(fresh)
    assert "git_password" in str(caught.value.hint)
    assert fresh.secret("git_password") not in str(caught.value)


def test_a_server_that_fails_leaves_nothing_half(fresh: Settings, gitbucket_server: GitBucketServer) -> None:
    gitbucket_server.faults = [("POST .*/admin/users", 500)]
    with pytest.raises(ServiceError, match="'airloom' could not be made: 500"):
        ensure_git_users(fresh)
    assert list(gitbucket_server.users) == ["root"]
    assert not gitbucket_server.users["root"].suspended
    gitbucket_server.faults = [("PUT .*/suspended", 500)]
    with pytest.raises(ServiceError, match="root/root could not be closed: 500"):
        ensure_git_users(fresh)
    assert ensure_git_users(fresh) == "airloom, root/root closed"


@pytest.mark.parametrize("user", ["airloom", "root"])
def test_a_server_that_is_not_ready_is_not_called_closed(
    fresh: Settings, gitbucket_server: GitBucketServer, user: str
) -> None:
    answers = gitbucket_server._answer

    def failing(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        login = base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode().partition(":")[0]
        return (503, {"message": "starting"}) if login == user else answers(method, path, headers, body)

    gitbucket_server.users["airloom"] = User(fresh.secret("git_password"), admin=True)
    gitbucket_server._answer = failing  # type: ignore[method-assign]
    with pytest.raises(ServiceError, match=f"cannot say who '{user}' is: 503"):
        ensure_git_users(fresh)
    assert not gitbucket_server.users["root"].suspended


def test_who_is_no_administrator_cannot_close_root(fresh: Settings, gitbucket_server: GitBucketServer) -> None:
    gitbucket_server.users["airloom"] = User(fresh.secret("git_password"))
    with pytest.raises(ServiceError, match="root/root could not be closed: 401"):
        ensure_git_users(fresh)
    assert not gitbucket_server.users["root"].suspended


def test_no_server(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"git_url": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(UnavailableError, match="does not answer"):
        ensure_git_users(nowhere)


def test_the_own_git_server_needs_none_of_it(git_settings: Settings) -> None:
    assert ensure_git_users(git_settings) == "airloom, root/root is closed"
