"""Commands on pipeline configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from airloom.cli.output import print_json, print_table, reports_errors


@reports_errors
def check(
    paths: Annotated[list[Path] | None, typer.Argument(help="YAML files; all of dags/configs without one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check pipeline YAMLs; every problem is shown with file, line, key, value and what is allowed."""
    from airloom.errors import ConfigError
    from airloom.settings import get_settings
    from airloom.spec import load_pipeline

    chosen = paths or sorted(get_settings().configs_dir.glob("*.yaml"))
    specs, problems = [], []
    for path in chosen:
        try:
            specs.append(load_pipeline(path))
        except ConfigError as error:
            problems.append(str(error))
    if as_json:
        print_json({"valid": [spec.name for spec in specs], "problems": problems})
    else:
        rows = [(spec.name, spec.task, spec.runner, spec.deploy.target, spec.digest[:12]) for spec in specs]
        print_table(["pipeline", "task", "runner", "target", "digest"], rows)
    if problems:
        raise ConfigError("\n".join(problems))


def register(app: typer.Typer) -> None:
    """Add this module's commands to the app."""
    app.command()(check)
