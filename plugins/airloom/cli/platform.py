"""Commands on the platform: init, up, provision, down, status, logs, clean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from airloom.cli.output import print_json, print_table, reports_errors, say

if TYPE_CHECKING:
    from airloom.hooks.supervisor import ServiceState
    from airloom.settings import Settings


@reports_errors
def init() -> None:
    """Make the secrets of this installation; those that exist stay."""
    from airloom.embedded.secrets import init_secrets
    from airloom.settings import get_settings

    settings = get_settings()
    made = init_secrets(settings)
    count = f"{len(made)} secret{'s' * (len(made) != 1)} made" if made else "all secrets are"
    say(f"{count} in {settings.secrets_dir}")


@reports_errors
def up(
    embedded: Annotated[bool, typer.Option("--embedded", help="as child processes, without Docker")] = False,
    seed: Annotated[bool, typer.Option("--seed/--no-seed", help="write the demo's raw data")] = True,
) -> None:
    """Start the platform, as containers or --embedded; wait until all of it answers, and provision it."""
    from airloom.cli.stack import start_stack
    from airloom.embedded.secrets import init_secrets
    from airloom.settings import get_settings

    settings = get_settings()
    init_secrets(settings)
    if not embedded:
        start_stack(settings, seed=seed)
        return
    states = start_embedded(settings, seed=seed)
    show_addresses(settings, states)


def start_embedded(settings: Settings, *, seed: bool = True) -> list[ServiceState]:
    """Start, wait and provision, with progress; all services as they are then.

    A start that fails leaves nothing running.

    Raises:
        PlatformError: it runs already, or a service does not start; the message holds its last log lines.
        ServiceError: provisioning failed; the platform runs on.
    """
    from airloom.cli.platform_view import Progress
    from airloom.embedded.launch import bring_down, launch, wait_ready
    from airloom.hooks.supervisor import Supervisor

    launch(settings)
    with Progress() as progress:
        try:
            wait_ready(settings, progress.services)
        except BaseException:
            bring_down(settings, lambda _: None)
            raise
    provision_platform(settings, seed=seed)
    return Supervisor.from_settings(settings).services()


def provision_platform(settings: Settings, *, seed: bool = True) -> None:
    """Provision, with progress.

    Raises:
        AirloomError: what went wrong; the platform runs on.
    """
    from airloom.cli.platform_view import Progress
    from airloom.embedded.provision import provision
    from airloom.errors import AirloomError
    from airloom.hooks.connect import Hooks

    with Progress() as progress:
        try:
            provision(Hooks(settings), progress.step, seed=seed)
        except AirloomError as error:
            again = "the platform runs; once that is mended: airloom provision"
            error.hint = f"{error.hint}; {again}" if error.hint else again
            raise


def show_addresses(settings: Settings, states: list[ServiceState]) -> None:
    """Print where people and programs find each service, and how they log in."""
    users = {
        "airflow-api-server": f"admin / {settings.secrets_dir / 'admin_password'}",
        "git": f"{settings.git_user} / {settings.secrets_dir / 'git_password'}",
        "s3": f"airloom / {settings.secrets_dir / 's3_airloom_secret'}",
    }
    rows = [(s.name, what, url, users.get(s.name)) for s in states for what, url in s.urls.items()]
    print_table(["service", "what", "address", "user / file with the password"], rows)


@reports_errors
def provision(seed: Annotated[bool, typer.Option("--seed/--no-seed", help="write the demo's raw data")] = True) -> None:
    """Make what a running platform lacks: buckets, repositories, hooks, connections, raw data."""
    from airloom.cli.platform_view import Progress
    from airloom.embedded.launch import is_running
    from airloom.settings import get_settings
    from airloom.stack.launch import is_up
    from airloom.stack.launch import provision as provision_stack

    settings = get_settings()
    if not is_running(settings) and is_up(settings):
        with Progress() as progress:
            provision_stack(settings, progress.step, seed=seed)
        return
    provision_platform(settings, seed=seed)


@reports_errors
def down() -> None:
    """Stop the platform and wait until none of its processes is left."""
    from airloom.cli.platform_view import Progress
    from airloom.cli.stack import stop_stack
    from airloom.embedded.launch import bring_down, is_running
    from airloom.settings import get_settings
    from airloom.stack.launch import is_up

    settings = get_settings()
    if not is_running(settings) and is_up(settings):
        stop_stack(settings)
        return
    with Progress() as progress:
        was_up = bring_down(settings, progress.services)
    say("the platform is down" if was_up else f"no platform runs in {settings.home_dir}")


@reports_errors
def status(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show every service: state, process, memory, restarts, address."""
    from datetime import UTC, datetime

    from airloom.cli.stack import show_stack
    from airloom.embedded.instance import code_changed, read_record, supervisor_memory_bytes
    from airloom.embedded.launch import is_running
    from airloom.errors import PlatformError
    from airloom.hooks.supervisor import Supervisor
    from airloom.settings import get_settings
    from airloom.stack.launch import is_up

    settings = get_settings()
    record = read_record(settings)
    if record is None or not is_running(settings):
        if is_up(settings):
            show_stack(settings, as_json=as_json)
            return
        if as_json:
            print_json({"running": False, "home": str(settings.home_dir), "services": []})
        raise PlatformError(f"the platform in {settings.home_dir} is not running", hint="run: airloom up --embedded")
    states = Supervisor.from_settings(settings).services(memory=True)
    own = supervisor_memory_bytes(record.pid)
    total = own + sum(state.memory_bytes for state in states)
    if as_json:
        print_json(
            {
                "running": True,
                "ready": all(state.ready for state in states),
                "home": str(settings.home_dir),
                "pid": record.pid,
                "started": record.started,
                "memory_bytes": total,
                "supervisor_memory_bytes": own,
                "services": [state.model_dump(mode="json") for state in states],
            }
        )
        return
    rows: list[tuple[object, ...]] = [
        (
            state.name,
            state.state,
            state.pid,
            _mebibytes(state.memory_bytes),
            state.restarts,
            state.url or state.port,
            _ago(state.seconds),
            state.error,
        )
        for state in states
    ]
    since = (datetime.now(UTC) - record.started).total_seconds()
    rows.append(("supervisor", "ready", record.pid, _mebibytes(own), 0, None, _ago(since), None))
    columns = ["service", "state", "pid", "memory", "restarts", "address", "for", "problem"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    say(f"memory of all processes: {_mebibytes(total)}")
    if code_changed(settings):
        say("[yellow]Airloom's code has changed since the start: make down, then make up-embedded, to run the new.[/]")


@reports_errors
def logs(
    service: Annotated[str | None, typer.Argument(help="a service of `airloom status`; all without one")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until Ctrl-C")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="how many of the last lines")] = 50,
) -> None:
    """Show what services wrote."""
    from airloom.cli.platform_logs import show
    from airloom.embedded.launch import is_running
    from airloom.settings import get_settings
    from airloom.stack.launch import is_up

    settings = get_settings()
    if not is_running(settings) and is_up(settings):
        from airloom.stack.compose import Compose

        Compose(settings).show_logs(service, follow=follow, lines=lines)
        return
    show(settings.log_dir, service, follow=follow, lines=lines)


@reports_errors
def clean(yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False) -> None:
    """Remove all state of this installation: data, models, logs, secrets; the containers and volumes of its stack."""
    from airloom.cli.stack import clean_stack
    from airloom.embedded.clean import remove_home, size_bytes
    from airloom.embedded.instance import is_locked
    from airloom.errors import PlatformError, UnavailableError
    from airloom.flows.gc import remove_from_engine
    from airloom.settings import get_settings

    settings = get_settings()
    home = settings.home_dir
    if clean_stack(settings, yes=yes):
        say("the stack's containers, networks and volumes are removed")
    if not home.exists():
        say(f"there is nothing in {home}")
        return
    if is_locked(settings):
        raise PlatformError(f"the platform in {home} is running", hint="stop it first: airloom down")
    if not yes:
        question = f"Remove {home} ({_mebibytes(size_bytes(home))}) with all data, models, logs and secrets?"
        typer.confirm(question, abort=True)
    try:
        remove_from_engine(settings)
    except UnavailableError as error:
        say(f"containers and volumes of stages stay where they are: {error.message}")
    remove_home(settings)
    say(f"{home} is removed")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _ago(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    for command in (init, up, provision, down, status, logs, clean):
        app.command()(command)
