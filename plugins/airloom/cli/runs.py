"""Commands: start runs, watch them, list them, answer those that wait for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from airloom.cli.output import print_json, print_table, reports_errors, say

if TYPE_CHECKING:
    from airloom.hooks.airflow_api import AirflowApi, RunInfo, TaskInfo
    from airloom.hooks.connect import Hooks

OWN_DAGS = "airloom__"


@reports_errors
def run(  # noqa: PLR0917 - typer's way to declare options
    pipeline: Annotated[str, typer.Argument(help="name of a pipeline in dags/configs")],
    commit: Annotated[
        list[str] | None, typer.Option("--commit", metavar="REPO=REV", help="revision of a stage repo; may be repeated")
    ] = None,
    reproduce: Annotated[
        str | None, typer.Option("--reproduce", metavar="TAG", help="version tag to make again")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="run stages whose result is known already, too")] = False,
    skip_approval: Annotated[bool, typer.Option("--skip-approval", help="ask nobody before the release")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="wait for the end and show each task")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Start a pipeline.

    Exit code 0: the run has ended as it should, whether the gate promoted the candidate or rejected it; the
    verdict is printed, and in the JSON. 7: a task has failed. 4: no such pipeline.
    """
    from airloom.hooks.connect import Hooks

    hooks = Hooks()
    conf = {"commits": _commits(commit or []), "reproduce": reproduce, "force": force, "skip_approval": skip_approval}
    run_id = _start(hooks.airflow, pipeline, conf)
    if not wait:
        address = hooks.airflow.run_url(pipeline, run_id)
        print_json({"run_id": run_id, "url": address}) if as_json else say(f"started {run_id}\n{address}")
        return
    follow(hooks, pipeline, run_id, as_json=as_json)


def follow(hooks: Hooks, pipeline: str, run_id: str, *, as_json: bool = False) -> dict[str, Any]:
    """Show a run's tasks until it has ended, then what came of it; return the summary.

    Raises:
        StageFailedError: a task has failed.
    """
    from airloom.cli.run_progress import RunProgress
    from airloom.errors import StageFailedError

    if as_json:
        ended = hooks.airflow.wait(pipeline, run_id)
    else:
        with RunProgress(f"{pipeline} {run_id}") as progress:
            ended = hooks.airflow.wait(pipeline, run_id, progress.update)
    summary = summarize(hooks, pipeline, ended)
    print_json(summary) if as_json else show(summary)
    if ended["state"] != "success":
        failed = [f"{task['task']}: {task['reason']}" for task in summary["tasks"] if task["state"] == "failed"]
        reasons = "\n".join(failed) or "no task has failed; the run was ended from outside"
        raise StageFailedError(f"the run {run_id} of {pipeline} has failed\n{reasons}", hint=f"see {summary['url']}")
    return summary


