"""What containers of the stack are told, and what is handed on of what they say."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml
from typer.testing import CliRunner

from airloom.cli.main import app
from airloom.cli.stack import clean_stack, show_stack
from airloom.errors import ConfigError, PlatformError
from airloom.flows.gc import Freed, Removed
from airloom.settings import Settings
from airloom.stack import container, doctor, launch, secret_files
from airloom.stack.compose import GROUPS, REGISTRY_URL, Compose

ROOT = Path(__file__).resolve().parents[2]


def with_services(*names: str) -> dict[str, Any]:
    return {"services": {name: {} for name in names}}


@pytest.mark.parametrize(
    ("services", "told"),
    [(("gitbucket", "jenkins"), ["--env", "AIRLOOM_JENKINS_URL=http://jenkins:8080"]), (("forge",), [])],
)
def test_provisioning_knows_of_jenkins(services: tuple[str, ...], told: list[str]) -> None:
    compose = create_autospec(Compose, instance=True)
    compose.config.return_value = with_services(*services)
    compose.run.side_effect = lambda *_, on_line: on_line("repositories: done: ds_mlmodeling")
    seen: list[tuple[str, str]] = []
    launch._provision(compose, lambda step, state: seen.append((step, state)))
    (call,) = compose.run.call_args_list
    assert list(call.args) == ["run", "--rm", "--no-deps", "--quiet-pull", *told, "provision", "provision"]
    assert ("repositories", "done: ds_mlmodeling") in seen


@pytest.mark.parametrize(
    ("services", "found"),
    [(("gitbucket", "minio"), False), (("gitbucket", "jenkins", "minio"), True), (("forge", "minio"), None)],
)
def test_gitbucket_without_jenkins_is_said(services: tuple[str, ...], found: bool | None) -> None:
    checks = {check.name: check for check in doctor._values(with_services(*services))}
    if found is None:
        assert "builds" not in checks
    else:
        assert checks["builds"].ok is found
        assert "COMPOSE_PROFILES" in checks["builds"].advice


def test_files_that_services_cannot_read_are_said(settings: Settings, tmp_path: Path) -> None:
    settings = settings.model_copy(update={"project": tmp_path})
    rules, script, other = tmp_path / "rules", tmp_path / "users.sh", tmp_path.parent / "elsewhere"
    rules.mkdir()
    for path in (rules / "a.yml", script):
        path.write_text("")
    volumes = [{"type": "bind", "source": str(path)} for path in (rules, script, other)]
    config = {"services": {"one": {"volumes": volumes}, "two": {"volumes": [{"type": "volume", "source": "x"}]}}}
    for path, mode in ((rules, 0o755), (rules / "a.yml", 0o644), (script, 0o644)):
        path.chmod(mode)
    assert list(doctor._mounts(settings, config)) == []
    (rules / "a.yml").chmod(0o640)
    script.chmod(0o600)
    (found,) = doctor._mounts(settings, config)
    assert (found.ok, found.found) == (False, "rules/a.yml and 1 more are closed to other users")


@pytest.mark.parametrize(
    ("registry", "url", "told"),
    [
        ("127.0.0.1:5050", "", REGISTRY_URL),  # the stack's own
        ("localhost:5050", "", REGISTRY_URL),
        ("127.0.0.1:5051", "", None),  # somebody else's
        ("docker.io", "", None),
        ("", "", None),
        ("127.0.0.1:5050", "http://elsewhere:5000", None),  # as .env.local says
    ],
)
def test_containers_are_told_where_the_stacks_registry_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, registry: str, url: str, told: str | None
) -> None:
    monkeypatch.delenv("AIRLOOM_REGISTRY_URL", raising=False)
    changed = settings.model_copy(update={"registry": registry, "registry_url": url})
    assert Compose(changed).environment.get("AIRLOOM_REGISTRY_URL") == told


def test_containers_are_told_the_name_for_links(settings: Settings) -> None:
    for values, host in (({}, "127.0.0.1"), ({"bind_host": "0.0.0.0"}, "localhost"), ({"public_host": "a.b"}, "a.b")):
        assert Compose(settings.model_copy(update=values)).environment["AIRLOOM_PUBLIC_HOST"] == host


def test_containers_run_as_whom_the_secrets_belong_to_or_as_is_said(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AIRLOOM_UID", "AIRLOOM_GID"):
        monkeypatch.delenv(name, raising=False)
    settings = settings.model_copy(update={"project": tmp_path})

    def user() -> tuple[str, str]:
        environment = Compose(settings).environment
        return environment["AIRLOOM_UID"], environment["AIRLOOM_GID"]

    owner = settings.secrets_dir.stat()
    monkeypatch.setattr("os.getuid", lambda: owner.st_uid + 1)
    assert user() == (str(owner.st_uid), str(owner.st_gid))
    (tmp_path / ".env.local").write_text("AIRLOOM_UID=4242\n")
    assert user() == ("4242", str(owner.st_gid))
    monkeypatch.setenv("AIRLOOM_UID", "4343")
    monkeypatch.setenv("AIRLOOM_GID", "44")
    assert user() == ("4343", "44")


def compose_that_runs(settings: Settings, program: str) -> Compose:
    found = Compose(settings)
    found._command = [sys.executable, "-c", program]
    return found


def test_lines_are_handed_on_as_they_come(settings: Settings) -> None:
    """The program goes on only when its first line has been seen, and may write much that nobody reads meanwhile."""
    seen_file = settings.run_dir / "seen"
    program = f"""
