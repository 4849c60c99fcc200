"""Predict once: `python -m airloom.flows.replay_process MODEL SIZE INDEX`, the input on standard input.

The last line of standard output is the prediction as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items


def main(model: Path, size: int, index: int) -> None:
    """Predict a batch that holds the item `size` times, and print the answer at place `index`."""
    content = sys.stdin.buffer.read()
    _, predictor = load_predictor(model)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # as serving does
    outputs = predict_items(predictor, [content] * size)
    sys.stdout.write("\n" + json.dumps(outputs[index], allow_nan=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
