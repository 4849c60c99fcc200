"""Build a commit of a stage repo: what Jenkins and the embedded push hook run."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from airloom.cli.output import print_json, reports_errors

# `airloom.flows.build_steps.Step`, whose import would make the command line start slower; a test compares them.
Step = Literal["inspect", "build", "test", "push", "report"]


@reports_errors
def build(  # noqa: PLR0917 - typer's way to declare options
    target: Annotated[str, typer.Argument(metavar="REPO@COMMIT", help="a hash, branch or tag; main without one")],
    as_json: Annotated[bool, typer.Option("--json", help="print the build's record as JSON")] = False,
    no_event: Annotated[bool, typer.Option("--no-event", help="start no pipelines")] = False,
    pusher: Annotated[str, typer.Option("--pusher", help="who pushed; recorded and shown on the run")] = "",
    once: Annotated[
        bool, typer.Option("--once", help="for a push: leave what failed before, and what changes no stage")
    ] = False,
    delivery: Annotated[str, typer.Option("--delivery", help="the push event's id; goes into the ledger")] = "",
    until: Annotated[Step, typer.Option("--until", help="the last step to take; the next call goes on from there")] = (
        "report"
    ),
) -> None:
    """Check out a commit, lint it, make its image where stages run in containers, load and test it there, push the
    image, record all that, and start the pipelines that use it.

    The commit's status says how it went. A commit that is built already is not built again. Pipelines are started once
    for a commit, however often it is built.
    """
    from airloom.flows.build import build_until
    from airloom.flows.changes import decide_commit
    from airloom.flows.push_entry import note_delivery
    from airloom.hooks.connect import Hooks

    repo, _, rev = target.partition("@")

    def show(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    hooks = Hooks()
    if delivery:
        note_delivery(hooks, repo, rev or "main", delivery, pusher=pusher)
    if once:
        decision = decide_commit(hooks, repo, rev or "main")
        if decision.changes_nothing:
            show(f"{target}: {decision.reason}: not built")
            if as_json:
                print_json(None)
            return
    record = build_until(
        hooks,
        repo,
        rev or "main",
        until,
        show,
        pusher=pusher,
        announce=not no_event,
        asked_by="push" if once else "person",
    )
    if as_json:
        print_json(record.model_dump(mode="json") if record else None)
    elif record:
        sys.stdout.write(f"{repo}@{record.commit}\n")


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(build)
