"""How much room the embedded object store has: S3 itself has no question for it."""

from __future__ import annotations

import json
import shutil
import urllib.request
from contextlib import suppress

from airloom.settings import Settings

ROOM_NEEDED_BYTES = 32 * 2**20
STATUS_PORT = 1  # offset in AIRLOOM_INTERNAL_PORTS at which the embedded store tells how much room it has


def no_room(settings: Settings, bucket: str) -> str | None:
    """Why the embedded store cannot take more, in words; None when it could, or when nobody knows."""
    folder = settings.data_dir / "s3"
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < ROOM_NEEDED_BYTES:
            return f"{free // 2**20} MiB free on the disk of {folder}"
    address = f"http://{settings.bind_host}:{settings.internal_port(STATUS_PORT)}/dir/status"
    try:
        # Without a proxy that the environment may name: the address is this machine's.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=2) as answer:
            topology = json.load(answer)["Topology"]
        writable = [layout for layout in topology["Layouts"] if layout["collection"] == bucket and layout["writables"]]
        if topology["Free"] == 0 and not writable:
            return f"all {topology['Max']} volumes of its room are in use"
    except (OSError, ValueError, KeyError):
        pass
    return None
