"""A live table of a run's tasks."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

MARKS = {
    "success": "[green]✓[/]",
    "failed": "[red]✗[/]",
    "upstream_failed": "[red]·[/]",
    "skipped": "[yellow]–[/]",
    "running": "[cyan]▶[/]",
    "up_for_retry": "[yellow]↻[/]",
    "awaiting_input": "[yellow]?[/]",
}


class RunProgress:
    """Shows each task with its state and seconds while the run goes on; on no terminal, a line for each change."""

    def __init__(self, title: str, *, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console()
        self._tasks: list[dict[str, Any]] = []
        self._printed: dict[str, str] = {}
        self._started: dict[tuple[str, int], float] = {}
        self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Self:
        self._console.print(f"[bold]{self._title}[/]", highlight=False)
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, run: dict[str, Any], tasks: list[dict[str, Any]]) -> None:
        """Take in new states."""
        from airloom.cli.runs import ordered

        self._tasks = ordered(tasks)
        for task in self._tasks:
            if task["state"] == "running":
                self._started.setdefault((task["task_id"], task["try_number"]), time.monotonic())
            if not self._console.is_terminal:
                self._print_change(task)

    def _print_change(self, task: dict[str, Any]) -> None:
        name, state = task["task_id"], task["state"]
        if state and self._printed.get(name) != state and state not in {"scheduled", "queued"}:
            self._printed[name] = state
            self._console.print(f"  {MARKS.get(state, ' ')} {name} {state} {self._seconds(task)}", highlight=False)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for task in self._tasks:
            state = task["state"] or ""
            table.add_row(f"  {MARKS.get(state, '·')}", task["task_id"], state, self._seconds(task))
        return table

    def _seconds(self, task: dict[str, Any]) -> str:
        if task.get("duration") is not None:
            return f"{task['duration']:.1f} s"
        started = self._started.get((task["task_id"], task["try_number"]))
        return f"{time.monotonic() - started:.0f} s" if started else ""
