"""Commands: pushes, pushes replay."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from airloom.cli.output import command_group, print_json, print_table, reports_errors, say

if TYPE_CHECKING:
    from airloom.flows.pushes import Push

commands = command_group("List pushes and what became of each; replay one.", alone=True)


@commands.callback()
def pushes(
    context: typer.Context,
    repo: Annotated[str | None, typer.Option("--repo", help="only this stage repo's")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="how many")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List pushes, newest first: commit, delivery, build, image, run, release, and the time of each part."""
    if context.invoked_subcommand is None:
        _list(repo, limit, as_json)


@reports_errors
def _list(repo: str | None, limit: int, as_json: bool) -> None:
    from airloom.flows.pushes import list_pushes
    from airloom.hooks.connect import Hooks

    found = list_pushes(Hooks(), repo=repo, limit=limit)
    for problem in found.problems:
        sys.stderr.write(f"airloom: {problem}\n")
    if as_json:
        print_json([push.model_dump(mode="json") for push in found.pushes])
        return
    columns = ["commit", "message", "pusher", "delivery", "build", "run", "release", "seconds"]
    print_table(columns, [_row(push) for push in found.pushes])
    if not found.pushes:
        say("No push is in the ledger.")


@commands.command("replay")
@reports_errors
def replay(
    target: Annotated[str, typer.Argument(metavar="REPO@COMMIT|DELIVERY", help="a commit, or a delivery's id")],
    as_json: Annotated[bool, typer.Option("--json", help="print the build's record as JSON")] = False,
) -> None:
    """Do once more what a push leads to: nothing twice that went well, and once more what failed."""
    from airloom.flows.pushes import replay as repeat
    from airloom.hooks.connect import Hooks

    record = repeat(Hooks(), target, say_error)
    print_json(record.model_dump(mode="json")) if as_json else say(f"{record.repo}@{record.commit}: {record.airflow}")


@commands.command("reconcile")
@reports_errors
def reconcile(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Build and start now what lost events should have: what the DAG airloom__reconcile does every few minutes."""
    from datetime import timedelta

    from airloom.errors import ServiceError
    from airloom.flows.reconcile import reconcile as run_reconcile
    from airloom.hooks.connect import Hooks

    actions = run_reconcile(Hooks(), grace=timedelta(0), on_progress=say_error)
    if as_json:
        print_json([action.model_dump(mode="json") for action in actions])
    elif not actions:
        say("Everything that was pushed is built, and Airflow knows of it.")
    errors = [str(action) for action in actions if action.did == "error"]
    if errors:
        raise ServiceError("\n".join(errors))


def say_error(line: str) -> None:
    """Show progress where it does not mix with results."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _row(push: Push) -> list[object]:
    from rich.markup import escape

    built: str = push.build
    if push.build in {"failed", "error", "none"} and push.reason:
        built = f"{built}: {push.reason[:100]}"
    elif push.airflow not in {"", "told"}:
        built = f"{built}; Airflow: {push.airflow}"
    if push.image:
        built = f"{built}\n{push.image}"
    runs = [f"{run.pipeline} {run.verdict or run.state}\n{run.run_id}" for run in push.runs]
    values = (
        f"{push.repo}@{push.commit[:8]}",
        push.message[:60],
        push.pusher,
        "\n".join(name[:8] for name in push.deliveries) or (f"none ({push.asked_by})" if push.asked_by else ""),
        built,
        "\n".join(runs),
        "\n\n".join(run.release or "" for run in push.runs),
        _times(push),
    )
    return [escape(str(value)) for value in values]


def _times(push: Push) -> str:
    """How long each part took, one a line."""
    begun = [run.started_at for run in push.runs if run.started_at]
    ended = [run.ended_at for run in push.runs if run.ended_at]
    over = bool(begun) and len(ended) == len(push.runs)
    parts = {
        "wait": push.waited_seconds,
        "build": push.build_seconds,
        "run": (max(ended) - min(begun)).total_seconds() if over else None,
        "all": push.total_seconds,
    }
    return "\n".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds is not None)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.add_typer(commands, name="pushes")
