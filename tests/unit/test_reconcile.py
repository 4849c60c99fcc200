"""What the reconciler makes up for, and what it leaves alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from airloom.contract import CodePin
from airloom.contract.push import PushBuildStart
from airloom.errors import BuildFailedError, NotFoundError, UnavailableError
from airloom.flows import announce
from airloom.flows import reconcile as flow
from airloom.flows.build import build, find_build
from airloom.flows.push_entry import write_entry
from airloom.flows.reconcile import reconcile
from airloom.settings import Settings
from tests.fixtures.build_bench import GOOD, MAIN, Bench
from tests.fixtures.plans import make_plan

REPO = "ds_mlmodeling"
NO_GRACE = timedelta(0)


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Bench:
    return Bench(settings, tmp_path)


def run(bench: Bench, grace: timedelta = NO_GRACE) -> list[tuple[str, str]]:
    return [(action.commit, action.did) for action in reconcile(bench.hooks, repos=[REPO], grace=grace)]


def told(bench: Bench) -> list[str]:
    return [call.args[1]["commit"] for call in bench.airflow.create_asset_event.call_args_list]


def test_a_push_whose_event_was_lost_is_built_and_told_once(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    assert run(bench) == [(sha, "built")]
    assert run(bench) == []
    assert told(bench) == [sha]
    (start,) = bench.store.entries("start")
    assert start["asked_by"] == "reconciler"


def test_a_change_below_a_documentation_commit_is_found(bench: Bench) -> None:
    bench.commit(GOOD)
    bench.build()
    bench.commit({"main.py": MAIN + "# changed\n"})
    tip = bench.commit({"README.md": "hi"})
    assert run(bench) == [(tip, "built")]


def test_what_needs_no_build_gets_none(bench: Bench) -> None:
    first = bench.commit(GOOD)
    bench.build(announce=False)  # as templates are: nobody wants them told
    assert run(bench) == []
    bench.commit({"README.md": "hi"})
    assert run(bench) == []
    assert told(bench) == []
    assert len(bench.store.entries("start")) == 1
    assert bench.store.entries("start")[0]["commit"] == first


def test_an_event_gets_time_to_come(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)
    assert run(bench, timedelta(minutes=1)) == [(sha, "left")]
    assert run(bench, timedelta(minutes=1)) == [(sha, "left")]
    assert len(bench.store.entries("seen")) == 1
    (key,) = [key for _, key in bench.store.values if "-seen-" in key]
    earlier = json.loads(bench.store.values["airloom", key]) | {"at": "2026-01-01T00:00:00Z"}
    bench.store.put_json("airloom", key, earlier)
    assert run(bench, timedelta(minutes=1)) == [(sha, "built")]


def test_what_airflow_is_owed_is_told_even_below_documentation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)
    monkeypatch.setattr(announce, "_SECONDS", 0.05)
    bench.airflow.create_asset_event.side_effect = UnavailableError("Airflow did not answer")
    assert bench.build(asked_by="push").airflow == "due"
    bench.commit({"README.md": "hi"})
    assert run(bench) == [(sha, "error")]
    bench.airflow.create_asset_event.reset_mock(side_effect=True)
    assert run(bench) == [(sha, "told")]
    assert told(bench) == [sha]
    assert run(bench) == []


def unread(bench: Bench) -> None:
    """Airflow has read no pipeline that uses the repo."""
    missing = NotFoundError("no such asset")
    bench.airflow.asset_events.side_effect = bench.airflow.create_asset_event.side_effect = missing


def read(bench: Bench) -> None:
    bench.airflow.asset_events.side_effect = bench.airflow.create_asset_event.side_effect = None


def test_a_pipeline_that_airflow_reads_later_is_told_of_the_tip_alone(bench: Bench) -> None:
    unread(bench)
    bench.commit(GOOD)
    assert bench.build(asked_by="push").airflow == "due"
    tip = bench.commit({"main.py": MAIN + "# 2\n"})
    bench.build(asked_by="push")
    before = len(bench.store.values)
    assert [run(bench), run(bench)] == [[(tip, "left")]] * 2
    assert len(bench.store.values) == before  # nothing piles up while nobody reads the pipeline
    read(bench)
    bench.airflow.create_asset_event.reset_mock()
    assert run(bench) == [(tip, "told")]
    assert told(bench) == [tip]
    assert run(bench) == []


def test_a_pipeline_that_is_made_later_is_told_of_what_nobody_used_then(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    record = bench.build(announce=False).model_copy(update={"airflow": "no pipeline"})
    bench.store.put_json("airloom", f"builds/{REPO}/{sha}.json", record.model_dump(mode="json"))
    bench.airflow.runs.return_value = [{"dag_run_id": "earlier"}, {"dag_run_id": "another"}]
    assert run(bench) == [(sha, "told")]
    assert told(bench) == [sha]


@pytest.mark.parametrize("owed", ["no pipeline", "due"])
def test_a_pipeline_that_has_run_with_it_needs_no_telling(bench: Bench, owed: str) -> None:
    sha = bench.commit(GOOD)
    record = bench.build(announce=False).model_copy(update={"airflow": owed})
    bench.store.put_json("airloom", f"builds/{REPO}/{sha}.json", record.model_dump(mode="json"))
    pin = CodePin(repo=REPO, commit=sha, message="One", author="Ada <ada@example.org>")
    plan = make_plan("by-hand").model_copy(update={"code": {REPO: pin}})
    bench.store.put_json("airloom", f"{plan.prefix}/plan.json", plan.model_dump(mode="json"))
    bench.airflow.runs.return_value = [{"dag_run_id": "earlier"}, {"dag_run_id": plan.run_id}]
    assert run(bench) == []
    found = find_build(bench.hooks, REPO, sha)
    assert found is not None
    assert (found.airflow, found.announced) == ("told", True)
    assert told(bench) == []


def test_a_failed_commit_waits_for_a_person(bench: Bench) -> None:
    bad = bench.commit({**GOOD, "main.py": "x ="})
    assert run(bench) == [(bad, "failed")]
    assert run(bench) == []
    bench.commit({"README.md": "hi"})
    assert [did for _, did in run(bench)] == []


def test_a_build_that_is_under_way_is_left_alone_and_a_killed_one_is_not(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    now = datetime.now(UTC)
    common = {"repo": REPO, "commit": sha, "asked_by": "push", "pusher": "ada", "message": "One"}
    write_entry(bench.hooks, PushBuildStart(id="a", at=now, **common))
    assert run(bench) == [(sha, "left")]
    bench.store.values = {key: value for key, value in bench.store.values.items() if "-start-" not in key[1]}
    write_entry(bench.hooks, PushBuildStart(id="b", at=now - flow.BUILD_LIMIT - timedelta(minutes=5), **common))
    assert run(bench) == [(sha, "built")]


def test_what_prevents_a_build_is_not_met_at_each_look(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)

    def refuse(*_: object) -> None:
        raise UnavailableError("the registry did not answer")

    monkeypatch.setattr("airloom.flows.build_steps.BuildSteps.run", refuse)
    assert run(bench) == [(sha, "error")]
    assert run(bench) == [(sha, "left")]
    assert len(bench.store.entries("end")) == 1
    monkeypatch.undo()
    later = datetime.now(UTC) + timedelta(minutes=3)
    monkeypatch.setattr(flow, "datetime", type("Clock", (datetime,), {"now": classmethod(lambda cls, tz: later)}))
    assert run(bench) == [(sha, "built")]


def test_one_repo_in_trouble_keeps_no_other_back(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    bench.store.down = True
    (action,) = reconcile(bench.hooks, repos=[REPO], grace=NO_GRACE)
    assert (action.did, action.why) == ("error", "the object store did not answer")
    bench.store.down = False
    assert run(bench) == [(sha, "built")]


def test_a_commit_that_a_push_built_meanwhile_is_not_built_again(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    build(bench.hooks, REPO, sha, asked_by="push")
    bench.commit({"main.py": "x ="})
    with pytest.raises(BuildFailedError):
        bench.build(asked_by="push")
    assert run(bench) == []
    assert find_build(bench.hooks, REPO, sha) is not None


def test_a_status_that_was_lost_is_set_again_once(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    bench.gitbucket.set_status.side_effect = UnavailableError("the git server did not answer")
    bench.build()
    bench.gitbucket.set_status.reset_mock(side_effect=True)
    bench.commit({"README.md": "hi"})
    assert run(bench) == [(sha, "said")]
    assert bench.statuses == [("success", "built: train")]
    assert run(bench) == []
    assert told(bench) == [sha]

    bad = bench.commit({"main.py": "x ="})
    with pytest.raises(BuildFailedError):
        bench.build()
    bench.gitbucket.set_status.reset_mock()
    assert run(bench) == [(bad, "said")]
    ((state, description),) = bench.statuses
    assert state == "failure"
    assert "main.py:1: invalid syntax" in description
    assert run(bench) == []


def test_a_status_that_a_killed_build_left_pending_is_mended(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    bench.build()
    bench.gitbucket.set_status(REPO, sha, state="pending", context="airloom/build", description="build started")
    started = PushBuildStart(
        repo=REPO, commit=sha, asked_by="person", pusher="", message="One", id="a", at=datetime.now(UTC)
    )
    write_entry(bench.hooks, started)
    assert run(bench) == []  # it may still be under way
    bench.store.remove("airloom", started.key)
    assert run(bench) == [(sha, "said")]
    assert bench.statuses[-1] == ("success", "built: train")


def test_a_status_that_cannot_be_set_is_tried_again(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    bench.build()
    bench.gitbucket.set_status.reset_mock()
    bench.gitbucket.set_status.side_effect = UnavailableError("the git server did not answer")
    assert run(bench) == []
    bench.gitbucket.set_status.reset_mock(side_effect=True)
    assert run(bench) == [(sha, "said")]
