"""The stack's part of up, down and status; and `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from airloom.cli.output import print_json, print_table, reports_errors, say

if TYPE_CHECKING:
    from airloom.settings import Settings


@reports_errors
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check what the stack needs of this machine; exit 1 when something is missing."""
    from dataclasses import asdict

    from airloom.settings import get_settings
    from airloom.stack.doctor import check_machine

    checks = check_machine(get_settings())
    ok = all(check.ok for check in checks)
    if as_json:
        print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        rows = [("ok" if c.ok else "NO", c.name, c.found, c.needed, "" if c.ok else c.advice) for c in checks]
        print_table(["", "check", "found", "needed", "what to do"], rows)
    if not ok:
        raise SystemExit(1)


def start_stack(settings: Settings, *, seed: bool = True) -> None:
    """Start, wait and provision, with progress; then print the addresses.

    Args:
        seed: whether to write the demo's raw data.

    Raises:
        ConfigError, PlatformError: see `airloom.stack.launch.bring_up`.
    """
    from airloom.cli.platform_view import Progress
    from airloom.embedded.launch import is_running
    from airloom.errors import PlatformError
    from airloom.stack.launch import bring_up
    from airloom.stack.secret_files import write_secret_files

    if is_running(settings):
        raise PlatformError("the embedded platform runs here", hint="stop it first: airloom down")
    write_secret_files(settings)
    with Progress() as progress:
        bring_up(settings, progress.step, seed=seed)
    show_stack(settings)


def show_stack(settings: Settings, *, as_json: bool = False) -> None:
    """Print every container of the stack.

    Raises:
        PlatformError: Compose failed.
    """
    from airloom.stack.compose import Compose, is_well

    states = sorted(Compose(settings).states(), key=lambda state: str(state["Service"]))
    if as_json:
        ready = all(is_well(state) for state in states)
        print_json({"running": True, "form": "stack", "ready": ready, "services": states})
        return
    rows = []
    for state in states:
        scheme = "" if state["Service"] == "mysql" else "http://"
        published = {p["PublishedPort"] for p in state.get("Publishers") or [] if p["PublishedPort"]}
        addresses = ", ".join(f"{scheme}{settings.page_host}:{port}" for port in sorted(published))
        rows.append((state["Service"], state["State"], state.get("Health"), state.get("Image"), addresses))
    print_table(["service", "state", "health", "image", "address"], rows)
    say(f"user admin, password in {settings.secrets_dir / 'admin_password'}")


def stop_stack(settings: Settings) -> None:
    """Stop the stack; its volumes stay."""
    from airloom.stack.launch import bring_down

    bring_down(settings)
    say("the stack is down; its data stays in its volumes")


def clean_stack(settings: Settings, *, yes: bool) -> bool:
    """Remove the stack with its volumes, after asking; False where this installation has none.

    Raises:
        PlatformError: the engine or Compose failed.
    """
    from airloom.errors import AirloomError
    from airloom.stack.launch import bring_down, is_own, volumes_of

    if not is_own(settings):
        return False
    try:
        volumes = volumes_of(settings)
    except AirloomError:  # no Docker here, so no stack
        return False
    if not volumes:
        return False
    if not yes:
        names = ", ".join(volumes)
        typer.confirm(f"Remove the stack {settings.stack} with all its data, in {names}?", abort=True)
    bring_down(settings, volumes=True)
    return True


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(doctor)
