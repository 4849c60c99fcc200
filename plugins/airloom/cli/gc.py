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
    """Remove the workspaces of ended runs, and end stages that no live run owns.

    Data versions, models, releases and results stay: they are in the stores.
    """
    from airloom.flows.gc import free_room, live_by_folder
    from airloom.hooks.connect import Hooks

    hooks = Hooks()
    is_live = live_by_folder(hooks.airflow.live_runs())
    freed = free_room(hooks.settings, is_live=is_live, keep_days=keep_days, dry_run=dry_run)
    if as_json:
        print_json({**freed.model_dump(mode="json"), "size_bytes": freed.size_bytes, "dry_run": dry_run})
        return
    for stage in freed.ended:
        say(f"ended {stage.label}: stage {stage.stage} of {stage.pipeline} {stage.run_id}")
    if freed.removed:
        rows = [(item.pipeline, item.run, f"{item.size_bytes / 2**20:,.0f} MiB") for item in freed.removed]
        print_table(["pipeline", "run", "size"], rows)
    verb = "would be freed" if dry_run else "freed"
    say(f"{freed.size_bytes / 2**20:,.0f} MiB {verb}, {len(freed.removed)} workspaces")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(gc)
