"""How the command line speaks: one console, tables, JSON for machines, errors that help."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer
from typer.core import TyperGroup

from airloom.errors import AirloomError

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

_FILE_COLUMNS = 200

P = ParamSpec("P")
R = TypeVar("R")


class Commands(TyperGroup):
    """Commands whose help names each with its whole first sentence.

    Plain text: the library that would draw boxes around it takes long to load.
    """

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the list of commands, folded where typer would cut."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(sys.maxsize)) for name, command in found if command is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command_group(help_text: str, *, alone: bool = False) -> typer.Typer:
    """An app to register commands on. `alone`: without one of them it does something, instead of showing its help."""
    return typer.Typer(
        cls=Commands,
        help=help_text,
        invoke_without_command=alone,
        no_args_is_help=not alone,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an `AirloomError` into its message on standard error and its exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AirloomError as error:
            sys.stderr.write(f"airloom: {error}\n")
            raise SystemExit(error.exit_code) from error

    return wrapped


def say(text: str = "") -> None:
    """Print a line of rich text."""
    from rich.console import Console

    Console(soft_wrap=True, highlight=False).print(text)


def print_json(value: Any) -> None:
    """Print a value for machines."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows as a table; `None` shows as nothing."""
    from rich.console import Console
    from rich.table import Column, Table

    # Folded, never cut: ids are there to be copied.
    cells = [Column(name, overflow="fold") for name in columns]
    table = Table(*cells, title=title, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console = Console()
    # Into a file or a pipe nothing has to be folded.
    (console if console.is_terminal else Console(width=_FILE_COLUMNS)).print(table)
