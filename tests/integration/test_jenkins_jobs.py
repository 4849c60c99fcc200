"""New stage repos get a job without a new image: the list that Jenkins reads, and telling it to read it again."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import create_autospec

import pytest
import requests

from airloom.errors import AuthError, ServiceError, UnavailableError
from airloom.hooks.jenkins import reload
from airloom.settings import Settings
from airloom.stack import jenkins, launch
from airloom.stack.compose import Compose
from tests.fixtures.jenkins_server import JenkinsServer
from tests.fixtures.services import free_port

TEMPLATES = ["de_datapreprocessing", "ds_mlmodeling", "ds_modelserving"]


class Installation:
    """A stack whose Jenkins runs, as far as jobs go."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        jenkins.ensure_listed(settings, jenkins.template_repos(settings.project))
        self.jenkins = JenkinsServer(settings, repos=jenkins.list_file(settings))
        self.compose = create_autospec(Compose, instance=True)
        self.compose.settings = settings
        self.compose.published.return_value = self.jenkins.url.removeprefix("http://")
        self.services("jenkins", "gitbucket")

    def services(self, *names: str) -> None:
        self.compose.config.return_value = {"services": {name: {} for name in names}}

    def add_repo(self, name: str) -> None:
        launch.add_repo(self.settings, name)

    @property
    def jobs(self) -> list[str]:
        return [job.repo for job in self.jenkins.jobs]


@pytest.fixture
def stack(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    found = Installation(settings)
    monkeypatch.setattr(launch, "Compose", lambda settings: found.compose)
    yield found
    found.jenkins.close()


def test_a_new_repo_gets_its_job_at_once(stack: Installation) -> None:
    assert stack.jobs == TEMPLATES
    stack.add_repo("team_model")
    assert stack.jobs == [*TEMPLATES, "team_model"]
    (inside,) = stack.compose.run.call_args_list
    assert inside.args[-2:] == ("add-repo", "team_model")
    stack.add_repo("team_model")
    assert stack.jenkins.reloads == 1  # nothing has changed
    assert jenkins.list_file(stack.settings).read_text() == "".join(
        f"airloom/{name}\n" for name in (*TEMPLATES, "team_model")
    )


def test_a_stack_without_jenkins_tells_nobody(stack: Installation) -> None:
    stack.services("forge")
    stack.add_repo("team_model")
    assert stack.jenkins.reloads == 0
    stack.services("jenkins", "gitbucket")  # it comes later
    stack.add_repo("team_model")
    assert "team_model" in stack.jobs


def test_a_list_that_jenkins_could_not_read_is_owed(stack: Installation) -> None:
    stack.jenkins.broken = True
    with pytest.raises(ServiceError, match="answered 200 at /configuration-as-code/reload, not 302"):
        stack.add_repo("team_model")
    stack.jenkins.broken = False
    assert jenkins.ensure_listed(stack.settings, [])
    stack.add_repo("team_model")
    assert "team_model" in stack.jobs
    assert not jenkins.ensure_listed(stack.settings, [])


def test_a_wrong_password_is_said_and_not_shown(stack: Installation) -> None:
    (stack.settings.secrets_dir / "admin_password").write_text("another-one")
    with pytest.raises(AuthError, match="refuses 'admin' at /crumbIssuer/api/json: 401") as caught:
        stack.add_repo("team_model")
    assert "another-one" not in str(caught.value)
    assert stack.jenkins.reloads == 0


def test_a_jenkins_that_is_away_is_said(settings: Settings) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        reload(settings, f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("method", "cookies", "crumb", "status"),
    [("POST", True, True, 302), ("GET", True, True, 405), ("POST", False, True, 403), ("POST", True, False, 403)],
)
def test_the_double_is_strict(stack: Installation, method: str, cookies: bool, crumb: bool, status: int) -> None:
    auth = ("admin", stack.settings.secret("admin_password"))
    session = requests.Session()
    given = session.get(f"{stack.jenkins.url}/crumbIssuer/api/json", auth=auth, timeout=5).json()
    if not cookies:
        session.cookies.clear()
    headers = {given["crumbRequestField"]: given["crumb"]} if crumb else {}
    url = f"{stack.jenkins.url}/configuration-as-code/reload"
    answer = session.request(method, url, auth=auth, headers=headers, timeout=5, allow_redirects=False)
    assert answer.status_code == status
    assert requests.post(url, headers=headers, timeout=5).status_code == 401


def test_the_list_survives_what_is_not_in_it(settings: Settings) -> None:
    path = jenkins.list_file(settings)
    path.parent.mkdir(parents=True)
    path.write_text("other/kept\nnot a name\n")
    assert jenkins.ensure_listed(settings, ["b", "a"])
    assert path.read_text() == "airloom/a\nairloom/b\nother/kept\n"
    assert path.stat().st_mode & 0o777 == 0o644