import pathlib, sys, time
print("one: working", flush=True)
deadline = time.monotonic() + 20
while not pathlib.Path({str(seen_file)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.01)
sys.stderr.write("x" * 1_000_000)
print("one: done" if time.monotonic() < deadline else "one: too late")
"""
    seen: list[str] = []

    def show(line: str) -> None:
        seen.append(line)
        seen_file.touch()

    assert compose_that_runs(settings, program).run("up", on_line=show) == "one: working\none: done\n"
    assert seen == ["one: working", "one: done"]


def test_a_command_that_fails_or_hangs_is_said_while_its_lines_are_followed(settings: Settings) -> None:
    failing = compose_that_runs(settings, "import sys; print('step: working'); sys.exit('no such service')")
    with pytest.raises(PlatformError, match="no such service"):
        failing.run("up", on_line=lambda line: None)
    hanging = compose_that_runs(settings, "import time; time.sleep(60)")
    with pytest.raises(PlatformError, match="did not end within"):
        hanging.run("up", on_line=lambda line: None, timeout_seconds=0.5)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"registry": ""}, set()),
        ({"registry": "docker.io"}, set()),
        ({"registry": "127.0.0.1:5050", "registry_user": "airloom"}, set()),
        ({"registry": "127.0.0.1:5050"}, {"registry's user"}),
        ({"registry": "127.0.0.1:5051"}, {"registry"}),  # not the stack's, and in a container not this machine's
        ({"registry": "127.0.0.1:5051", "registry_url": "http://localhost:5051"}, {"registry"}),
        ({"registry": "127.0.0.1:5051", "registry_url": "http://elsewhere:5000"}, set()),
    ],
)
def test_a_registry_that_containers_do_not_reach_is_said(
    settings: Settings, values: dict[str, str], wrong: set[str]
) -> None:
    checks = list(doctor._registry(settings.model_copy(update=values)))
    assert {check.name for check in checks if not check.ok} == wrong
    assert all("AIRLOOM_REGISTRY" in check.advice for check in checks if not check.ok)


def test_services_can_read_what_root_writes_for_them(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may start a stack whose containers run as the secrets' owner."""
    given: list[tuple[str, int, int]] = []
    folder = settings.secrets_dir.stat()
    monkeypatch.setattr("os.getuid", lambda: 0)
    monkeypatch.setattr("os.chown", lambda path, uid, gid: given.append((path.name.split(".")[1], uid, gid)))
    secret_files.write_secret_files(settings)
    names = ("s3_identities", "mysql_exporter_cnf", "registry_htpasswd")
    assert given == [(name, folder.st_uid, folder.st_gid) for name in names]


def test_secrets_of_another_user_are_said(settings: Settings) -> None:
    own = settings.secrets_dir.stat().st_uid
    assert [check for check in doctor._owner(settings, own) if not check.ok] == []
    assert [(c.ok, c.found) for c in doctor._owner(settings, 0)] == [(True, "root")]
    (found,) = doctor._owner(settings, own + 1)
    assert (found.ok, found.found) == (False, f"user {own}")
    assert f"chown -R {own + 1}" in found.advice


def as_written(settings: Settings, monkeypatch: pytest.MonkeyPatch, *, seed: bool = True) -> list[tuple[str, ...]]:
    """Compose's commands of a bring-up of the project's own files, which are read and not obeyed."""
    ran: list[tuple[str, ...]] = []

    def config(self: Compose, groups: tuple[str, ...] = GROUPS) -> dict[str, Any]:
        files = [yaml.safe_load((ROOT / f"docker-compose-{group}.yml").read_text()) for group in groups]
        return {"services": {name: found for file in files for name, found in file["services"].items()}}

    def run(self: Compose, *arguments: str, **_: Any) -> str:
        ran.append(arguments)
        return ""

    monkeypatch.setattr(Compose, "config", config)
    monkeypatch.setattr(Compose, "run", run)
    for name in ("_runtimes", "_dags", "_reload_jenkins", "_write_stack_file"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(launch, "check_machine", lambda _: [])
    monkeypatch.setattr(launch, "volumes_of", lambda _: [])
    launch.bring_up(settings, lambda step, state: None, seed=seed)
    return ran


@pytest.mark.parametrize(
    ("mode", "ok", "found"), [(0o666, True, "-rw-rw-rw-"), (0o600, False, "-rw-------"), (None, False, "no ")]
)
def test_a_rootless_builder_needs_a_tun_device_that_is_open_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, ok: bool, found: str
) -> None:
    monkeypatch.setattr(doctor, "TUN", tmp_path / "tun")
    if mode is not None:
        doctor.TUN.touch()
        doctor.TUN.chmod(mode)
    (check,) = doctor._tun()
    assert check.ok is ok
    assert check.found.startswith(found)
    assert f"chmod 0666 {doctor.TUN}" in check.advice


@pytest.mark.parametrize(
    ("named", "variable", "local"),
    [("", "", True), ("unix:///run/docker.sock", "tcp://far:2376", True), ("", "tcp://far:2376", False)],
)
def test_an_engine_elsewhere_has_its_own_devices(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, named: str, variable: str, local: bool
) -> None:
    monkeypatch.setenv("DOCKER_HOST", variable)
    assert doctor._is_local(settings.model_copy(update={"docker_host": named})) is local


def test_databases_are_there_before_what_keeps_its_tables_in_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = as_written(settings, monkeypatch)
    started = {name: at for at, command in enumerate(ran) if command[0] in {"up", "run"} for name in command}
    assert started["mysql"] < started["mysql-users"] < started["gitbucket"] < started["airflow-scheduler"]
    assert "mysql-users" in ran[started["mysql-users"]][1:], "by itself, so that its failure ends the bring-up"


@pytest.mark.parametrize("seed", [True, False])
def test_raw_data_is_written_as_asked(settings: Settings, monkeypatch: pytest.MonkeyPatch, seed: bool) -> None:
    """From the command to the container's program."""
    last = as_written(settings, monkeypatch, seed=seed)[-1]
    assert ("--no-seed" in last) is not seed
    given: list[bool] = []
    monkeypatch.setattr(container, "get_settings", lambda: settings)
    monkeypatch.setattr("airloom.stack.provision.provision_stack", lambda *_, seed, **__: given.append(seed))
    arguments = list(last[last.index("provision") + 1 :])
    assert arguments[0] == "provision"
    monkeypatch.setattr(sys, "argv", ["airloom-container", *arguments])
    umask = os.umask(0o077)
    container.main()
    os.umask(umask)
    assert given == [seed]


@pytest.mark.parametrize("command", ["up", "provision"])
@pytest.mark.parametrize("option", ["--seed", "--no-seed"])
def test_commands_hand_on_whether_to_write_raw_data(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    given: list[bool] = []

    def done(*_: Any, seed: bool) -> None:
        given.append(seed)

    monkeypatch.setattr("airloom.settings.get_settings", lambda: settings)
    monkeypatch.setattr("airloom.cli.stack.start_stack", done)
    monkeypatch.setattr(launch, "is_up", lambda _: True)
    monkeypatch.setattr(launch, "provision", done)
    answer = CliRunner().invoke(app, [command, option])
    assert (answer.exit_code, given) == (0, [option == "--seed"]), answer.output


def test_gc_frees_room_where_the_workspaces_are(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine without a stack, in the stack's container with one; both tell the same."""
    asked: list[tuple[float, bool]] = []
    freed = Freed(ended=[], removed=[Removed(pipeline="digits", run="r", size_bytes=3 * 2**20)], leases=2)

    def collect(hooks: object, *, keep_days: float, dry_run: bool) -> Freed:
        asked.append((keep_days, dry_run))
        return freed

    def run(self: Compose, *arguments: str, **_: Any) -> str:
        at = arguments.index("gc")
        assert arguments[at - 1] == "provision", "the service whose volume and networks it needs"
        written = StringIO()
        with redirect_stdout(written):
            container._PARTS["gc"](list(arguments[at + 1 :]))
        return f"a line before\n{written.getvalue()}"

    monkeypatch.setattr("airloom.settings.get_settings", lambda: settings)
    monkeypatch.setattr(container, "get_settings", lambda: settings)
    monkeypatch.setattr("airloom.flows.gc.collect", collect)
    monkeypatch.setattr(Compose, "config", lambda self: with_services("forge"))
    command = ["gc", "--keep-days", "0.5", "--dry-run", "--json"]
    here = CliRunner().invoke(app, command).stdout
    monkeypatch.setattr(Compose, "run", run)
    settings.stack_file.write_text("")
    there = CliRunner().invoke(app, command).stdout
    assert asked == [(0.5, True)] * 2
    assert json.loads(there) == json.loads(here)
    assert (json.loads(there)["size_bytes"], json.loads(there)["leases"]) == (3 * 2**20, 2)


@pytest.mark.parametrize(
    ("state", "well"),
    [
        ({"State": "running", "Health": "healthy"}, True),
        ({"State": "running", "Health": ""}, True),  # nothing of it could ask
        ({"State": "running", "Health": "starting"}, False),
        ({"State": "restarting", "Health": ""}, False),
        ({"State": "exited", "ExitCode": 0, "Labels": "a=b,airloom.one-shot=true"}, True),
        ({"State": "exited", "ExitCode": 1, "Labels": "a=b,airloom.one-shot=true"}, False),
        ({"State": "exited", "ExitCode": 0, "Labels": "a=b"}, False),
    ],
)
def test_ready_is_what_runs_or_has_done_its_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Any, well: bool
) -> None:
    monkeypatch.setattr(Compose, "states", lambda self: [{"Service": "one", **state}])
    show_stack(settings, as_json=True)
    assert json.loads(capsys.readouterr().out)["ready"] is well


def test_addresses_are_those_that_a_client_can_use(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def state(service: str, *ports: int) -> dict[str, Any]:
        publishers = [{"URL": url, "PublishedPort": port} for port in ports for url in ("0.0.0.0", "::")]
        return {"Service": service, "State": "running", "Health": "healthy", "Image": "i", "Publishers": publishers}

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        Compose, "states", lambda self: [state("mysql", 3306), state("minio", 9000, 9001), state("x", 0)]
    )
    show_stack(settings.model_copy(update={"bind_host": "0.0.0.0"}))
    shown = capsys.readouterr().out
    assert " localhost:3306" in shown
    assert "http://localhost:9000, http://localhost:9001" in shown
    assert "0.0.0.0" not in shown


def test_airflow_in_containers_knows_nothing_of_sqlite(settings: Settings) -> None:
    """PostgreSQL's driver refuses options that are SQLite's."""
    found = {name: value for name, value in container.airflow_environment(settings).items() if "__DATABASE__" in name}
    assert set(found) == {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"}
    assert found["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].startswith("postgresql+psycopg2://airflow:")


def test_a_stack_of_that_name_that_another_installation_made_is_left_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine tells stacks by their names alone, and two folders may have left theirs as it comes."""
    compose = create_autospec(Compose, instance=True)
    compose.is_up.return_value = True
    down = create_autospec(launch.bring_down)
    monkeypatch.setattr(launch, "Compose", lambda settings: compose)
    monkeypatch.setattr(launch, "bring_down", down)
    monkeypatch.setattr(launch, "volumes_of", lambda settings: ["airloom_git"])
    monkeypatch.setattr(launch, "check_machine", lambda settings: [])
    assert not launch.is_up(settings)
    assert not clean_stack(settings, yes=True)
    with pytest.raises(ConfigError, match=r"'airloom' that is not this installation's: airloom_git"):
        launch.bring_up(settings, lambda part, state: None)
    compose.start.assert_not_called()
    down.assert_not_called()

    (settings.home_dir / "stack").write_text("airloom\n")
    assert launch.is_up(settings)
    assert clean_stack(settings, yes=True)
    down.assert_called_once_with(settings, volumes=True)


def test_the_first_start_makes_the_stack_this_installations(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "volumes_of", lambda settings: [])
    assert not launch.is_own(settings)
    launch._claim(settings)
    assert launch.is_own(settings)
    monkeypatch.setattr(launch, "volumes_of", lambda settings: ["airloom_git"])
    launch._claim(settings)
