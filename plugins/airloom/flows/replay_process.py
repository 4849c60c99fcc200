"""Predict once: `python -m airloom.flows.replay_process MODEL SIZE INDEX INPUT ANSWER`; ANSWER becomes JSON.

A container gets this file's text: it may import nothing but the contract.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items


def main(model: Path, size: int, index: int, content: Path, answer: Path) -> None:
    """Predict a batch that holds the item `size` times, and write what is at place `index`.

    Numeric libraries choose their way by the batch's shape, and another way may round the last bit differently.
    """
    _, predictor = load_predictor(model)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # as serving does
    outputs = predict_items(predictor, [content.read_bytes()] * size)
    answer.write_text(json.dumps(outputs[index], allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
