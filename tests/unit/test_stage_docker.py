"""The durable DockerOperator: what it refuses, what it takes for the same work, and what it makes of an end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airloom.embedded.provision import connections
from airloom.errors import ConfigError
from airloom.hooks import docker_container
from airloom.hooks.connect import Hooks
from airloom.hooks.docker_container import limits
from airloom.hooks.docker_engine import RegistryLogin, ensure_image
from airloom.hooks.docker_private import shell_variables
from airloom.hooks.docker_task import KEY_LABEL, Found, TaskId, decide, exit_of, find_task_containers
from airloom.hooks.log_tail import printable
from airloom.hooks.runner import ExitReason, JobExit
from airloom.operators.docker_end import why_failed
from airloom.operators.registry_login import login_from
from airloom.operators.stage_docker import StageDockerOperator
from airloom.settings import Settings


def operator(**changes: Any) -> StageDockerOperator:
    return StageDockerOperator(**{"task_id": "work", "image": "python:3.11", **changes})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"retrieve_output": True}, "unpickles.*result_path"),
        ({"xcom_all": True}, "whole log.*result_path"),
        ({"mount_tmp_dir": True}, "folder of the worker.*named volume"),
        ({"gpus": 1, "device_requests": [1]}, "use one of them"),
        ({"private_environment_in": "label"}, "'label'; it may be 'file' or 'config'"),
        ({"mem_limit": "a lot"}, "mem_limit is 'a lot'"),
        ({"mem_limit": 0}, "above 0"),
        ({"shm_size": "64MB!"}, "shm_size is '64MB!'"),
        ({"auto_remove": "sometimes"}, "auto_remove"),
    ],
)
def test_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        operator(**arguments)


@pytest.mark.parametrize(
    ("text", "found"), [("128m", 128 * 2**20), ("1.5GiB", 3 * 2**29), (4096, 4096), (5e6, 5000000)]
)
def test_sizes_as_docker_and_as_airloom_write_them(text: Any, found: int) -> None:
    assert operator(mem_limit=text).memory_bytes == found


def test_no_limits_that_nobody_asked_for() -> None:
    """`DockerOperator` counts cpus as shares, by default 1: as a limit that would slow down a task of several."""
    plain = operator()
    assert (plain.cpus, plain.memory_bytes, plain.shm_size) == (None, None, None)
    assert limits(None, memory_bytes=None, cpus=None, shm_bytes=None, gpu_key="gpus") == {"device_requests": None}


def test_processors_are_no_more_than_there_are_and_memory_is_no_more_with_swap() -> None:
    api = SimpleNamespace(info=lambda: {"NCPU": 2})
    found = limits(api, memory_bytes=100, cpus=8, shm_bytes=10, gpu_key="gpus")
    assert (found["nano_cpus"], found["mem_limit"], found["memswap_limit"], found["shm_size"]) == (2e9, 100, 100, 10)


SAME = [
    ({"private_environment": {"TOKEN": "a"}}, {"private_environment": {"TOKEN": "b"}}),
    ({"mem_limit": "1g"}, {"mem_limit": "2g"}),
    ({"command": "['a', 'b']"}, {"command": ["a", "b"]}),
]
OTHER = [
    ({"image": "a:1"}, {"image": "a:2"}),
    ({"command": "a"}, {"command": "b"}),
    ({"environment": {"A": "1"}}, {"environment": {"A": "2"}}),
    ({"private_environment": {"A": "1"}}, {"private_environment": {"B": "1"}}),
    ({"mounts": [{"target": "/d", "source": "v", "type": "volume"}]}, {"mounts": []}),
    ({"result_path": "/airloom/a"}, {}),
]


@pytest.mark.parametrize(
    ("one", "other", "same"), [*((a, b, True) for a, b in SAME), *((a, b, False) for a, b in OTHER)]
)
def test_which_work_is_the_same(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert (operator(**one)._key() == operator(**other)._key()) is same


def facts(status: str, *, key: str = "key", code: int = 0, oom: bool = False, error: str = "") -> dict[str, Any]:
    """What the engine says of a container."""
    times = {"StartedAt": "2026-11-21T10:00:00.5Z", "FinishedAt": "2026-11-21T10:00:07.5Z"}
    state = {"Status": status, "Running": status == "running", "ExitCode": code, "OOMKilled": oom, "Error": error}
    return {"State": {**state, **times}, "Config": {"Labels": {KEY_LABEL: key}}, "HostConfig": {"Memory": 100}}


@pytest.mark.parametrize(
    ("found", "becomes"),
    [
        (facts("running"), Found.ADOPT),
        (facts("running", key="other"), Found.REPLACE),
        (facts("created"), Found.REPLACE),
        (facts("exited"), Found.TAKE),
        (facts("exited", code=99), Found.TAKE),  # which means to skip
        (facts("exited", key="other"), Found.REPLACE),
        (facts("exited", code=1), Found.REPLACE),
        (facts("exited", code=137), Found.REPLACE),
        (facts("exited", oom=True), Found.REPLACE),  # although its exit code is 0
        (facts("created", error="no such file"), Found.REPLACE),
        (facts("removing"), Found.REPLACE),
        (facts("dead"), Found.REPLACE),
    ],
)
def test_what_becomes_of_an_earlier_container(found: dict[str, Any], becomes: Found) -> None:
    assert decide(found, "key", {0, 99}) is becomes


@pytest.mark.parametrize(
    ("found", "stopped", "reason"),
    [
        (facts("exited", code=3), False, ExitReason.EXITED),
        (facts("exited", code=137, oom=True), False, ExitReason.MEMORY_LIMIT),
        (facts("exited", oom=True), False, ExitReason.MEMORY_LIMIT),
        (facts("created", code=127, error="no such file"), False, ExitReason.NOT_STARTED),
        (facts("exited", code=143), True, ExitReason.STOPPED),
        (facts("exited"), True, ExitReason.STOPPED),
        (None, False, ExitReason.LOST),
        (None, True, ExitReason.STOPPED),
        (facts("removing"), False, ExitReason.LOST),
    ],
)
def test_how_it_ended(found: dict[str, Any] | None, stopped: bool, reason: ExitReason) -> None:
    ended = exit_of(found, stopped=stopped)
    assert ended.reason is reason
    assert ended.seconds == (7.0 if reason in {ExitReason.EXITED, ExitReason.MEMORY_LIMIT} else ended.seconds)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (JobExit(ExitReason.EXITED, exit_code=3, seconds=2.0), ("exit code 3 after 2 s", "see its log")),
        (
            JobExit(ExitReason.EXITED, exit_code=137),
            ("exit code 137", "signal 9", "docker stop or kill", "want of memory"),
        ),
        (JobExit(ExitReason.EXITED, exit_code=139), ("exit code 139", "signal 11", "or it crashed")),
        (JobExit(ExitReason.MEMORY_LIMIT), ("its limit of 64 MiB", "raise mem_limit")),
        (JobExit(ExitReason.LOST), ("was removed", "starts it anew")),
        (JobExit(ExitReason.NOT_STARTED, detail='exec: "x": not found'), ("could not be started", "command")),
        (JobExit(ExitReason.NOT_STARTED, detail="stat /bin/sh: no such file"), ("private_environment_in='config'",)),
        (JobExit(ExitReason.EXITED, exit_code=127), ("exit code 127", "cannot be started", "/bin/sh")),
    ],
)
def test_messages(ended: JobExit, said: tuple[str, ...]) -> None:
    message = why_failed(ended, memory_bytes=64 * 2**20, with_shell=True)
    assert [part for part in said if part not in message] == []


def test_labels_and_name_are_of_one_task_of_one_run() -> None:
    one = TaskId(dag="d", run="r", task="t")
    others = [
        TaskId(dag="d", run="r", task="t", map_index=0),
        TaskId(dag="d", run="r2", task="t"),
        TaskId(dag="d", run="r", task="t2"),
    ]
    names = {task.container_name("i") for task in (one, *others)} | {one.container_name("j")}
    assert len(names) == 5
    assert one.container_name("i") == TaskId(dag="d", run="r", task="t").container_name("i")
    assert one.labels("i") == {
        "airloom.instance": "i", "airloom.dag": "d", "airloom.run": "r", "airloom.task": "t", "airloom.map_index": "-1",
    }  # fmt: skip


def test_private_environment_as_a_shell_reads_it(tmp_path: Path) -> None:
    values = {"PLAIN": "a", "QUOTES": 'it\'s "$HOME" `id` \\', "LINES": "one\ntwo\n", "UMLAUT": "ä €", "NUMBER": 7}
    (tmp_path / "environment.sh").write_text(shell_variables(values))
    script = f"set -a; . {tmp_path}/environment.sh; env -0"
    said = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    found = dict(entry.split("=", 1) for entry in said.stdout.decode().split("\0") if entry)
    assert {name: found[name] for name in values} == {name: str(value) for name, value in values.items()}


@pytest.mark.parametrize("bad", [{"A B": "x"}, {"1A": "x"}, {"A;id": "x"}, {"A": "x\0y"}])
def test_private_environment_that_no_shell_reads(bad: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="private_environment"):
        shell_variables(bad)


def test_result_path_has_to_be_absolute() -> None:
    with pytest.raises(ConfigError, match=r"'result\.json'"):
        operator(result_path="result.json")._check_result_path()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[2K\x1b[1A 40% |████|", " 40% |████|"),
        ("\x1b[32mgreen\x1b[0m", "\x1b[32mgreen\x1b[0m"),
        ("\x1b]0;title\x07text", "text"),
        ("a\x08b\x00", "ab"),
    ],
)
def test_what_only_a_terminal_understands_is_left_out(line: str, shown: str) -> None:
    assert printable(line) == shown


class CutOff:
    """An engine behind a proxy that cuts the log's stream twice: once within a line, once as if it had ended."""

    whole = b"line 0\nline 1\nline 2\n"

    def __init__(self) -> None:
        self.streams = 0
        self.running = True

    def logs(self, container: str, **options: Any) -> Iterator[bytes]:
        self.streams += 1
        if self.streams == 1:
            yield self.whole[:10]
            raise ConnectionError("cut")
        if self.streams == 2:
            yield self.whole[:4]
            yield self.whole[4:15]
            return
        yield self.whole
        self.running = False

    def inspect_container(self, container: str) -> dict[str, Any]:
        return {"State": {"Running": self.running}}

    def close(self) -> None:
        pass


