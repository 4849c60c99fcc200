"""Entry point of the preprocessing image: `python main.py preprocess --request R --result S`."""

from __future__ import annotations

from airloom.contract import Stage, StageRequest, StageResult, run_stage_main


def preprocess(request: StageRequest) -> StageResult:
    from preprocessing.stage import preprocess as run

    return run(request)


if __name__ == "__main__":
    raise SystemExit(run_stage_main({Stage.PREPROCESS: preprocess}))
