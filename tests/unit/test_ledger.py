"""The ledger of tasks and runs, and the metrics made from it."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from airloom.airflow_pages.metrics import FIGURES_PER_STAGE, render_metrics
from airloom.errors import UnavailableError
from airloom.flows.figures import figures_of
from airloom.hooks.ledger import Ledger, TaskOutcome

START = datetime(2026, 11, 21, 4, 0, tzinfo=UTC)


def outcome(task: str = "train", **changes: object) -> TaskOutcome:
    values: dict[str, object] = {
        "pipeline": "digits",
        "run_id": "r1",
        "task": task,
        "attempt": 1,
        "state": "success",
        "started_at": START,
        "finished_at": START + timedelta(seconds=3),
        "seconds": 3.0,
    }
    return TaskOutcome(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'new' / 'ledger.db'}")


def samples(ledger: Ledger) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(render_metrics(ledger).decode()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def test_what_was_written_is_read_back(ledger: Ledger) -> None:
    written = outcome(cache="hit", reason="equal to r0", values={"accuracy": 0.97})
    ledger.record_task(written)
    assert ledger.tasks("digits", "r1") == [written]
    assert ledger.tasks("digits", "r2") == []


def test_writing_a_try_again_replaces_it(ledger: Ledger) -> None:
    ledger.record_task(outcome(state="running", finished_at=None, seconds=None))
    ledger.record_task(outcome())
    ledger.record_task(outcome(attempt=2))
    assert [(row.attempt, row.state) for row in ledger.tasks("digits", "r1")] == [(1, "success"), (2, "success")]


def test_that_a_run_is_running_is_not_said_of_one_that_has_ended_since(ledger: Ledger) -> None:
    """Both are written beside the scheduler, in whatever order."""
    end = START + timedelta(minutes=1)
    ledger.record_run("digits", "r1", state="success", started_at=START, finished_at=end)
    ledger.record_run("digits", "r1", state="running", started_at=START)
    assert ledger.run("digits", "r1").state == "success"  # type: ignore[union-attr]
    ledger.record_run("digits", "r1", state="running", started_at=end + timedelta(hours=1))  # it was cleared
    assert ledger.run("digits", "r1").state == "running"  # type: ignore[union-attr]


def test_a_run_keeps_what_a_later_write_does_not_know(ledger: Ledger) -> None:
    ledger.record_run("digits", "r1", verdict="rejected")
    ledger.record_run("digits", "r1", state="running", started_at=START)
    ledger.record_run("digits", "r1", state="success", finished_at=START + timedelta(minutes=1))
    run = ledger.run("digits", "r1")
    assert run is not None
    assert (run.state, run.verdict, run.started_at) == ("success", "rejected", START)
    assert ledger.run("digits", "r2") is None


def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"

    def write(number: int) -> None:
        Ledger(url).record_task(outcome(run_id=f"r{number % 8}", task=f"t{number}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert sum(count for *_, count in Ledger(url).task_counts()) == 64


def test_an_unusable_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="ledger"):
        Ledger(f"sqlite:///{tmp_path / 'file' / 'ledger.db'}").record_task(outcome())


def test_metrics_of_an_empty_ledger_are_valid(ledger: Ledger) -> None:
    assert samples(ledger) == {}


def test_metrics(ledger: Ledger) -> None:
    ledger.record_task(outcome(cache="miss", values={"loss": 0.5}))
    ledger.record_task(outcome(run_id="r2", seconds=40.0, cache="hit", finished_at=START + timedelta(hours=1)))
    ledger.record_task(outcome(run_id="r3", state="failed", seconds=0.2))
    ledger.record_task(outcome("version", values={"size_bytes": 1000.0, "files": 7.0}))
    ledger.record_task(outcome("gate", values={"accuracy": 0.97, "champion.accuracy": 0.96}))
    ledger.record_run("digits", "r1", state="success", verdict="promoted", finished_at=START)
    found = samples(ledger)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({"pipeline": "digits", **labels}.items())]

    done = {"task": "train", "state": "success"}
    assert value("airloom_task_duration_seconds_count", **done) == 2
    assert value("airloom_task_duration_seconds_sum", **done) == 43.0
    assert value("airloom_task_duration_seconds_bucket", le="5.0", **done) == 1
    assert value("airloom_task_duration_seconds_bucket", le="+Inf", **done) == 2
    assert value("airloom_task_attempts_total", task="train", state="failed") == 1
    assert value("airloom_stage_cache_total", stage="train", cache="hit") == 1
    assert value("airloom_gate_verdicts_total", verdict="promoted") == 1
    assert value("airloom_runs_total", state="success") == 1
    assert value("airloom_runs_total", state="failed") == 0
    assert value("airloom_last_success_timestamp_seconds") == START.timestamp()
    assert value("airloom_dataset_size_bytes") == 1000
    assert value("airloom_dataset_files") == 7
    assert value("airloom_gate_metric", model="candidate", metric="accuracy") == 0.97
    assert value("airloom_gate_metric", model="champion", metric="accuracy") == 0.96
    assert value("airloom_stage_metric", stage="train", metric="loss") == 0.5


def test_counters_never_fall(ledger: Ledger) -> None:
    """A try that still runs is in no counter, and one that has failed once moves a counter that was there before."""
    ledger.record_task(outcome(state="running", finished_at=None, seconds=None))
    ledger.record_run("digits", "r1", state="running", started_at=START)
    before = {key: value for key, value in samples(ledger).items() if key[0].endswith("_total")}
    assert set(before.values()) <= {0.0}
    ledger.record_task(outcome(state="failed"))
    ledger.record_run("digits", "r1", state="failed", finished_at=START + timedelta(minutes=1))
    after = samples(ledger)
    assert all(after[key] >= value for key, value in before.items())
    task = frozenset({"pipeline": "digits", "task": "train", "state": "success"}.items())
    assert after["airloom_task_attempts_total", task] == 0


def test_what_runs_and_what_ended_last(ledger: Ledger) -> None:
    ledger.record_run("digits", "r1", state="failed", started_at=START, finished_at=START + timedelta(minutes=1))
    for number in (2, 3):
        ledger.record_run("digits", f"r{number}", state="running", started_at=START + timedelta(hours=number))
    found = samples(ledger)
    digits = ("pipeline", "digits")
    assert found["airloom_running_runs", frozenset({digits})] == 2
    oldest = found["airloom_oldest_running_run_timestamp_seconds", frozenset({digits})]
    assert oldest == (START + timedelta(hours=2)).timestamp()
    assert found["airloom_last_failure_timestamp_seconds", frozenset({digits})] == START.timestamp() + 60
    assert ("airloom_last_success_timestamp_seconds", frozenset({digits})) not in found
    latest = frozenset({digits, ("run_id", "r3"), ("state", "running")})
    assert found["airloom_last_run_timestamp_seconds", latest] == (START + timedelta(hours=3)).timestamp()


def test_rejections_count_from_the_last_promotion(ledger: Ledger) -> None:
    verdicts = ("rejected", "promoted", "rejected", "rejected", None)
    for number, verdict in enumerate(verdicts):
        ledger.record_run("digits", f"r{number}", started_at=START + timedelta(hours=number), verdict=verdict)
    ledger.record_run("never", "r1", started_at=START, verdict="rejected")
    ledger.record_run("good", "r1", started_at=START, verdict="promoted")
    assert ledger.rejections_in_a_row() == {"digits": 2, "never": 1, "good": 0}


def test_a_stage_with_thousands_of_figures_makes_few_series(ledger: Ledger) -> None:
    ledger.record_task(outcome(values={f"recall.{number}": 0.5 for number in range(5000)}))
    assert len([name for name, _ in samples(ledger) if name == "airloom_stage_metric"]) == FIGURES_PER_STAGE


def test_addresses_stand_in_one_series(ledger: Ledger) -> None:
    text = render_metrics(ledger, {"airflow": "http://127.0.0.1:8080", "mlflow": "http://127.0.0.1:5000"}).decode()
    line = 'airloom_addresses_info{airflow="http://127.0.0.1:8080",mlflow="http://127.0.0.1:5000"} 1.0'
    assert line in text.splitlines()


@pytest.mark.parametrize("returned", [None, "text", 7, [], {}])
def test_figures_of_what_is_no_result(returned: object) -> None:
    for task in ("train", "version", "gate", "release", "verify", "deploy", "other"):
        figures = figures_of(task, returned)
        assert figures.verdict is None
        assert all(math.isfinite(value) for value in figures.values.values())


def test_figures_of_a_stage_and_of_the_gate() -> None:
    stage = {
        "cache": "hit",
        "reason": "equal to r0",
        "seconds": 0,
        "result": {"metrics": {"accuracy": 0.9}, "outputs": {"a": {"size_bytes": 5, "files": 2}}},
    }
    figures = figures_of("evaluate", stage)
    assert (figures.cache, figures.reason) == ("hit", "equal to r0")
    assert figures.values == {"accuracy": 0.9, "size_bytes": 5.0, "files": 2.0, "stage_seconds": 0.0}
    decision = {"verdict": "rejected", "reasons": ["a", "b"], "failed": ["b"], "metrics": {"accuracy": 0.8}}
    figures = figures_of("gate", {**decision, "champion_metrics": {"accuracy": 0.9}})
    assert (figures.verdict, figures.reason) == ("rejected", "b")
    assert figures.values == {"accuracy": 0.8, "champion.accuracy": 0.9}
