"""A model with fixed weights whose answers are known exactly, and releases of it as the platform lays them out."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from airloom.contract import Release, sha256_tree

SIGNATURE = b"\x89PNG\r\n\x1a\n"
WEIGHTS = [[1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1]]
FAILS, SLEEPS, SPOILS_BATCH = 255, 254, 253
ASLEEP, AWAKE = "asleep", "awake"  # files beside the model: it writes the one and sleeps until there is the other

CODE = """
import json
import time

import numpy as np

from airloom.contract.predictor import InputRejectedError

SIGNATURE = bytes.fromhex("89504e470d0a1a0a")


class Tiny:
    def __init__(self, folder):
        values = json.loads((folder / "weights" / "weights.json").read_text())
        self.weights = np.array(values["weights"], dtype=np.float32)
        self.bundle = folder.parent

    def decode(self, content):
        if not content.startswith(SIGNATURE):
            raise InputRejectedError("this is no picture")
        if len(content) < 12:
            raise InputRejectedError(f"the picture is truncated: {len(content)} bytes of 12")
        return content[8:12]

    def transform(self, sample):
        return np.frombuffer(sample, dtype=np.uint8).astype(np.float32)

    def predict(self, batch):
        if 254 in batch[:, 0]:
            (self.bundle / "asleep").touch()
            until_awake(self.bundle)
        if 253 in batch[:, 0] and len(batch) > 1:
            raise RuntimeError("secret: /etc/inside")
        if 255 in batch[:, 0]:
            raise RuntimeError("secret: /etc/inside")
        return batch @ self.weights

    def encode(self, output):
        return {"label": "abc"[int(output.argmax())], "scores": [float(v) for v in output]}

    def embed(self, batch):
        return batch

    def explain(self, sample):
        return SIGNATURE + b"explained" + sample


def until_awake(bundle):
    deadline = time.monotonic() + 60
    while not (bundle / "awake").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def load(folder):
    return Tiny(folder)
"""


def picture(*values: int, padding: int = 0) -> bytes:
    """What the model takes: a signature, four numbers, and whatever makes it larger."""
    return SIGNATURE + bytes(values) + b"\0" * padding


def scores(*values: int, factor: int = 1) -> list[float]:
    """What it has to answer."""
    return [float(factor * sum(v * w[j] for v, w in zip(values, WEIGHTS, strict=True))) for j in range(3)]


def make_release(
    root: Path, version: str = "1.0.0", *, pipeline: str = "tiny", factor: int = 1, code: str = CODE
) -> Path:
    """Write a release bundle and give its folder: `<root>/<pipeline>/<version>`."""
    bundle = root / pipeline / version
    model = bundle / "model"
    (model / "code" / "tiny_model").mkdir(parents=True)
    (model / "code" / "tiny_model" / "__init__.py").write_text(code)
    (model / "weights").mkdir()
    weights = [[factor * w for w in row] for row in WEIGHTS]
    (model / "weights" / "weights.json").write_text(json.dumps({"weights": weights}))
    card = {
        "entry": "tiny_model:load",
        "packages": ["tiny_model"],
        "task": "classification",
        "classes": ["a", "b", "c"],
        "media_types": ["image/png"],
    }
    (model / "model.json").write_text(json.dumps(card))
    release = Release(
        pipeline=pipeline,
        version=version,
        created_at=datetime.now(UTC),
        run_id="manual__2026",
        model_name=pipeline,
        model_version=str(factor),
        model_uri="models:/m-tiny",
        model_digest=sha256_tree(model),
        mlflow_run_id="0" * 32,
        data_tag=f"{pipeline}/CV_first_0123abcd_DV_20261121T000000000Z",
        data_md5="0" * 32 + ".dir",
        serving_repo="ds_modelserving",
        serving_commit="0" * 40,
        environment="0" * 64,
        plan="s3://airloom/runs/tiny/plan.json",
        lineage={"ds_mlmodeling": "1" * 40},
    )
    release.write(bundle / "release.json")
    return bundle
