"""Makes the repo's packages importable from wherever pytest is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from process import ServingProcess  # noqa: E402
from tiny import make_release  # noqa: E402


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingProcess]:
    """One serving process that a module's tests share; 64 KiB is the most that it takes."""
    folder = tmp_path_factory.mktemp("serving")
    bundle = make_release(folder / "releases")
    with ServingProcess(folder, bundle, max_upload_bytes=65536) as process:
        yield process
