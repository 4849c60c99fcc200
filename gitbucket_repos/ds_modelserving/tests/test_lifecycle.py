"""Start, stop, kill and restart of the real process: what was answered is never lost."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from process import ServingProcess, free_port
from tiny import ASLEEP, AWAKE, CODE, SLEEPS, make_release, picture

from airloom.contract import ExitCode, StageResult

SLOW_LOAD = CODE.replace("def load(folder):\n", "def load(folder):\n    until_awake(folder.parent)\n")


def rows(serving: ServingProcess) -> set[str]:
    connection = sqlite3.connect(serving.folder / "log.db", timeout=10)
    try:
        return {row[0] for row in connection.execute("select id from predictions")}
    except sqlite3.OperationalError:
        return set()
    finally:
        connection.close()


def until_rows(serving: ServingProcess, ids: set[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ids <= rows(serving):
        assert time.monotonic() < deadline, f"{len(ids - rows(serving))} of {len(ids)} answers are not in the log"
        time.sleep(0.1)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def listens(serving: ServingProcess) -> bool:
    try:
        socket.create_connection(("127.0.0.1", serving.port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


class Clients:
    """Threads that ask until something ends, and remember the id of every answer that they got."""

    def __init__(self, url: str, number: int = 4) -> None:
        self.ids: set[str] = set()
        self._done = threading.Event()
        self._url = url
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            count = 0
            while not self._done.is_set():
                count += 1
                try:
                    answer = client.post(f"{self._url}/predict", content=picture(number, count % 250, 0, 0))
                except httpx.HTTPError:
                    return
                if answer.status_code == 200:
                    self.ids.add(answer.json()["id"])

    def wait_for(self, answers: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while len(self.ids) < answers:
            assert time.monotonic() < deadline, f"only {len(self.ids)} answers"
            time.sleep(0.01)

    def end(self) -> set[str]:
        self._done.set()
        for thread in self._threads:
            thread.join(60)
        return self.ids


def test_health_is_red_until_the_model_is_there(tmp_path: Path) -> None:
    bundle = make_release(tmp_path / "releases", code=SLOW_LOAD)
    serving = ServingProcess(tmp_path, bundle).start()
    try:
        error = serving.wait_for(503).json()["error"]
        assert (error["type"], error["message"]) == ("not_ready", "the model is being loaded")
        early = httpx.post(f"{serving.url}/predict", content=picture(1, 2, 3, 4))
        assert (early.status_code, early.headers["retry-after"]) == (503, "2")
        assert httpx.get(f"{serving.url}/info").status_code == 503
        assert "airloom_serving_ready 0.0" in httpx.get(f"{serving.url}/metrics").text
        (bundle / AWAKE).touch()
        serving.wait_for(200)
        assert httpx.post(f"{serving.url}/predict", content=picture(1, 2, 3, 4)).status_code == 200
    finally:
        assert serving.end() == 0


def test_a_model_that_cannot_be_loaded_keeps_health_red_and_says_why_in_the_log(tmp_path: Path) -> None:
    bundle = make_release(tmp_path / "releases")
    (bundle / "model" / "weights" / "weights.json").write_text("{}")
    serving = ServingProcess(tmp_path, bundle).start()
    try:
        serving.wait_for(503)
        deadline = time.monotonic() + 60
        while "digest" not in serving.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        message = httpx.get(f"{serving.url}/health").json()["error"]["message"]
        assert message == "the model could not be loaded; the service's log says why"
    finally:
        assert serving.end() == 0


def test_answers_outlive_a_kill(tmp_path: Path) -> None:
    with ServingProcess(tmp_path, make_release(tmp_path / "releases")) as serving:
        clients = Clients(serving.url)
        clients.wait_for(200)
        serving.end(signal.SIGKILL)
        ids = clients.end()
        assert len(ids) >= 200
        serving.start().wait_for()
        until_rows(serving, ids)
        assert httpx.post(f"{serving.url}/predict", content=picture(1, 2, 3, 4)).status_code == 200


def test_terminated_it_finishes_what_is_in_flight_and_drains(tmp_path: Path) -> None:
    bundle = make_release(tmp_path / "releases")
    serving = ServingProcess(tmp_path, bundle).start()
    serving.wait_for()
    clients = Clients(serving.url)
    clients.wait_for(50)
    slow: list[httpx.Response] = []
    asked = threading.Thread(
        target=lambda: slow.append(httpx.post(f"{serving.url}/predict", content=picture(SLEEPS, 0, 0, 0), timeout=60))
    )
    asked.start()
    until((bundle / ASLEEP).exists)
    assert serving.process is not None
    serving.process.terminate()
    until(lambda: not listens(serving))
    with pytest.raises(subprocess.TimeoutExpired):  # the slow request is still in flight
        serving.process.wait(0.5)
    (bundle / AWAKE).touch()
    assert serving.end() == 0
    asked.join(60)
    ids = clients.end() | {slow[0].json()["id"]}
    assert slow[0].status_code == 200
    assert ids <= rows(serving)
    assert [path for path in serving.journal_dir.iterdir() if path.is_dir()] == []
    assert StageResult.read(serving.result).status == "ok"


def test_answers_go_on_while_the_database_is_down_and_arrive_when_it_is_back(tmp_path: Path) -> None:
    blocked = tmp_path / "db"
    blocked.write_text("a file where the folder should be")
    bundle = make_release(tmp_path / "releases")
    with ServingProcess(tmp_path, bundle, database=f"sqlite:///{blocked / 'log.db'}") as serving:
        ids = {httpx.post(f"{serving.url}/predict", content=picture(n, 0, 0, 0)).json()["id"] for n in range(20)}
        deadline = time.monotonic() + 60
        while httpx.get(f"{serving.url}/health").json()["prediction_log"] != "down":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        blocked.unlink()
        while httpx.get(f"{serving.url}/health").json()["journal_backlog_bytes"]:
            assert time.monotonic() < deadline + 60
            time.sleep(0.1)
        serving.folder = blocked
        assert ids <= rows(serving)


def test_a_taken_port_and_a_wrong_parameter_end_it_with_the_reason(tmp_path: Path) -> None:
    bundle = make_release(tmp_path / "releases")
    with ServingProcess(tmp_path / "a", bundle) as serving:
        second = ServingProcess(tmp_path / "b", bundle)
        second.port = serving.port
        second.start()
        assert second.process is not None
        assert second.process.wait(60) == ExitCode.BAD_DATA
        assert str(serving.port) in json.loads(second.result.read_text())["error"]
    third = ServingProcess(tmp_path / "c", bundle, max_upload_bytes=-1)
    third.port = free_port()
    third.start()
    assert third.process is not None
    assert third.process.wait(60) == ExitCode.FAILED
    error = json.loads(third.result.read_text())["error"]
    assert "max_upload_bytes" in error
