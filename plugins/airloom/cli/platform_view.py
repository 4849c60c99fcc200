"""How the platform's services and steps are shown while they change."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from airloom.hooks.supervisor import ServiceState

_STYLES = {"ready": "green", "starting": "yellow", "waiting": "dim", "backoff": "red", "unready": "red"}


class Progress:
    """Rows of a name, a state and seconds: drawn in place on a terminal, a line for each change elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False, soft_wrap=True)
        self._rows: dict[str, tuple[str, str, float]] = {}
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        from rich.live import Live

        if self._console.is_terminal:
            self._live = Live(
                console=self._console, refresh_per_second=4, get_renderable=self._table, vertical_overflow="visible"
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def services(self, states: Sequence[ServiceState]) -> None:
        """Show services as they are now."""
        for state in states:
            self._set(state.name, str(state.state), "" if state.ready else state.error or "")

    def step(self, name: str, state: str) -> None:
        """Show a step: a word, then what there is to say of it."""
        word, _, detail = state.partition(": ")
        self._set(name, word if word in {"working", "done"} else "working", detail if detail else "")
        if word not in {"working", "done"}:
            self._set(name, "working", state)

    def _set(self, name: str, state: str, detail: str) -> None:
        with self._lock:
            known = self._rows.get(name)
            if known is not None and known[:2] == (state, detail):
                return
            changed = known is None or known[0] != state
            since = time.monotonic() if known is None or changed else known[2]
            self._rows[name] = (state, detail, since)
            if self._live is None and changed:
                seconds = time.monotonic() - self._started
                self._console.print(f"{seconds:6.1f} s  {name:<22} {state}" + (f"  {detail}" if detail else ""))

    def _table(self) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        with self._lock:
            for name, (state, detail, since) in self._rows.items():
                settled = state in {"ready", "done", "stopped"}
                seconds = (since - self._started) if settled else (now - since)
                style = _STYLES.get(state, "green" if settled else "yellow")
                text = Text(detail[:100], style="dim")
                table.add_row(name, Text(state, style=style), Text(f"{seconds:.1f} s", justify="right"), text)
        return table