def test_a_log_whose_stream_is_cut_has_no_hole_and_no_line_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_container, "_RECONNECT_SECONDS", 0.01)
    engine, lines = CutOff(), []
    found = docker_container.watch(
        engine, lambda: engine, "c", tmp_path / "log",
        on_log=lines.append, should_stop=lambda: False, stop=lambda: None, poll_seconds=0.01,
    )  # fmt: skip
    assert lines == ["line 0", "line 1", "line 2"]
    assert engine.streams == 3
    assert found == {"State": {"Running": False}}


# Logins of registries


@pytest.mark.parametrize(
    ("registry", "image", "sent"),
    [
        ("localhost:5000", "localhost:5000/team/x:1", True),
        ("localhost:5000", "python:3.11", False),
        ("localhost:5000", "localhost:5001/team/x:1", False),
        ("docker.io", "team/x@sha256:" + "a" * 64, True),
        ("https://index.docker.io/v1/", "python", True),
        ("docker.io", "quay.io/team/x", False),
        ("", "quay.io/team/x", True),
    ],
)
def test_a_login_goes_to_its_own_registry_alone(registry: str, image: str, sent: bool) -> None:
    found = RegistryLogin(registry, "me", "secret").auth_for(image)
    assert found == ({"username": "me", "password": "secret"} if sent else None)
    assert "secret" not in repr(RegistryLogin(registry, "me", "secret"))


