"""One machine at a time builds a commit; machines are installations with homes of their own and one store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from airloom.contract.build import BuildRecord
from airloom.errors import BuildFailedError, ConflictError, NotFoundError
from airloom.flows.build import build, find_failure
from airloom.flows.lease import PREFIX, Holder, LeaseLostError, lease, remove_old
from airloom.flows.pushes import list_pushes
from airloom.hooks.connect import Hooks
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import StageRepoFixture
from tests.fixtures.pushes import MAIN, STAGES, AirflowDouble, status, wait_for

BUCKET = "airloom"
NOW = datetime(2026, 11, 1, 12, 30, tzinfo=UTC)


def never(seconds: float) -> None:
    raise AssertionError("nobody is to be waited for")


@pytest.fixture
def key() -> str:
    return f"tests/{uuid.uuid4().hex}.json"


def other(**changes: Any) -> Holder:
    """Somebody on another machine."""
    values = {"id": "other", "host": "far", "place": "elsewhere", "pid": 7, "started": "then", "since": NOW}
    return Holder.model_validate({**values, "seconds": 3600, **changes})


def put(store: ObjectStore, key: str, holder: Holder) -> None:
    store.put_json(BUCKET, f"{PREFIX}{key}", holder.model_dump(mode="json"))


def read(store: ObjectStore, key: str) -> Holder:
    return Holder.model_validate(store.get_json(BUCKET, f"{PREFIX}{key}"))


def test_a_write_that_expects_what_is_no_more_is_refused(s3_store: ObjectStore, key: str) -> None:
    first = s3_store.put_bytes(BUCKET, key, b"1").etag
    second = s3_store.put_bytes(BUCKET, key, b"2", if_match=first).etag
    with pytest.raises(ConflictError, match="written by another"):
        s3_store.put_bytes(BUCKET, key, b"3", if_match=first)
    answer = s3_store.get(BUCKET, key)
    assert (answer.body, answer.etag) == (b"2", second)
    assert 0 <= answer.age_seconds < 60
    with pytest.raises((ConflictError, NotFoundError)):
        s3_store.put_bytes(BUCKET, f"{key}.none", b"3", if_match=first)
    assert not s3_store.exists(BUCKET, f"{key}.none")


@pytest.mark.parametrize("earlier", [None, other(seconds=0), other(released=True)])
def test_of_many_takers_one_at_a_time_holds_it(s3_store: ObjectStore, key: str, earlier: Holder | None) -> None:
    if earlier:
        put(s3_store, key, earlier)
    inside, most, passed = 0, 0, threading.Event()

    def hold(_: int) -> None:
        nonlocal inside, most
        with lease(s3_store, BUCKET, key, wait=lambda seconds: passed.wait(0.01)):
            inside += 1
            most = max(most, inside)
            read(s3_store, key)  # long enough for the others to look
            inside -= 1

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(hold, range(6)))
    assert (inside, most) == (0, 1)
    assert read(s3_store, key).released


def test_a_holder_is_waited_for_until_its_time_is_over(s3_store: ObjectStore, key: str) -> None:
    put(s3_store, key, other())
    said: list[str] = []
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            put(s3_store, key, other(seconds=0))

    with lease(s3_store, BUCKET, key, on_wait=lambda holder: said.append(str(holder)), wait=wait):
        assert read(s3_store, key).pid == os.getpid()
    assert said == ["far (process 7) since 2026-11-01 12:30:00 UTC"]
    assert len(looks) == 3


def test_what_is_no_lease_is_nobodys(s3_store: ObjectStore, key: str) -> None:
    s3_store.put_bytes(BUCKET, f"{PREFIX}{key}", b"{")
    with lease(s3_store, BUCKET, key, wait=never):
        assert read(s3_store, key).pid == os.getpid()


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(
    s3_store: ObjectStore, session_settings: Settings, key: str
) -> None:
    program = (
        "import os, signal, sys\nfrom airloom.flows.lease import lease\n"
        "from airloom.hooks.object_store import ObjectStore\n"
        "store = ObjectStore(endpoint_url=sys.argv[1], access_key='airloom', secret_key=sys.stdin.read())\n"
        f"with lease(store, {BUCKET!r}, sys.argv[2], seconds=3600):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    secret = session_settings.secret("s3_airloom_secret")
    command = [sys.executable, "-c", program, session_settings.s3_endpoint_url, key]
    done = subprocess.run(command, input=secret, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = read(s3_store, key)
    assert not left.released
    with lease(s3_store, BUCKET, key, wait=never):
        assert read(s3_store, key).id != left.id


def test_a_lease_is_renewed_while_it_is_held(s3_store: ObjectStore, key: str) -> None:
    with lease(s3_store, BUCKET, key, seconds=0.4, wait=never) as held:
        wait_for(lambda: read(s3_store, key).renewals >= 3, "renewals")
        held.check()
    assert read(s3_store, key).released


def test_a_lease_that_was_lost_is_not_written_again(s3_store: ObjectStore, key: str) -> None:
    with lease(s3_store, BUCKET, key, wait=never) as held:
        held.check()
        put(s3_store, key, other())
        for _ in range(2):
            with pytest.raises(LeaseLostError):
                held.check()
    assert read(s3_store, key) == other()


def test_an_own_write_whose_answer_was_lost_loses_nothing(s3_store: ObjectStore, key: str) -> None:
    with lease(s3_store, BUCKET, key, wait=never) as held:
        mine = read(s3_store, key)
        put(s3_store, key, mine.model_copy(update={"renewals": 77}))
        held.check()
        assert read(s3_store, key).id == mine.id
    assert read(s3_store, key).released


def test_old_leases_are_removed_and_those_in_use_are_not(s3_store: ObjectStore, key: str) -> None:
    ended, left, held = (f"{name}/{key}" for name in ("ended", "left", "held"))
    put(s3_store, ended, other(released=True))
    put(s3_store, left, other(seconds=0))
    put(s3_store, held, other())
    s3_store.put_bytes(BUCKET, f"{PREFIX}{key}", b"{")

    def there() -> set[str]:
        return {name for name in (ended, left, held, key) if s3_store.exists(BUCKET, f"{PREFIX}{name}")}

    assert remove_old(s3_store, BUCKET, age_seconds=3600) == 0
    assert remove_old(s3_store, BUCKET, age_seconds=0, dry_run=True) >= 3
    assert there() == {ended, left, held, key}
    assert remove_old(s3_store, BUCKET, age_seconds=0) >= 3
    assert there() == {held}
    with lease(s3_store, BUCKET, ended, wait=never):
        remove_old(s3_store, BUCKET, age_seconds=0)
        assert read(s3_store, ended).pid == os.getpid()


def test_who_takes_an_old_lease_before_its_removal_keeps_it(
    s3_store: ObjectStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_store, key, other(released=True))
    look = s3_store.get

    def look_and_be_slow(bucket: str, name: str) -> Any:
        answer = look(bucket, name)
        if name.endswith(key):
            put(s3_store, key, other(id="taker"))
        return answer

    monkeypatch.setattr(s3_store, "get", look_and_be_slow)
    remove_old(s3_store, BUCKET, age_seconds=0)
    assert read(s3_store, key).id == "taker"


def test_who_wants_a_lease_during_its_removal_waits(
    s3_store: ObjectStore, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a store which heeds no condition removes nobody's lease but the remover's."""

    class WaitedError(Exception):
        pass

    def waited(seconds: float) -> None:
        raise WaitedError

    put(s3_store, key, other(released=True))
    removed, remove = [], s3_store.remove

    def remove_and_be_asked(bucket: str, name: str, *, if_match: str | None = None) -> None:
        if name.endswith(key):
            with pytest.raises(WaitedError), lease(s3_store, BUCKET, key, wait=waited):
                pass
            removed.append(name)
        remove(bucket, name)

    monkeypatch.setattr(s3_store, "remove", remove_and_be_asked)
    remove_old(s3_store, BUCKET, age_seconds=0)
    assert removed == [f"{PREFIX}{key}"]
    with lease(s3_store, BUCKET, key, wait=never):
        pass


