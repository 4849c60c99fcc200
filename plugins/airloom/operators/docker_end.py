"""What people are told of a container that did not end well."""

from __future__ import annotations

import signal

from airloom.hooks.runner import ExitReason, JobExit

_SIGNAL_BASE = 128  # shells and engines report a signal as exit code 128 + number
_NOT_FOUND = (126, 127)  # what shells, and the engine's first process, say of programs


def why_failed(ended: JobExit, *, memory_bytes: int | None, with_shell: bool) -> str:  # noqa: PLR0911 - one for each end
    """What was wrong, and what to do.

    Args:
        memory_bytes: the container's limit, if it has one.
        with_shell: whether the image's shell comes before the command.
    """
    if ended.reason is ExitReason.MEMORY_LIMIT:
        limit = f"its limit of {memory_bytes / 2**20:,.0f} MiB" if memory_bytes else "what the machine has"
        return (
            f"the container needed more memory than {limit}: the engine ended it, or one of its processes\n"
            "  -> raise mem_limit, or let it need less"
        )
    if ended.reason is ExitReason.STOPPED:
        return f"the container was stopped after {ended.seconds:g} s, as Airflow asked"
    if ended.reason is ExitReason.LOST:
        return "the container was removed while it ran, and not by this task\n  -> the next try starts it anew"
    missing = "is the command in the image, and executable?"
    if with_shell:
        missing += " private_environment is read by its /bin/sh; where there is none: private_environment_in='config'"
    if ended.reason is ExitReason.NOT_STARTED:
        return f"the container could not be started: {ended.detail}\n  -> {missing}"
    code = ended.exit_code or 0
    if code > _SIGNAL_BASE:
        otherwise = "the kernel did for want of memory" if code == _SIGNAL_BASE + signal.SIGKILL else "it crashed"
        return (
            f"the container ended with exit code {code} after {ended.seconds:g} s: signal {code - _SIGNAL_BASE}\n"
            f"  -> somebody ended it (docker stop or kill, a restart of the engine), or {otherwise}; see its log"
        )
    said = f"the container ended with exit code {code} after {ended.seconds:g} s"
    if code in _NOT_FOUND:
        return f"{said}, as for a program that cannot be started\n  -> see its log; {missing}"
    return f"{said}\n  -> see its log"
