"""The `airloom` command.

Each module of this package registers its commands on the one app. They import what they need inside
their functions: `airloom --help` loads typer and nothing else.
"""

from __future__ import annotations

import importlib

from airloom.cli.output import command_group

COMMAND_MODULES = (
    "platform",
    "stack",
    "build",
    "pushes",
    "images",
    "repos",
    "runs",
    "lineage",
    "receipts",
    "config",
    "gc",
    "demo",
)

app = command_group("Push code, get a served model, and know which code, data, image and run every answer came from.")

for _name in COMMAND_MODULES:
    importlib.import_module(f"airloom.cli.{_name}").register(app)


def main() -> None:
    """Entry point of the console script."""
    app()
