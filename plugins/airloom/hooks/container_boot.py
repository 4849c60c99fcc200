"""The first program of a stage's container, handed to its Python as text: it must need nothing but Python itself.

    python3 -c TEXT TIMEOUT_SECONDS GRACE_SECONDS COMMAND…

It reads the private environment from a file and deletes it, runs the command, holds it to its time whether or not
anybody waits for the container, and notes how it ended. What it does not live to note, the engine knows.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from types import FrameType

WORK = "/airloom/work"
PEAK_FILES = ("/sys/fs/cgroup/memory/memory.max_usage_in_bytes", "/sys/fs/cgroup/memory.peak")


def peak_memory_bytes() -> int:
    """Of all processes of the container; of the largest one where the kernel doesn't count that."""
    for name in PEAK_FILES:
        try:
            with open(name, encoding="ascii") as file:  # noqa: PTH123
                return int(file.read())
        except (OSError, ValueError):
            continue
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main(timeout_seconds: float, grace_seconds: float, command: list[str]) -> int:
    """Run the command; the container's exit code."""
    path = f"{WORK}/environment.json"
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        private = json.load(file)
    os.unlink(path)  # noqa: PTH108
    child = subprocess.Popen([sys.executable, *command], env={**os.environ, **private})

    def hand_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    timed_out = False
    try:
        code = child.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        child.terminate()
        try:
            code = child.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    note = {
        "timed_out": timed_out,
        "code": code,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    with open(f"{WORK}/exit.json.new", "w", encoding="ascii") as out:  # noqa: PTH123
        json.dump(note, out)
    os.replace(f"{WORK}/exit.json.new", f"{WORK}/exit.json")  # noqa: PTH105
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
