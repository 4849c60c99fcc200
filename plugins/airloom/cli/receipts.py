"""Commands: receipt, replay, predictions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from airloom.cli.output import print_json, print_table, reports_errors, say

DIFFERS_EXIT_CODE = 11

PredictionArgument = Annotated[str, typer.Argument(metavar="ID", help="the `id` of an answer of /predict")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]


@reports_errors
def receipt(prediction_id: PredictionArgument, as_json: JsonOption = False) -> None:
    """Show what is behind a prediction: release, model, run, data version, code, environment."""
    from airloom.flows.receipts import receipt as find_receipt
    from airloom.hooks.connect import Hooks

    found = find_receipt(Hooks(), prediction_id)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    release = found.release
    rows: list[tuple[str, object]] = [
        ("prediction", found.prediction_id),
        ("answered at", found.answered_at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"),
        ("latency", f"{found.latency_ms:g} ms"),
        ("output", _short(found.output)),
        ("input", f"sha256:{found.input_sha256}"),
        ("release", f"{release.pipeline} {release.version}, made {release.created_at:%Y-%m-%d %H:%M} UTC"),
        ("model", f"{release.model_name} version {release.model_version} ({release.model_uri})"),
        ("model digest", f"sha256:{release.model_digest}"),
        ("run", release.run_id),
        ("MLflow run", release.mlflow_run_id),
        ("data version", release.data_tag),
        ("data", f"md5:{release.data_md5}"),
        *((f"code of {repo}", commit) for repo, commit in release.lineage.items()),
        (f"served by {release.serving_repo}", release.serving_commit),
        ("environment", f"sha256:{release.environment}"),
        *([("image", found.image.pull_ref)] if found.image else []),
    ]
    print_table(["", "receipt"], rows)


@reports_errors
def replay(prediction_id: PredictionArgument, as_json: JsonOption = False) -> None:
    """Make a prediction again from its recorded input and compare; the exit code says whether it is the same."""
    from airloom.flows.replay import replay as repeat
    from airloom.hooks.connect import Hooks

    done = repeat(Hooks(), prediction_id)
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        say(f"release   {done.release.pipeline} {done.release.version}")
        say(f"recorded  {_short(done.recorded)}")
        say(f"repeated  {_short(done.repeated)}")
        if done.environment_differs:
            say("[yellow]The environment is not the one that the release was made in.[/yellow]")
        say("[green]The same, bit for bit.[/green]" if done.same else "[red]They differ:[/red]")
        for line in done.differences:
            say(f"  {line}")
    if not done.same:
        raise SystemExit(DIFFERS_EXIT_CODE)


@reports_errors
def predictions(
    pipeline: Annotated[str, typer.Argument(help="name of the pipeline")],
    number: Annotated[int, typer.Option("-n", min=1, max=10_000, help="how many")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List a pipeline's latest predictions, newest first."""
    from dataclasses import asdict

    from airloom.hooks.connect import Hooks

    found = Hooks().predictions.recent(pipeline, number)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    rows = [
        (
            one.id,
            datetime.fromtimestamp(one.answered_at, tz=UTC).strftime("%Y-%m-%d %H:%M:%S"),
            f"{one.latency_ms:g}",
            one.batch_size,
            _short(one.output, 60),
        )
        for one in found
    ]
    print_table(["id", "answered at (UTC)", "ms", "batch", "output"], rows)
    if not found:
        say(f"No prediction of {pipeline} is in the log; a new one arrives there within a second.")


def _short(output: dict[str, object], width: int = 200) -> str:
    import json

    text = json.dumps(output, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    for command in (receipt, replay, predictions):
        app.command()(command)
