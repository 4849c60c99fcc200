"""LitServe with batching, as its documentation shows it."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import litserve
import numpy as np

from airloom.contract.model import load_predictor


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        _, self.predictor = load_predictor(Path(os.environ["BENCH_MODEL"]))

    def decode_request(self, request: dict[str, str]) -> Any:
        return self.predictor.transform(self.predictor.decode(base64.b64decode(request["image"])))

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.predictor.predict(x)

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        return self.predictor.encode(output)


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=16, batch_timeout=0.005), accelerator="cpu")
    port = int(os.environ["BENCH_PORT"])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning", access_log=False)
