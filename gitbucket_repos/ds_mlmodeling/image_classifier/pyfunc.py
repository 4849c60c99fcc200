"""Lets `mlflow.pyfunc.load_model` load the artifact. Needs no MLflow itself."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airloom.contract.predictor import predict_items
from image_classifier.predictor import ImageClassifier, load


class PyfuncModel:
    """Takes what MLflow hands over: a list of picture bytes, or a table whose first column holds them."""

    def __init__(self, predictor: ImageClassifier) -> None:
        self.predictor = predictor

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        contents: Iterable[bytes] = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return predict_items(self.predictor, [bytes(content) for content in contents])


def _load_pyfunc(folder: str) -> PyfuncModel:
    """The function that `loader_module` in MLmodel stands for."""
    return PyfuncModel(load(Path(folder)))
