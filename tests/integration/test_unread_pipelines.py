"""Pushes to a repo whose pipeline Airflow has not read yet, or that no pipeline uses."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from airloom.contract.build import Telling
from airloom.flows.build import build, find_build
from airloom.flows.pushes import list_pushes
from airloom.flows.reconcile import reconcile
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from tests.conftest import ROOT, make_settings
from tests.fixtures import pushes
from tests.fixtures.git import StageRepoFixture
from tests.fixtures.pushes import GOOD, MAIN, AirflowDouble, status, wait_for


class Team:
    """A repo whose pushes are built, and the pipelines of the installation that looks after it."""

    def __init__(self, repo: StageRepoFixture, airflow: AirflowDouble, home: Path) -> None:
        ports = {name: getattr(repo.settings, name) for name in ("s3_port", "git_port", "airflow_port")}
        (home / "configs").mkdir(parents=True)
        self.hooks = Hooks(make_settings(home, configs=str(home / "configs"), **ports))
        self.configs = home / "configs"
        self.repo, self.airflow = repo, airflow

    def use_it(self) -> None:
        """Configure a pipeline that uses the repo."""
        config = yaml.safe_load((ROOT / "dags" / "configs" / "digits.yaml").read_text())
        for stage in config["stages"].values():
            stage["repo"] = self.repo.name
        (self.configs / "team.yaml").write_text(yaml.safe_dump({**config, "name": "team"}))

    def push(self, text: str) -> str:
        """Push a change, and wait until whoever hears of it has built it."""
        sha = self.repo.commit_files(text, {**GOOD, "main.py": f"{MAIN}# {text}\n"})
        self.repo.push()
        wait_for(lambda: self.airflow_of(sha) not in {"", "not asked", "due"}, f"build of {text}")
        return sha

    def airflow_of(self, sha: str) -> Telling | str:
        record = find_build(self.hooks, self.repo.name, sha)
        return record.airflow if record else ""

    def reconcile(self) -> list[tuple[str, str]]:
        return [(action.commit, action.did) for action in reconcile(self.hooks, grace=timedelta(0))]

    def told(self) -> list[str]:
        return [extra["commit"] for extra in self.airflow.of(self.repo.name)]


@pytest.fixture
def team(hooked: StageRepoFixture, airflow_double: AirflowDouble, tmp_path: Path) -> Team:
    return Team(hooked, airflow_double, tmp_path / "team")


@pytest.fixture
def unread(airflow_double: AirflowDouble, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Airflow has read no pipeline; `undo` makes it read all."""
    monkeypatch.setattr(pushes, "stage_asset", lambda repo: f"another of {repo}")
    return monkeypatch


def test_only_the_tip_is_told_once_its_pipeline_is_there_and_read(
    team: Team, s3_store: ObjectStore, unread: pytest.MonkeyPatch
) -> None:
    shas = [team.push(f"Change {number}") for number in range(3)]
    assert [team.airflow_of(sha) for sha in shas] == ["no pipeline"] * 3  # the git server's project knows none
    assert team.reconcile() == []  # nobody uses it, so that nobody asks
    team.use_it()
    ledger = len(list(s3_store.list("airloom", f"pushes/{team.repo.name}/")))
    assert [team.reconcile(), team.reconcile()] == [[(shas[-1], "left")]] * 2
    assert len(list(s3_store.list("airloom", f"pushes/{team.repo.name}/"))) == ledger
    unread.undo()
    assert team.reconcile() == [(shas[-1], "told")]
    assert team.reconcile() == []
    assert team.told() == [shas[-1]]
    assert status(team.repo, shas[-1]) == ("success", "built: train; Airflow has been told")
    newest = list_pushes(team.hooks, repo=team.repo.name).pushes[0]
    assert (newest.commit, newest.build, newest.airflow) == (shas[-1], "built", "told")


def test_a_build_that_knows_its_pipeline_owes_it(team: Team, unread: pytest.MonkeyPatch) -> None:
    team.use_it()
    sha = team.repo.commit_files("Early", GOOD)
    team.repo.push("main:side")  # which starts nothing by itself
    lines: list[str] = []
    record = build(team.hooks, team.repo.name, sha, lines.append)
    assert (record.announced, record.airflow) == (False, "due")
    assert "Airflow has not read team yet: told when it has" in lines
    unread.undo()
    again = build(team.hooks, team.repo.name, sha)
    assert (again.created, again.airflow) == (False, "told")
    assert team.told() == [sha]
