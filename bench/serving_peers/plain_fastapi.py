"""Plain FastAPI, as its documentation shows it: a `def` endpoint, which FastAPI runs in its thread pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI

from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items

_, predictor = load_predictor(Path(os.environ["BENCH_MODEL"]))
app = FastAPI()


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/predict")
def predict(content: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    return predict_items(predictor, [content])[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), access_log=False, log_level="warning")
