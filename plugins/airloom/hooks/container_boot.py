"""The first program of a stage's container, handed to its Python as text: it must need nothing but Python itself.

    python3 -c TEXT TIMEOUT_SECONDS GRACE_SECONDS COMMAND…

It reads the private environment from a file and deletes it, holds the inputs that come from the cache volume against
their MD5s, runs the command, holds it to its time whether or not
anybody waits for the container, and notes how it ended. What it does not live to note, the engine knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

WORK = "/airloom/work"
CACHE = "/airloom-cache/"
DAMAGED_CODE = 75  # EX_TEMPFAIL: the next try may do better
OOM_FILES = ("/sys/fs/cgroup/memory/memory.oom_control", "/sys/fs/cgroup/memory.events")
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


def oom_kills() -> int:
    """How many processes of the container the kernel has ended for want of memory; 0 where it doesn't count them.

    The engine hears of them apart from the container's end, and where it hears that first, it never says so.
    """
    for name in OOM_FILES:
        try:
            with open(name, encoding="ascii") as file:  # noqa: PTH123
                counts = dict(line.split() for line in file)
            return int(counts["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0


def damaged(folder: str) -> list[str]:
    """The objects of the cache volume that the inputs lead to and that are not what their names say."""
    found = {
        os.readlink(entry)  # noqa: PTH115
        for parent, _, files in os.walk(folder)
        for entry in (f"{parent}/{file}" for file in files)
        if os.path.islink(entry)  # noqa: PTH114
    }
    objects = sorted(path for path in found if path.startswith(CACHE))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [path for path, whole in zip(objects, pool.map(is_whole, objects)) if not whole]  # noqa: B905


def is_whole(path: str) -> bool:
    """Whether the object's bytes have the MD5 that it is named by."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            while piece := file.read(2**20):
                digest.update(piece)
    except OSError:
        return False
    return digest.hexdigest() == "".join(path.split("/")[-2:])


def main(timeout_seconds: float, grace_seconds: float, command: list[str]) -> int:
    """Run the command; the container's exit code."""
    path = f"{WORK}/environment.json"
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        private = json.load(file)
    os.unlink(path)  # noqa: PTH108
    lost = damaged(f"{WORK}/inputs")
    if lost:
        sys.stderr.write(f"damaged in the cache volume: {', '.join(lost[:3])} ({len(lost)} objects)\n")
        note_end({"damaged": lost})
        return DAMAGED_CODE
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
    note_end(
        {
            "damaged": [],
            "timed_out": timed_out,
            "code": code,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "peak_memory_bytes": peak_memory_bytes(),
            "oom_kills": oom_kills(),
        }
    )
    return code if code >= 0 else 128 - code


def note_end(note: dict[str, object]) -> None:
    """Leave it where the runner looks, whole or not at all."""
    with open(f"{WORK}/exit.json.new", "w", encoding="ascii") as out:  # noqa: PTH123
        json.dump(note, out)
    os.replace(f"{WORK}/exit.json.new", f"{WORK}/exit.json")  # noqa: PTH105


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
