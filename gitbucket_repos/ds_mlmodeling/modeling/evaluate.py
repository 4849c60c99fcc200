"""The evaluate stage: measure the candidate, and the champion on the same rows."""

from __future__ import annotations

import shutil
import time

from airloom.contract import DataCard, Output, Stage, StageInputError, StageRequest, StageResult
from airloom.contract.card import CARD_FILE
from airloom.contract.model import load_predictor
from modeling.report import predictions_digest, write_report
from modeling.scoring import Scored, score
from modeling.seeding import prepare
from modeling.tracking import open_tracker

SPLIT = "test"


def evaluate(request: StageRequest) -> StageResult:
    """Evaluate on the test split. The same model and data give the same figures to the last digit."""
    started_at = time.time()
    if request.params:
        raise StageInputError(f"stages.evaluate takes no parameters, found {sorted(request.params)}")
    missing = [name for name in ("dataset", "model") if name not in request.inputs]
    if missing:
        raise StageInputError(f"no input {' and '.join(missing)} in the request; it has {sorted(request.inputs)}")
    prepare(request.seed)
    dataset = request.inputs["dataset"]
    classes = DataCard.read(dataset / CARD_FILE).classes

    card, predictor = load_predictor(request.inputs["model"])
    scored = score(dataset, SPLIT, classes, card, predictor)
    figures = scored.metrics()
    _say("candidate", scored, figures)
    report = request.outputs["report"]
    shutil.rmtree(report, ignore_errors=True)
    write_report(report, scored, predictor)
    digest = predictions_digest(scored)

    if "champion" in request.inputs:
        champion = score(dataset, SPLIT, classes, *load_predictor(request.inputs["champion"]))
        champion_figures = champion.metrics()
        _say("champion", champion, champion_figures)
        figures |= {f"champion.{name}": value for name, value in champion_figures.items()}

    with open_tracker(request) as tracker:
        tracker.log_metrics(figures)
        tracker.log_folder(report, "report")
    return StageResult(
        stage=Stage.EVALUATE,
        status="ok",
        outputs={"report": Output.of(report)},
        metrics=figures,
        facts={"predictions_digest": digest, "rows": str(len(scored.ids))},
        started_at=started_at,
        finished_at=time.time(),
    )


def _say(who: str, scored: Scored, figures: dict[str, float]) -> None:
    text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{who} on {len(scored.ids):,} test rows: {text}", flush=True)
