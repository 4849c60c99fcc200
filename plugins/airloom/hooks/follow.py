"""Runs a program and hands on what it says while it runs."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence


def follow(
    command: Sequence[str],
    environment: Mapping[str, str],
    on_line: Callable[[str], None],
    *,
    timeout_seconds: float,
    errors_too: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, handing on each line of its output at once; raises as `subprocess.run` does.

    Args:
        errors_too: whether its standard error is handed on among the output, in place of being kept apart.
    """
    lines: list[str] = []
    # Errors to a file: a pipe that nobody reads meanwhile would fill up and stop the program.
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors_too else errors,
            text=True,
            errors="replace",
        ) as process:
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(timeout_seconds, end)
            timer.start()
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    on_line(line.rstrip())
                process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(command, timeout_seconds)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, "".join(lines), errors.read())
