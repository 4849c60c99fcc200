"""The ledger of pushes: what is written, and how it is joined with runs and releases."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from typer.testing import CliRunner

from airloom.contract.push import PushDelivery
from airloom.embedded.delivery_log import DeliveryLog
from airloom.embedded.forge.state import State
from airloom.errors import BuildFailedError, ConflictError, NotFoundError, UnavailableError
from airloom.flows.push_entry import write_entry
from airloom.flows.pushes import list_pushes, replay
from airloom.hooks.ledger import Ledger
from airloom.settings import Settings
from tests.fixtures.build_bench import GOOD, MAIN, Bench

REPO = "ds_mlmodeling"
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Bench:
    bench = Bench(settings, tmp_path)
    bench.hooks.ledger = create_autospec(Ledger, instance=True)
    bench.hooks.ledger.run.return_value = None
    bench.airflow.asset_events.return_value = []
    return bench


def delivery(commit: str, name: str = "d1", at: datetime = NOW, **changes: Any) -> PushDelivery:
    values = {"ref": "refs/heads/main", "pusher": "ada", "message": "One", "outcome": "build", "reason": "changed"}
    return PushDelivery(repo=REPO, commit=commit, id=name, at=at, **{**values, **changes})


def event(commit: str, *runs: tuple[str, str, int | None]) -> dict[str, Any]:
    """An event with the runs that have taken it: id, state and how many seconds they took."""
    created = [
        {
            "dag_id": "digits",
            "run_id": run_id,
            "state": state,
            "start_date": "2026-11-21T12:00:10Z",
            "end_date": None if seconds is None else (NOW + timedelta(seconds=10 + seconds)).isoformat(),
        }
        for run_id, state, seconds in runs
    ]
    return {"extra": {"commit": commit}, "created_dagruns": created}


def test_a_push_is_shown_from_delivery_to_release(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    write_entry(bench.hooks, delivery(sha, at=datetime.now(UTC) - timedelta(seconds=2)))
    bench.build(pusher="ada", asked_by="push")
    bench.build(asked_by="push")  # a doubled event
    bench.airflow.asset_events.return_value = [event(sha, ("r1", "success", 30))]
    bench.hooks.ledger.run.return_value = SimpleNamespace(verdict="promoted")
    bench.airflow.xcom.return_value = {"version": "1.0.3"}
    (push,) = list_pushes(bench.hooks).pushes
    assert (push.repo, push.commit, push.message, push.pusher) == (REPO, sha, "One", "ada")
    assert (push.deliveries, push.asked_by, push.build, push.builds) == (["d1"], "push", "built", 2)
    assert push.airflow == "told"
    assert push.waited_seconds is not None
    assert push.waited_seconds >= 2
    (run,) = push.runs
    assert (run.pipeline, run.run_id, run.state, run.verdict, run.release) == (
        "digits",
        "r1",
        "success",
        "promoted",
        "1.0.3",
    )


def test_a_run_belongs_to_the_newest_of_the_events_that_it_has_taken(bench: Bench) -> None:
    write_entry(bench.hooks, delivery("a" * 40))
    write_entry(bench.hooks, delivery("b" * 40, at=NOW + timedelta(seconds=1)))
    bench.airflow.asset_events.return_value = [event("b" * 40, ("r1", "running", None)), event("a" * 40, ("r1", "", 1))]
    newer, older = list_pushes(bench.hooks).pushes
    assert (newer.commit, [run.run_id for run in newer.runs]) == ("b" * 40, ["r1"])
    assert newer.total_seconds is None
    assert (older.commit, older.runs, older.build) == ("a" * 40, [], "none")


def test_without_airflow_the_rest_is_shown(bench: Bench) -> None:
    write_entry(bench.hooks, delivery("a" * 40))
    bench.airflow.asset_events.side_effect = UnavailableError("Airflow did not answer")
    found = list_pushes(bench.hooks)
    assert [push.deliveries for push in found.pushes] == [["d1"]]
    assert found.problems == ["runs are not shown: Airflow did not answer"]
    bench.airflow.asset_events.side_effect = NotFoundError("no asset")
    assert list_pushes(bench.hooks).problems == []


def test_the_newest_are_listed_and_other_repos_left_out(bench: Bench) -> None:
    for number in range(5):
        write_entry(bench.hooks, delivery(f"{number:040x}", f"d{number}", NOW + timedelta(seconds=number)))
    other = delivery("f" * 40, "other", NOW + timedelta(hours=1)).model_copy(update={"repo": "other"})
    write_entry(bench.hooks, other)
    bench.store.put_json("airloom", "pushes/x", {})  # neither is what somebody else has left
    bench.store.put_json("airloom", f"pushes/{REPO}/{'0' * 40}/20990101T000000000000Z-delivery-x.json", {"new": 1})
    assert [push.deliveries for push in list_pushes(bench.hooks, repo=REPO, limit=2).pushes] == [["d4"], ["d3"]]
    assert len(list_pushes(bench.hooks).pushes) == 6


def test_a_record_is_written_once(bench: Bench) -> None:
    for pusher in ("ada", "eve"):
        write_entry(bench.hooks, delivery("a" * 40, pusher=pusher))
    (push,) = list_pushes(bench.hooks).pushes
    assert (push.deliveries, push.pusher) == (["d1"], "ada")


def test_an_id_cannot_lead_elsewhere() -> None:
    key = delivery("a" * 40, "../../x y").key
    assert key.startswith(f"pushes/{REPO}/{'a' * 40}/20261121T120000000000Z-delivery-")
    assert ".." not in key


def test_replay_does_again_what_failed_and_nothing_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)
    write_entry(bench.hooks, delivery(sha, "11112222-3333"))
    record = replay(bench.hooks, "11112222-3333")
    assert (record.commit, record.pusher, record.created, record.airflow) == (sha, "ada", True, "told")
    assert not replay(bench.hooks, f"{REPO}@{sha}").created
    assert not replay(bench.hooks, "1111").created
    assert bench.airflow.create_asset_event.call_count == 1
    bad = bench.commit({"main.py": f"{MAIN}x ="})
    for _ in range(2):
        with pytest.raises(BuildFailedError):
            replay(bench.hooks, f"{REPO}@{bad}")
    assert [entry["outcome"] for entry in bench.store.entries("end")][-2:] == ["failed", "failed"]


def test_what_cannot_be_replayed(bench: Bench) -> None:
    write_entry(bench.hooks, delivery("a" * 40, "abcd-1"))
    write_entry(bench.hooks, delivery("b" * 40, "abcd-2"))
    with pytest.raises(ConflictError, match="2 deliveries"):
        replay(bench.hooks, "abcd")
    for target in ("a", "nothing", "@", f"{REPO}@", "@main"):
        with pytest.raises(NotFoundError):
            replay(bench.hooks, target)


def test_deliveries_wait_for_the_store(tmp_path: Path) -> None:
    """Also over a restart, in their order, and without holding up who notes them."""
    path = tmp_path / "forge.db"
    written: list[str] = []
    down = [True]

    def write(entry: PushDelivery) -> None:
        if down[0]:
            raise UnavailableError("the object store did not answer")
        written.append(entry.id)

    state = State(path)
    log = DeliveryLog(state, write)
    log.note(delivery("a" * 40, "first"))
    assert not log._empty()
    log.note(delivery("a" * 40, "second"))
    state.add_receipt("{}")  # of another version
    state.close()
    state = State(path)
    down[0] = False
    log = DeliveryLog(state, write)
    assert log._empty()
    assert written == ["first", "second"]
    assert state.receipts(10) == []


def test_receipts_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airloom.embedded.forge.state._RECEIPTS_KEPT", 3)
    state = State(tmp_path / "forge.db")
    for number in range(5):
        state.add_receipt(str(number))
    assert [row["value"] for row in state.receipts(10)] == ["2", "3", "4"]


def command(bench: Bench, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    from airloom.cli.main import app

    monkeypatch.setattr("airloom.hooks.connect.Hooks", lambda: bench.hooks)
    return CliRunner().invoke(app, arguments)


def test_a_receiver_of_all_pushes_builds_those_that_change_a_stage(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jenkins runs this command for every push to main, and nothing else."""
    sha = bench.commit(GOOD)
    done = command(bench, monkeypatch, "build", f"{REPO}@{sha}", "--once", "--delivery", "d-1", "--pusher", "ada")
    assert (done.exit_code, done.stdout) == (0, f"{REPO}@{sha}\n")
    docs = bench.commit({"README.md": "hi"})
    done = command(bench, monkeypatch, "build", f"{REPO}@{docs}", "--once", "--delivery", "d-2", "--pusher", "ada")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "nothing that a stage is made of has changed: not built" in done.stderr
    newer, older = list_pushes(bench.hooks).pushes
    assert (newer.commit, newer.deliveries, newer.builds) == (docs, ["d-2"], 0)
    assert (older.commit, older.deliveries, older.builds, older.pusher) == (sha, ["d-1"], 1, "ada")
    assert command(bench, monkeypatch, "build", f"{REPO}@{docs}").stdout == f"{REPO}@{docs}\n"  # a person's wish


def test_the_list_is_a_table_or_json(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No push is in the ledger" in command(bench, monkeypatch, "pushes").stdout
    bad = bench.commit({**GOOD, "main.py": "[x ="})
    write_entry(bench.hooks, delivery(bad, "11112222-3333", message="Break [it]"))
    with pytest.raises(BuildFailedError):
        bench.build(asked_by="push")
    shown = command(bench, monkeypatch, "pushes", "--repo", REPO).stdout
    for piece in (f"{REPO}@{bad[:8]}", "One", "ada", "11112222", "failed"):
        assert piece in shown
    (push,) = json.loads(command(bench, monkeypatch, "pushes", "--json").stdout)
    assert (push["commit"], push["build"], push["deliveries"]) == (bad, "failed", ["11112222-3333"])
    done = command(bench, monkeypatch, "pushes", "replay", "nothing")
    assert done.exit_code == NotFoundError.exit_code
    assert "no delivery 'nothing'" in done.stderr
