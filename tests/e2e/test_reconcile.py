"""A push of which nobody is told is served all the same, and the ledger shows the way of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airloom.embedded import builder
from tests.e2e.actions import run_of_push
from tests.e2e.conftest import Platform

DATA, GATE, RELEASE = (f"airloom/{kind}/digits" for kind in ("data", "gate", "release"))


@pytest.fixture
def deaf(platform: Platform) -> Any:
    """The repo of serving, while nobody hears of pushes to it."""
    repo, hooks, settings = "ds_modelserving", platform.hooks, platform.settings
    url = builder.hook_url(settings)
    (number,) = [hook["id"] for hook in hooks.gitbucket.hooks(repo) if hook["config"]["url"] == url]
    hooks.gitbucket._call("DELETE", f"repos/{settings.git_owner}/{repo}/hooks/{number}")
    yield repo
    hooks.gitbucket.ensure_hook(repo, url, settings.secret("webhook_secret"))


def test_a_push_that_nobody_was_told_of_is_served(platform: Platform, deaf: str, tmp_path: Path) -> None:
    work = platform.clone(deaf, tmp_path / deaf)
    app = work / "serving" / "app.py"
    app.write_text(f"{app.read_text()}\n# Found by the reconciler.\n")
    commit = platform.push(work, "Tell nobody")
    did = json.loads(platform.airloom("pushes", "reconcile", "--json").stdout)
    assert [(action["commit"], action["did"]) for action in did] == [(commit, "built")]
    summary = run_of_push(platform, deaf, commit)
    assert summary["state"] == "success", summary
    release = platform.deployed()

    listed = json.loads(platform.airloom("pushes", "--repo", deaf, "--json").stdout)
    push = next(push for push in listed if push["commit"] == commit)
    assert (push["asked_by"], push["deliveries"], push["build"], push["airflow"]) == ("reconciler", [], "built", "told")
    (run,) = push["runs"]
    assert (run["run_id"], run["state"], run["verdict"], run["release"]) == (
        summary["run_id"],
        "success",
        "promoted",
        release,
    )
    assert push["total_seconds"] > 0
    shown = platform.airloom("pushes").stdout
    assert f"{deaf}@{commit[:8]}" in shown
    assert "Tell nobody" in shown

    statuses = {row["context"]: row for row in platform.hooks.gitbucket.statuses(deaf, commit)}
    assert statuses[RELEASE]["state"] == "success"
    assert f"release {release} of digits answers" in statuses[RELEASE]["description"]
    assert {DATA, GATE} & set(statuses) == set()  # neither data nor model is made of it
    model = platform.hooks.git.head("ds_mlmodeling")
    assert {DATA, GATE} & {row["context"] for row in platform.hooks.gitbucket.statuses("ds_mlmodeling", model)} == {
        GATE
    }
    names = [found["tag_name"] for found in platform.hooks.gitbucket.releases("ds_mlmodeling")]
    assert f"release/digits/{release}" in names


def test_the_reconciler_has_nothing_to_do_when_all_is_told(platform: Platform) -> None:
    airflow = platform.hooks.airflow
    run_id = airflow.trigger("airloom__reconcile")
    state = platform.ended(run_id, "airloom__reconcile")["state"]
    assert state == "success", platform.reasons(run_id, "airloom__reconcile")
    assert airflow.xcom("airloom__reconcile", run_id, "reconcile") == []
    assert json.loads(platform.airloom("pushes", "reconcile", "--json").stdout) == []
    listed = json.loads(platform.airloom("runs", "--json").stdout)
    pipelines = {path.stem for path in platform.config.parent.glob("*.yaml")}
    assert "digits" in {row["pipeline"] for row in listed} <= pipelines, "the platform's own bury the others"


def test_replay_changes_nothing_that_went_well(platform: Platform) -> None:
    (push,) = json.loads(platform.airloom("pushes", "-n", "1", "--json").stdout)
    before = platform.hooks.airflow.runs("digits", limit=1)
    record = json.loads(platform.airloom("pushes", "replay", f"{push['repo']}@{push['commit']}", "--json").stdout)
    assert (record["created"], record["airflow"]) == (False, "told")
    assert platform.hooks.airflow.runs("digits", limit=1)[0]["dag_run_id"] == before[0]["dag_run_id"]