class FakeEngine:
    """Has the images that it is told, and notes pulls."""

    def __init__(self, *images: str) -> None:
        self.images = images
        self.pulls: list[Any] = []

    def inspect_image(self, reference: str) -> dict[str, str]:
        from docker.errors import ImageNotFound

        if reference not in self.images:
            raise ImageNotFound(reference)
        return {}

    def pull(self, reference: str, auth_config: Any, **options: Any) -> list[dict[str, str]]:
        self.pulls.append((reference, auth_config))
        return [{"status": "done"}]


def test_nobody_is_asked_for_a_login_unless_something_is_pulled(settings: Settings) -> None:
    def refuse() -> RegistryLogin:
        raise AssertionError("asked")

    engine = FakeEngine("r.org/x:1")
    ensure_image(engine, settings, "r.org/x:1", login=refuse)
    assert engine.pulls == []
    ensure_image(engine, settings, "r.org/x:2", login=lambda: RegistryLogin("r.org", "me", "p"))
    ensure_image(engine, settings, "r.org/x:1", login=lambda: None, always=True)
    assert engine.pulls == [("r.org/x:2", {"username": "me", "password": "p"}), ("r.org/x:1", None)]


def test_the_settings_user_where_the_connection_is_missing(settings: Settings) -> None:
    own = settings.model_copy(update={"registry": "r.org", "registry_user": "airloom"})
    engine = FakeEngine()
    ensure_image(engine, own, "r.org/x:1", login=lambda: None)
    ensure_image(engine, own, "quay.io/x:1", login=lambda: None)
    assert [(name, auth and auth["username"]) for name, auth in engine.pulls] == [
        ("r.org/x:1", "airloom"),
        ("quay.io/x:1", None),
    ]


def test_login_from_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "good": SimpleNamespace(host="localhost", port=5000, login="me", password="p"),
        "no_login": SimpleNamespace(host="localhost", port=None, login="", password="p"),
    }

    def get(connection_id: str) -> Any:
        if connection_id not in known:
            raise AirflowNotFoundException(connection_id)
        return known[connection_id]

    monkeypatch.setattr(BaseHook, "get_connection", get)
    assert login_from("good")() == RegistryLogin("localhost:5000", "me", "p")
    assert login_from("missing")() is None
    with pytest.raises(ConfigError, match="'missing' is not in Airflow"):
        login_from("missing", required=True)()
    with pytest.raises(ConfigError, match="'no_login' has no login"):
        login_from("no_login")()


@pytest.mark.parametrize(
    ("registry", "host", "port"),
    [("127.0.0.1:5050", "127.0.0.1", 5050), ("docker.io", "docker.io", None), ("r.org/team", "r.org/team", None)],
)
def test_the_registry_is_among_airflows_connections(
    settings: Settings, registry: str, host: str, port: int | None
) -> None:
    assert "airloom_registry" not in connections(Hooks(settings))
    own = settings.model_copy(update={"registry": registry, "registry_user": "airloom"})
    found = connections(Hooks(own))["airloom_registry"]
    assert (found["conn_type"], found["host"], found["port"], found["login"]) == ("docker", host, port, "airloom")
    assert found["password"] == own.secret("registry_password")


def test_no_engine_is_asked_that_no_task_has_used(settings: Settings) -> None:
    assert list(find_task_containers(settings.model_copy(update={"docker_host": "tcp://127.0.0.1:1"}))) == []
