"""The demo: one command from a bare machine to a served, traceable model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from airloom.cli.output import print_table, reports_errors, say

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

PIPELINE = "digits"
SHOWN = 20


@reports_errors
def demo() -> None:
    """Start the platform, push the stage repos, run the pipeline `digits`, and show what is served.

    The platform goes on running. A second demo runs only what has changed.
    """
    from airloom.cli.platform import provision_platform, show_addresses, start_embedded
    from airloom.cli.runs import follow
    from airloom.embedded.instance import code_changed
    from airloom.embedded.launch import is_running
    from airloom.embedded.secrets import init_secrets
    from airloom.errors import AirloomError, PlatformError
    from airloom.hooks.connect import Hooks
    from airloom.settings import get_settings

    settings = get_settings()
    started = time.monotonic()
    init_secrets(settings)
    hooks = Hooks(settings)
    if is_running(settings):
        if code_changed(settings):
            raise PlatformError(
                "the platform that runs was started before Airloom's code changed",
                hint="run: make down, then make demo",
            )
        say("[bold]The platform is running already.[/]")
        provision_platform(settings)
        states = hooks.supervisor.services()
    else:
        say("[bold]Starting the platform[/]")
        states = start_embedded(settings)
    say(f"\n[bold]Running the pipeline {PIPELINE}[/]")
    hooks.airflow.unpause(PIPELINE)
    run_id = hooks.airflow.trigger(PIPELINE, {})
    summary = follow(hooks, PIPELINE, run_id)
    if summary["state"] != "success":
        raise AirloomError(
            f"the run {run_id} ended as {summary['state']}",
            hint=f"see {settings.airflow_api_url}/dags/{PIPELINE} and: airloom logs",
        )
    say()
    _show_result(hooks, run_id)
    picture = settings.home_dir / "demo" / "predictions.png"
    ids = draw_predictions(hooks, picture)
    show_addresses(settings, states)
    say(f"Predictions, as served:      {picture}")
    say(f"What an answer came from:    .venv/bin/airloom receipt {ids[0]}")
    say(f"The same answer once more:   .venv/bin/airloom replay {ids[0]}")
    say(f"The model's own page:        {hooks.gateway.model_url(PIPELINE)}/")
    say("To stop the platform:        make down")
    say(f"[green]Done in {time.monotonic() - started:.0f} s.[/]")


def _show_result(hooks: Hooks, run_id: str) -> None:
    """What the run led to, read from what the tasks returned."""
    from airloom.contract import DataVersion, GateDecision, Release, RunPlan

    def returned(task: str) -> Any:
        return hooks.airflow.xcom(PIPELINE, run_id, task)

    plan = RunPlan.model_validate(returned("resolve"))
    data = DataVersion.model_validate(returned("version"))
    decision = GateDecision.model_validate(returned("gate"))
    rows: list[tuple[str, object]] = [
        *((f"code version of {repo}", f"{pin.commit[:12]} {pin.message}") for repo, pin in sorted(plan.code.items())),
        ("data version", f"{data.md5}, {data.files} files, {data.size_bytes:,} bytes"),
        ("version tag", data.tag),
        ("Airflow run", run_id),
        ("MLflow run", decision.mlflow_run_id),
        *((f"metric {name}", f"{value:.4f}") for name, value in sorted(decision.metrics.items())),
        ("gate", decision.verdict.value),
        *(("", reason) for reason in decision.reasons),
    ]
    if not decision.failed:
        release = Release.model_validate(returned("release"))
        rows.append(("release", f"{release.version}, model {release.model_name}/{release.model_version}"))
        rows.append(("served at", f"{hooks.gateway.model_url(PIPELINE)}/predict"))
    print_table(["what", "value"], rows, title="What the run led to")


def draw_predictions(hooks: Hooks, path: Path) -> list[str]:
    """Ask the gateway about some of the evaluation's pictures and draw them with the answers; the answers' ids.

    Raises:
        NotFoundError: nothing is deployed.
    """
    import io

    from PIL import Image, ImageDraw, ImageFont

    from airloom.errors import NotFoundError
    from airloom.flows.deployments import answering, deployment, reference_rows
    from airloom.flows.release import release_of
    from airloom.hooks.serving import ServingClient

    version = answering(deployment(hooks, PIPELINE))
    if version is None:
        raise NotFoundError(f"nothing is deployed for {PIPELINE}", hint=f"run: airloom run {PIPELINE}")
    rows = reference_rows(hooks, release_of(hooks, PIPELINE, version))[:SHOWN]
    columns, cell, text_height, margin = 10, 112, 44, 10
    lines = -(-len(rows) // columns)
    title_height = 34
    size = (columns * (cell + margin) + margin, title_height + lines * (cell + text_height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(18), ImageFont.load_default(14)
    title = f"{PIPELINE} {version}: answers of {hooks.gateway.model_url(PIPELINE)}/predict"
    draw.text((margin, 8), title, fill="black", font=large)
    ids = []
    with ServingClient(hooks.gateway.model_url(PIPELINE)) as client:
        for number, row in enumerate(rows):
            body = client.predict(row.content, row.media_type).body
            ids.append(str(body["id"]))
            x = margin + number % columns * (cell + margin)
            y = title_height + number // columns * (cell + text_height + margin)
            picture = Image.open(io.BytesIO(row.content)).convert("RGB")
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
            draw.text((x + 2, y + cell + 2), str(body["label"]), fill="black", font=large)
            draw.text((x + 2, y + cell + 24), f"{_probability(body):.1%}", fill="gray", font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return ids


def _probability(body: dict[str, Any]) -> float:
    """Of the label that was answered."""
    value = body.get("probability", body.get("probabilities", {}))
    return float(value[body["label"]] if isinstance(value, dict) else value)


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(demo)
