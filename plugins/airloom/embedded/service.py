"""What the supervisor has to know of a child process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Service:
    """One child process of the embedded platform.

    Attributes:
        name: unique; also the name of its log file.
        command: program and arguments.
        env: added to a small base environment (PATH, HOME, LANG, certificates); nothing else is inherited.
        cwd: its working directory, made if missing.
        ports: that it listens on, checked to be free before anything starts.
        depends_on: names of services that must be ready before it starts, and stop after it.
        prepare: called before each start; makes folders and configuration files, and is idempotent.
        probe: raises while the service is not ready. It does what a client does: writes or reads for real.
        start_timeout_seconds: from start to a probe that passes; more counts as a failed start.
        stop_signal: sent to the process group; SIGKILL follows after `grace_seconds`.
        urls: name -> address to show to people, such as `UI`.
        metrics_url: where it can be scraped in Prometheus format, if it can.
    """

    name: str
    command: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    depends_on: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None
    probe: Callable[[], None] = lambda: None
    start_timeout_seconds: float = 90.0
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0
    urls: Mapping[str, str] = field(default_factory=dict)
    metrics_url: str | None = None
