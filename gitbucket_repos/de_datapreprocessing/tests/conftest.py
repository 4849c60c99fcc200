"""Raw files and requests for the tests of this repo; puts the repo on the import path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from preprocess_samples import Preprocess, png

from airloom.contract import Stage, StageRequest, StageResult


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Raw files: 60 pictures under each of three labels."""
    folder = tmp_path / "raw"
    for number in range(180):
        path = folder / "abc"[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


@pytest.fixture
def preprocess(raw: Path, tmp_path: Path) -> Preprocess:
    """Run the stage on `raw` and return its result; keywords change the request."""
    from preprocessing.stage import preprocess as run

    def on_raw(name: str = "first", **changes: Any) -> StageResult:
        outputs = {"dataset": tmp_path / name / "dataset", "rejected": tmp_path / name / "rejected"}
        request = StageRequest(
            pipeline="test",
            run_id="run",
            stage=Stage.PREPROCESS,
            commit="0" * 40,
            inputs={"folder": raw},
            outputs=outputs,
            seed=7,
        )
        return run(request.model_copy(update=changes))

    return on_raw