def test_a_removal_that_comes_too_late_is_refused(s3_store: ObjectStore, key: str) -> None:
    first = s3_store.put_bytes(BUCKET, key, b"1").etag
    second = s3_store.put_bytes(BUCKET, key, b"2").etag
    with pytest.raises(ConflictError):
        s3_store.remove(BUCKET, key, if_match=first)
    assert s3_store.get_bytes(BUCKET, key) == b"2"
    s3_store.remove(BUCKET, key, if_match=second)
    assert not s3_store.exists(BUCKET, key)


# Builds


class Machine:
    """An installation with a home of its own, and what its build said."""

    def __init__(self, repo: StageRepoFixture, home: Path) -> None:
        ports = {name: getattr(repo.settings, name) for name in ("s3_port", "git_port", "airflow_port")}
        self.hooks = Hooks(make_settings(home, **ports))
        self.repo = repo
        self.lines: list[str] = []

    def build(self, sha: str) -> BuildRecord:
        return build(self.hooks, self.repo.name, sha, self.lines.append, asked_by="push")

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.lines)


class Gate:
    """Code of a stage whose first check waits."""

    def __init__(self, folder: Path) -> None:
        self.met, self.opened = folder / "met", folder / "opened"
        self.code = (
            "import pathlib, time\n"
            f"met, opened = pathlib.Path({str(self.met)!r}), pathlib.Path({str(self.opened)!r})\n"
            "if not met.exists():\n    met.touch()\n    while not opened.exists():\n        time.sleep(0.02)\n"
        )


