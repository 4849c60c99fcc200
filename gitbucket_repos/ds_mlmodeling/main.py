"""Entry point of the training image: `python main.py {train,evaluate} --request R --result S`.

    train      learn from the dataset's train split, choose the epoch by the validation split
    evaluate   measure a model, and the champion beside it, on the test split that training never reads

Numeric libraries use as many threads as OMP_NUM_THREADS says; a GPU is used where there is one.
"""

from __future__ import annotations

from airloom.contract import Stage, StageRequest, StageResult, run_stage_main


def train(request: StageRequest) -> StageResult:
    from modeling.train import train as run

    return run(request)


def evaluate(request: StageRequest) -> StageResult:
    from modeling.evaluate import evaluate as run

    return run(request)


if __name__ == "__main__":
    raise SystemExit(run_stage_main({Stage.TRAIN: train, Stage.EVALUATE: evaluate}))
