"""Save the model as MLflow's models-from-code file wants it, for `mlflow models serve`."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc

from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items


class Bench(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        _, self.predictor = load_predictor(Path(os.environ["BENCH_MODEL"]))

    def predict(self, context: Any, model_input: list[str]) -> list[dict[str, Any]]:
        return predict_items(self.predictor, [base64.b64decode(image) for image in model_input])


if __name__ == "__main__":
    mlflow.pyfunc.save_model(sys.argv[1], python_model=str(Path(__file__)), pip_requirements=[])
else:
    mlflow.models.set_model(Bench())
