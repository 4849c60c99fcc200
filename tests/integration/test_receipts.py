"""Receipts and replays of predictions that a real serving process made."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from airloom.contract.prediction_id import new_unique
from airloom.errors import NotFoundError, UnavailableError
from airloom.flows.receipts import find, journal_root, receipt
from airloom.flows.replay import replay
from airloom.hooks.connect import Hooks
from airloom.settings import Settings
from tests.fixtures.serving import process, tiny


@pytest.fixture
def hooks(settings: Settings) -> Hooks:
    return Hooks(settings)


def serving_of(settings: Settings, tmp_path: Path, bundle: Path) -> Any:
    return process.ServingProcess(
        tmp_path / "serving",
        bundle,
        database=settings.database,
        journal_dir=str(journal_root(settings) / "tiny"),
        releases_root=str(settings.releases_dir),
    )


@pytest.fixture
def served(settings: Settings, tmp_path: Path) -> Iterator[Any]:
    with serving_of(settings, tmp_path, tiny.make_release(settings.releases_dir)) as serving:
        yield serving


def ask(serving: Any, *values: int) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.post(f"{serving.url}/predict", content=tiny.picture(*values), timeout=60).json()
    return answer


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def until_logged(hooks: Hooks, number: int) -> None:
    until(lambda: hooks.predictions.count("tiny") >= number)


def test_a_receipt_is_there_as_soon_as_the_answer_is(hooks: Hooks, served: Any) -> None:
    answer = ask(served, 1, 2, 3, 4)
    found = receipt(hooks, answer["id"])  # still in the journal, or already in the log
    assert found.output == {"label": answer["label"], "scores": answer["scores"]}
    assert (found.release.version, found.release.data_tag.split("/")[0]) == ("1.0.0", "tiny")
    until_logged(hooks, 1)
    assert find(hooks, answer["id"]).source == "log"
    assert receipt(hooks, answer["id"]) == found


def test_recent_count_and_input(hooks: Hooks, served: Any) -> None:
    ids = [ask(served, n, 0, 0, 0)["id"] for n in range(5)]
    until_logged(hooks, 5)
    assert [one.id for one in hooks.predictions.recent("tiny", 3)] == ids[:1:-1]
    assert hooks.predictions.recent("other", 3) == []
    first = hooks.predictions.get(ids[0])
    assert first is not None
    stored = hooks.predictions.input(first.input_sha256)
    assert stored is not None
    assert (stored.content, stored.media_type) == (tiny.picture(0, 0, 0, 0), "image/png")


def test_receipts_of_a_killed_process_come_from_its_journal(hooks: Hooks, settings: Settings, tmp_path: Path) -> None:
    """The database never sees them: it is down all the time."""
    bundle = tiny.make_release(settings.releases_dir)
    ledger = Path(settings.database.removeprefix("sqlite:///")).parent
    ledger.parent.mkdir(parents=True)
    ledger.write_text("a file where the folder should be")
    with serving_of(settings, tmp_path, bundle) as serving:
        answer = ask(serving, 5, 6, 7, 8)
        serving.end(signal.SIGKILL)
    assert receipt(hooks, answer["id"]).output["scores"] == answer["scores"]
    assert replay(hooks, answer["id"]).same
    with pytest.raises(UnavailableError, match="prediction log"):
        receipt(hooks, f"tiny-1.0.0-{new_unique()}")


def test_a_replay_gives_the_same_and_says_what_differs(hooks: Hooks, settings: Settings, served: Any) -> None:
    answer = ask(served, 1, 2, 3, 4)
    done = replay(hooks, answer["id"])
    assert (done.same, done.differences, done.repeated) == (True, [], done.recorded)
    until_logged(hooks, 1)
    import sqlite3

    with sqlite3.connect(settings.database.removeprefix("sqlite:///")) as connection:
        changed = json.dumps({"label": "a", "scores": [5.0, 8.5, 13.0], "more": 1})
        connection.execute("update predictions set output = ?", (changed,))
    connection.close()
    done = replay(hooks, answer["id"])
    assert not done.same
    assert done.differences == [
        "label: recorded 'a', repeated 'c'",
        "scores[1]: recorded 8.5, repeated 8.0, off by 0.5",
        "more: only recorded",
    ]


def test_batched_predictions_replay_the_same(hooks: Hooks, settings: Settings, served: Any) -> None:
    bundle = settings.releases_dir / "tiny" / "1.0.0"
    with ThreadPoolExecutor(9) as clients:
        slow = clients.submit(ask, served, tiny.SLEEPS, 0, 0, 0)
        until((bundle / tiny.ASLEEP).exists)
        jobs = [clients.submit(ask, served, n, n, n, n) for n in range(8)]
        until(lambda: "airloom_serving_queue 8.0" in httpx.get(f"{served.url}/metrics").text)
        (bundle / tiny.AWAKE).touch()
    ids = {job.result()["id"] for job in jobs}
    until_logged(hooks, 9)
    recorded = {one.id: one.batch_size for one in hooks.predictions.recent("tiny", 9)}
    assert recorded == {slow.result()["id"]: 1, **dict.fromkeys(ids, 8)}
    assert all(replay(hooks, prediction).same for prediction in list(ids)[:2])


@pytest.mark.parametrize(
    "text", ["", "bla", "tiny-1.0.0", "tiny-1.0-" + "0" * 26, "x" * 5000, "tiny-1.0.0-" + "z" * 26]
)
def test_what_is_no_id_is_told_how_one_looks(hooks: Hooks, text: str) -> None:
    with pytest.raises(NotFoundError, match="is not a prediction id") as caught:
        receipt(hooks, text)
    assert "digits-1.0.3-" in (caught.value.hint or "")
    assert len(str(caught.value)) < 500


def test_an_unknown_id_is_told_where_to_look(hooks: Hooks, settings: Settings) -> None:
    with pytest.raises(NotFoundError) as caught:
        receipt(hooks, f"other-9.9.9-{new_unique()}")
    assert "another installation" in (caught.value.hint or "")
    tiny.make_release(settings.releases_dir)
    with pytest.raises(NotFoundError) as caught:
        receipt(hooks, f"tiny-1.0.0-{new_unique()}")
    assert "airloom predictions tiny" in (caught.value.hint or "")


def test_the_commands(settings: Settings, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from airloom.cli.main import app
    from airloom.settings import get_settings

    for name in ("home", "project"):
        monkeypatch.setenv(f"AIRLOOM_{name.upper()}", str(getattr(settings, name)))
    get_settings.cache_clear()
    runner = CliRunner()
    try:
        answer = ask(served, 9, 9, 9, 9)
        until_logged(Hooks(settings), 1)
        shown = runner.invoke(app, ["receipt", answer["id"], "--json"])
        assert json.loads(shown.stdout)["release"]["version"] == "1.0.0"
        assert "tiny/CV_" in runner.invoke(app, ["receipt", answer["id"]]).stdout
        assert answer["id"] in json.dumps(json.loads(runner.invoke(app, ["predictions", "tiny", "--json"]).stdout))
        assert runner.invoke(app, ["replay", answer["id"]]).exit_code == 0
        (settings.releases_dir / "tiny" / "1.0.0" / "model" / "weights" / "weights.json").write_text("{}")
        assert runner.invoke(app, ["replay", answer["id"]]).exit_code != 0
        assert runner.invoke(app, ["receipt", "bla"]).exit_code == NotFoundError.exit_code
    finally:
        get_settings.cache_clear()


def test_a_receipt_loads_nothing_heavy() -> None:
    """It has to answer within a second, so what it imports is counted."""
    import subprocess
    import sys

    heavy = ("torch", "mlflow", "airflow", "minio", "dvc", "git", "pandas", "numpy")
    imports = "import sys, sqlalchemy, airloom.hooks.connect, airloom.flows.receipts, airloom.cli.receipts"
    code = f"{imports}\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