@reports_errors
def runs(
    pipeline: Annotated[str | None, typer.Argument(help="only this pipeline's")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100, help="how many")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List recent runs, newest first."""
    from airloom.hooks.connect import Hooks

    hooks = Hooks()
    rows = []
    for found in _recent(hooks.airflow, pipeline, limit):
        outcome = hooks.ledger.run(found["dag_id"], found["dag_run_id"])
        rows.append(
            {
                "pipeline": found["dag_id"],
                "run_id": found["dag_run_id"],
                "state": found["state"],
                "verdict": outcome.verdict if outcome else None,
                "started": found["start_date"],
                "seconds": _seconds(found),
                "note": (found.get("note") or "").partition("\n")[0],
            }
        )
    if as_json:
        print_json(rows)
        return
    columns = ["pipeline", "run_id", "state", "verdict", "seconds", "note"]
    print_table(columns, [[_shown(row[name]) for name in columns] for row in rows])


@reports_errors
def approve(
    pipeline: Annotated[str, typer.Argument(help="name of the pipeline")],
    run_id: Annotated[str, typer.Argument(help="the run that waits")],
    reject: Annotated[bool, typer.Option("--reject", help="end the run without a release")] = False,
) -> None:
    """Answer a run that waits for a person before its release."""
    from airloom.hooks.connect import Hooks

    Hooks().airflow.answer(pipeline, run_id, "approve", "Reject" if reject else "Approve")
    say("rejected: the run ends, and the champion stays" if reject else "approved: the run goes on")


def summarize(hooks: Hooks, pipeline: str, ended: RunInfo) -> dict[str, Any]:
    """What came of a run: for each task its state, seconds, use of the cache and reason; the gate's verdict."""
    from airloom.flows.figures import figures_of

    api, run_id = hooks.airflow, ended["dag_run_id"]
    errors = _errors(hooks, pipeline, run_id)
    tasks, verdict, reasons = [], None, []
    for task in ordered(api.task_instances(pipeline, run_id)):
        name = task["task_id"]
        returned = _returned(api, pipeline, run_id, task)
        figures = figures_of(name, returned)
        if figures.verdict:
            verdict, reasons = figures.verdict, list(returned.get("reasons") or [])
        tasks.append(
            {
                "task": name,
                "state": task["state"],
                "seconds": task["duration"],
                "try": task["try_number"],
                "cache": figures.cache,
                "reason": figures.reason or (errors.get(name, "") if task["state"] == "failed" else ""),
            }
        )
    return {
        "pipeline": pipeline,
        "run_id": run_id,
        "state": ended["state"],
        "verdict": verdict,
        "reasons": reasons,
        "seconds": _seconds(ended),
        "tasks": tasks,
        "url": api.run_url(pipeline, run_id),
    }


def show(summary: Mapping[str, Any]) -> None:
    """Print a run's summary for people."""
    from rich.markup import escape

    columns = ["task", "state", "seconds", "cache", "reason"]
    print_table(columns, [[escape(_shown(task[name])) for name in columns] for task in summary["tasks"]])
    match summary["verdict"]:
        case "rejected":
            say("[bold yellow]The gate rejected the candidate: the champion stays. That is a decision, no failure.[/]")
        case "promoted":
            say("[bold green]The gate promoted the candidate.[/]")
    for reason in summary["reasons"]:
        say(f"  {escape(str(reason))}")
    say(f"{summary['state']} after {_shown(summary['seconds'])} s: {summary['url']}")


def ordered(tasks: list[TaskInfo]) -> list[TaskInfo]:
    """Tasks in the order of the flow: those that ran by their start, then the others."""
    from airloom.flows.figures import TASK_ORDER

    order = {name: number for number, name in enumerate(TASK_ORDER)}
    return sorted(tasks, key=lambda task: (order.get(task["task_id"], len(order)), str(task.get("start_date"))))


def _start(api: AirflowApi, pipeline: str, conf: Mapping[str, Any]) -> str:
    from airloom.errors import NotFoundError

    try:
        return api.trigger(pipeline, conf)
    except NotFoundError as error:
        known = ", ".join(sorted(dag["dag_id"] for dag in api.dags())) or "none yet"
        raise NotFoundError(f"Airflow has no pipeline {pipeline!r}", hint=f"there are: {known}") from error


def _recent(api: AirflowApi, pipeline: str | None, limit: int) -> list[RunInfo]:
    """The latest runs of one pipeline or of all; the platform's own DAGs would bury them."""
    if pipeline is not None:
        return api.runs(pipeline, limit=limit)
    names = [dag["dag_id"] for dag in api.dags() if not dag["dag_id"].startswith(OWN_DAGS)]
    found = [run for name in names for run in api.runs(name, limit=limit)]
    return sorted(found, key=lambda run: str(run["run_after"]), reverse=True)[:limit]


def _errors(hooks: Hooks, pipeline: str, run_id: str) -> dict[str, str]:
    """task -> why its last try failed, as far as the ledger can tell."""
    from airloom.errors import ServiceError

    try:
        tries = hooks.ledger.tasks(pipeline, run_id)
    except ServiceError:
        return {}
    return {outcome.task: outcome.reason for outcome in tries if outcome.state == "failed"}


def _returned(api: AirflowApi, pipeline: str, run_id: str, task: TaskInfo) -> Any:
    from airloom.errors import NotFoundError

    if task["state"] != "success":
        return None
    try:
        return api.xcom(pipeline, run_id, task["task_id"])
    except NotFoundError:
        return None


def _commits(given: list[str]) -> dict[str, str]:
    from airloom.errors import ConfigError

    commits = {}
    for text in given:
        repo, equals, revision = text.partition("=")
        if not (repo and equals and revision):
            raise ConfigError(f"--commit {text!r} is not REPO=REV", hint="such as --commit ds_mlmodeling=3f2a91c0")
        commits[repo] = revision
    return commits


def _seconds(run_info: RunInfo) -> float | None:
    duration = run_info.get("duration")
    return None if duration is None else round(float(duration), 1)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(run)
    app.command()(runs)
    app.command()(approve)
