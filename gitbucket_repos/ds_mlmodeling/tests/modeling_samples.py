"""A small dataset that a small network learns in seconds, and requests on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from airloom.contract import DataCard, Stage, StageRequest
from airloom.contract.pictures import encode_png
from airloom.contract.shards import write_shards

REPO = Path(__file__).parent.parent
CLASSES = ["box", "flat", "upright"]
SIZE = 16
PARAMS = {"epochs": 12, "batch_size": 16, "width": 4, "learning_rate": 0.01}


def picture(label: str, seed: int) -> bytes:
    """A bright box, or a flat or upright bar, on a noisy ground."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 120, (SIZE, SIZE))
    y, x = random.integers(2, 7, 2)
    height, width = {"box": (6, 6), "flat": (2, 8), "upright": (8, 2)}[label]
    pixels[y : y + height, x : x + width] = 255
    return encode_png(pixels.astype(np.uint8))


def write_dataset(folder: Path, *, rows: int = 120, classes: list[str] = CLASSES) -> Path:
    """As the preprocess stage writes one: two thirds train, one sixth validation, one sixth test."""
    parts = {"train": rows * 2 // 3, "validation": rows // 6, "test": rows // 6}
    first = 0
    for split, count in parts.items():
        numbers = range(first, first + count)
        labels = [classes[number % len(classes)] for number in numbers]
        columns = {
            "id": [f"{number:016x}" for number in numbers],
            "image": [picture(label, number) for label, number in zip(labels, numbers, strict=True)],
            "label": labels,
        }
        write_shards(folder, split, pa.table(columns), rows_per_shard=40)
        first += count
    statistics = {"image_size": float(SIZE), "pixel_mean": 0.33, "pixel_std": 0.27}
    DataCard(rows=parts, classes=sorted(classes), statistics=statistics).write(folder / "card.json")
    return folder


def request_for(stage: Stage, inputs: dict[str, Path], outputs: Path, **changes: Any) -> StageRequest:
    names = {Stage.TRAIN: ("checkpoints", "model"), Stage.EVALUATE: ("report",)}[stage]
    request = StageRequest(
        pipeline="shapes",
        run_id="run",
        stage=stage,
        commit="0" * 40,
        params=PARAMS if stage is Stage.TRAIN else {},
        inputs=inputs,
        outputs={name: outputs / name for name in names},
        seed=7,
    )
    return request.model_copy(update=changes)


def start_stage(request: StageRequest, folder: Path) -> subprocess.Popen[str]:
    """Start a stage as a runner does; its result goes to `folder`/result.json."""
    request.write(folder / "request.json")
    command = [sys.executable, "main.py", request.stage.value, "--request", str(folder / "request.json")]
    return subprocess.Popen(
        [*command, "--result", str(folder / "result.json")],
        cwd=REPO,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
