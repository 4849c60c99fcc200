"""Commands: lineage, models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from airloom.cli.output import print_json, print_table, reports_errors

if TYPE_CHECKING:
    from rich.tree import Tree

    from airloom.flows.lineage import LineageNode

_PATIENCE_SECONDS = 2.0  # whoever waits at a terminal wants to know soon that MLflow is down


@reports_errors
def lineage(
    subject: Annotated[
        str, typer.Argument(help="version tag, run, digits/3, digits-1.0.4, commit, prediction or pipeline")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what something came from and what came of it."""
    from airloom.flows.lineage import lineage as walk
    from airloom.hooks.connect import Hooks

    hooks = Hooks()
    hooks.mlflow.be_patient(_PATIENCE_SECONDS)
    found = walk(hooks, subject)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    from rich.console import Console
    from rich.tree import Tree

    tree = Tree(_label(found.subject))
    for title, nodes in (("came from", found.came_from), ("led to", found.led_to)):
        if nodes:
            branch = tree.add(f"[bold]{title}[/]")
            for node in nodes:
                _grow(branch, node)
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # into a file or a pipe nothing has to be cut
        console = Console(width=400, highlight=False)
    console.print(tree)
    for note in found.notes:
        console.print(f"[yellow]not everything is shown:[/] {_plain(note)}")


@reports_errors
def models(
    pipeline: Annotated[str | None, typer.Argument(help="one pipeline; all without one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List model versions with their aliases, the gate's verdict, figures and data version."""
    import json

    from airloom.errors import NotFoundError
    from airloom.hooks import mlflow_records as records
    from airloom.hooks.connect import Hooks

    hooks = Hooks()
    hooks.mlflow.be_patient(_PATIENCE_SECONDS)
    versions = hooks.mlflow.versions(pipeline)
    if pipeline and not versions:
        raise NotFoundError(f"there is no model of a pipeline {pipeline!r}", hint="list all with: airloom models")
    rows: list[dict[str, Any]] = [
        {
            "model": f"{version.name}/{version.version}",
            "aliases": list(version.aliases),
            "verdict": version.tags.get(records.GATE_TAG),
            "metrics": json.loads(version.tags.get(records.METRICS_TAG, "{}")),
            "data_tag": version.tags.get(records.DATA_TAG),
            "run_id": version.tags.get(records.RUN_TAG),
            "model_uri": version.model_uri,
        }
        for version in versions
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["model", "aliases", "verdict", "figures", "data version"],
        [
            (row["model"], ", ".join(row["aliases"]), row["verdict"], _figures(row["metrics"]), row["data_tag"])
            for row in rows
        ],
    )


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(lineage)
    app.command()(models)


def _grow(branch: Tree, node: LineageNode) -> None:
    grown = branch.add(_label(node))
    for following in node.next:
        _grow(grown, following)


def _label(node: LineageNode) -> str:
    title = f"[bold cyan]{_plain(node.title)}[/]"
    if node.url and node.url.startswith("http"):
        title = f"[link={node.url}]{title}[/link]"
    detail = f"  [dim]{_plain(node.detail)}[/]" if node.detail else ""
    again = "  [dim](see above)[/]" if node.repeated else ""
    return f"{node.kind.value} {title}{detail}{again}"


def _figures(metrics: dict[str, float]) -> str:
    return "\n".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
