"""An engine of its own that is restarted or killed under a running stage, with and without its containers."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from airloom.errors import UnavailableError
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import ExitReason
from tests.conftest import make_settings
from tests.fixtures.own_engine import _IN_OWN_NETWORK, Engine, job_of, own_engine
from tests.fixtures.stage_repo import wait_until

PR_SET_CHILD_SUBREAPER = 36
LINES = 30
LIVE = "--live-restore"


@contextmanager
def own_containerd(folder: Path) -> Iterator[Path]:
    """A containerd that is no engine's child, as systemd runs one; its socket."""
    sockets = Path(tempfile.mkdtemp(prefix="containerd-"))
    address, config, log = sockets / "containerd.sock", folder / "containerd.toml", folder / "containerd.log"
    config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    command = [*_IN_OWN_NETWORK, "containerd", "--config", str(config), "--address", str(address)]
    command += ["--root", str(folder / "containerd"), "--state", str(sockets / "state")]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 120
        while not address.exists():
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(120)
        shutil.rmtree(sockets, ignore_errors=True)


@contextmanager
def reaping() -> Iterator[None]:
    """Take the children of dead children: where PID 1 does not, a killed dockerd does not start again ("containerd is
    still running"), since its containerd stays as a zombie."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def kill(engine: Engine) -> None:
    """SIGKILL to dockerd. A containerd that it started goes with it."""
    note = engine._sockets / "containerd" / "containerd.pid"
    containerd = int(note.read_text()) if note.exists() else None
    engine._process.kill()
    engine._process.wait(60)
    if containerd is not None:
        assert os.waitpid(containerd, 0)[1] == signal.SIGKILL


def shims(folder: Path) -> list[str]:
    """What watches a container on behalf of a containerd with its socket in a folder, and outlives it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "containerd-shim" in line and str(folder) in line]


def wait_for_no_shim(folder: Path) -> None:
    """A shim ends a moment after its container is gone."""
    wait_until(lambda: not shims(folder), f"the end of the shims of {folder}")


def outlives(
    engine: Engine, tmp_path: Path, image: str, end: Callable[[], None], *, endless: bool = False
) -> tuple[ExitReason, list[str]]:
    """Run a stage whose engine ends in between and is started again; how its first container ended, and all lines.

    Args:
        endless: whether that container does not come to an end of its own.
    """
    settings = make_settings(tmp_path / "home", docker_host=engine.host)
    job = job_of(settings, image, lines=LINES, hold=LINES // 2 if endless else None)
    runner = DockerRunner(settings, poll_seconds=0.05)
    first, lines = runner.start(job), []

    def on_log(line: str) -> None:
        lines.append(line)
        if line == "line 3":
            end()

    # Which the task's next try takes up.
    with pytest.raises(UnavailableError, match="the Docker engine does not answer") as caught:
        runner.wait(first, on_log, lambda: False)
    assert caught.value.retryable
    engine.start()

    later = DockerRunner(settings, poll_seconds=0.05)
    found = later.find(job.workspace)
    assert found is not None
    assert found.id == first.id
    ended = later.wait(found, lines.append, lambda: False)
    how = ended.reason
    if how is not ExitReason.EXITED:
        assert not (job.workspace / "result.json").exists()
        lines.clear()
        found = later.start(job_of(settings, image, lines=LINES))
        ended = later.wait(found, lines.append, lambda: False)
    assert (ended.reason, ended.exit_code) == (ExitReason.EXITED, 0), (ended, lines[-5:])
    assert (job.workspace / "result.json").exists()
    assert (job.workspace / "outputs" / "dataset" / "data.txt").read_text() == "1"
    later.mark_collected(found)
    assert engine.run("ps", "-aq").stdout == b""
    assert engine.run("volume", "ls", "-q").stdout == b""
    return how, lines


@pytest.fixture(params=["stops its containers", "keeps them running"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, stage_image: str) -> Iterator[Engine]:
    options = [LIVE] if request.param == "keeps them running" else []
    with own_engine(tmp_path, stage_image, *options) as found:
        yield found


def test_stage_outlives_its_engine_or_is_run_again(engine: Engine, tmp_path: Path, stage_image: str) -> None:
    how, lines = outlives(engine, tmp_path, stage_image, engine.stop)
    assert how in {ExitReason.EXITED, ExitReason.SIGNALLED, ExitReason.LOST}
    assert lines[-1] == f"line {LINES - 1}"


@pytest.mark.parametrize(
    ("options", "containerd_lives", "how"),
    [
        # It ends what it finds running when it comes back.
        ([], True, ExitReason.SIGNALLED),
        ([LIVE], True, ExitReason.EXITED),
        ([LIVE], False, ExitReason.EXITED),
    ],
    ids=["ends its containers", "keeps them", "keeps them without its containerd"],
)
def test_stage_outlives_a_killed_engine_or_is_run_again(
    options: list[str], containerd_lives: bool, how: ExitReason, tmp_path: Path, stage_image: str
) -> None:
    with reaping():
        if not containerd_lives:
            with own_engine(tmp_path, stage_image, *options) as engine:
                found, lines = outlives(engine, tmp_path, stage_image, lambda: kill(engine))
                wait_for_no_shim(engine._sockets)
        else:
            with (
                own_containerd(tmp_path) as address,
                own_engine(tmp_path, stage_image, "--containerd", str(address), *options) as engine,
            ):
                # Where the engine ends it, it must not have come to its own end before.
                endless = how is ExitReason.SIGNALLED
                found, lines = outlives(engine, tmp_path, stage_image, lambda: kill(engine), endless=endless)
                wait_for_no_shim(address.parent)
    assert found is how
    assert lines == [f"line {number}" for number in range(LINES)], "none is lost, none comes twice"
