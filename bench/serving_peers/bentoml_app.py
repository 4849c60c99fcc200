"""BentoML with its adaptive batching."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import bentoml

from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items


@bentoml.service(traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Bench:
    def __init__(self) -> None:
        _, self.predictor = load_predictor(Path(os.environ["BENCH_MODEL"]))

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=2000)
    def predict(self, images: list[str]) -> list[dict[str, Any]]:
        return predict_items(self.predictor, [base64.b64decode(image) for image in images])
