"""What the reconciler makes up for, and what it leaves alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from airloom.contract.push import PushBuildStart
from airloom.errors import BuildFailedError, UnavailableError
from airloom.flows import announce
from airloom.flows import reconcile as flow
from airloom.flows.build import build, find_build
from airloom.flows.push_entry import write_entry
from airloom.flows.reconcile import reconcile
from airloom.settings import Settings
from tests.fixtures.build_bench import GOOD, MAIN, Bench

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

    monkeypatch.setattr("airloom.flows.build._make", refuse)
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
