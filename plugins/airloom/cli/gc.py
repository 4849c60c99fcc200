"""`airloom gc`: free the room that ended runs take."""

from __future__ import annotations

from typing import Annotated

import typer

from airloom.cli.output import print_json, print_table, reports_errors, say


@reports_errors
def gc(
    keep_days: Annotated[float, typer.Option("--keep-days", help="leave what was written since")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Remove the workspaces of ended runs, old leases of builds and an old cache volume; end stages that no run owns.

    Data versions, models, releases and results stay: they are in the stores.
    """
    from airloom.flows.gc import collect
    from airloom.hooks.connect import Hooks
    from airloom.settings import get_settings
    from airloom.stack.launch import collect_inside

    settings = get_settings()
    if settings.stack_file.exists():  # the stack is up
        freed = collect_inside(settings, keep_days=keep_days, dry_run=dry_run)
    else:
        freed = collect(Hooks(settings), keep_days=keep_days, dry_run=dry_run)
    if as_json:
        print_json({**freed.model_dump(mode="json"), "size_bytes": freed.size_bytes, "dry_run": dry_run})
        return
    for stage in freed.ended:
        say(f"ended {stage.label}: stage {stage.stage} of {stage.pipeline} {stage.run_id}")
    if freed.removed:
        rows = [(item.pipeline, item.run, f"{item.size_bytes / 2**20:,.0f} MiB") for item in freed.removed]
        print_table(["pipeline", "run", "size"], rows)
    if freed.cache_volume:
        say("the engine's cache volume of data versions " + ("would be removed" if dry_run else "is removed"))
    verb = "would be freed" if dry_run else "freed"
    say(f"{freed.size_bytes / 2**20:,.0f} MiB {verb}, {len(freed.removed)} workspaces; {freed.leases} old leases")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(gc)