@pytest.fixture
def machines(
    stage_repo: StageRepoFixture, s3_store: ObjectStore, airflow_double: AirflowDouble, tmp_path: Path
) -> tuple[Machine, Machine]:
    return Machine(stage_repo, tmp_path / "one"), Machine(stage_repo, tmp_path / "two")


def begin(machine: Machine, threads: ThreadPoolExecutor, gate: Gate, rest: str) -> tuple[str, Future[BuildRecord]]:
    """Push a commit whose check waits at the gate, and have it built; returns when it waits there."""
    sha = machine.repo.commit_files("Slow", {"stages.yaml": STAGES, "main.py": gate.code + rest})
    machine.repo.push()
    building = threads.submit(machine.build, sha)
    wait_for(lambda: gate.met.exists() or building.done(), "the first build's check")
    assert not building.done(), building.exception()
    return sha, building


def test_two_machines_build_a_commit_once(
    machines: tuple[Machine, Machine], airflow_double: AirflowDouble, tmp_path: Path
) -> None:
    one, two = machines
    gate = Gate(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        sha, first = begin(one, threads, gate, MAIN)
        second = threads.submit(two.build, sha)
        wait_for(two.says(f"is being built by {os.uname().nodename} (process {os.getpid()}) since "), "waiting")
        gate.opened.touch()
        assert (first.result(300).created, second.result(300).created) == (True, False)
    assert [extra["commit"] for extra in airflow_double.of(one.repo.name)] == [sha]
    (push,) = list_pushes(one.hooks, repo=one.repo.name).pushes
    assert (push.build, push.builds) == ("built", 2)
    assert status(one.repo, sha)[0] == "success"


def test_who_waits_on_one_machine_is_told_as_well(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    one, _ = machines
    gate = Gate(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        sha, first = begin(one, threads, gate, MAIN)
        second = threads.submit(one.build, sha)
        wait_for(one.says("is being built on this machine: waiting"), "waiting")
        gate.opened.touch()
        assert (first.result(300).created, second.result(300).created) == (True, False)


def test_who_waited_for_a_build_that_failed_does_not_build_again(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    one, two = machines
    runs = tmp_path / "runs"
    gate = Gate(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        sha, first = begin(one, threads, gate, f"open({str(runs)!r}, 'a').write('x')\nraise SystemExit(3)\n")
        second = threads.submit(two.build, sha)
        wait_for(two.says("is being built by"), "waiting")
        gate.opened.touch()
        for ended in (first, second):
            with pytest.raises(BuildFailedError, match="ended with 3"):
                ended.result(300)
    assert runs.read_text() == "x"
    assert find_failure(two.hooks, two.repo.name, sha) is not None


def test_a_machine_that_slept_finds_what_another_has_made(
    machines: tuple[Machine, Machine], s3_store: ObjectStore, airflow_double: AirflowDouble, tmp_path: Path
) -> None:
    one, two = machines
    gate = Gate(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        sha, slept = begin(one, threads, gate, MAIN)
        path = f"builds/{one.repo.name}/{sha}.json"
        # As if it were on another machine, and nobody had heard of it for its time.
        put(s3_store, path, read(s3_store, path).model_copy(update={"place": "elsewhere", "id": "gone", "seconds": 0}))
        made = two.build(sha)
        gate.opened.touch()
        found = slept.result(300)
    assert (made.created, found.created) == (True, False)
    assert found.built_at == made.built_at
    assert one.says("another has begun")()
    assert [extra["commit"] for extra in airflow_double.of(one.repo.name)] == [sha]
    (push,) = list_pushes(one.hooks, repo=one.repo.name).pushes
    assert (push.build, push.airflow) == ("built", "told")
