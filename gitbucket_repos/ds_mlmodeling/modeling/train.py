"""The train stage: learn, keep the best epoch, build the artifact and log it."""

from __future__ import annotations

import time

from airloom.contract import (
    DataCard,
    Output,
    Stage,
    StageInputError,
    StageRequest,
    StageResult,
    sha256_json,
    sha256_tree,
)
from airloom.contract.card import CARD_FILE
from modeling import plots
from modeling.artifact import build_artifact
from modeling.data import load_examples, model_config
from modeling.fit import Training
from modeling.params import TrainParams
from modeling.seeding import prepare
from modeling.tracking import open_tracker


def train(request: StageRequest) -> StageResult:
    """Train the model that `request` asks for. Equal data, parameters, code and seed give equal weights."""
    started_at = time.time()
    params = TrainParams.of(request.params)
    device = prepare(request.seed)
    if "dataset" not in request.inputs:
        raise StageInputError(f"no input 'dataset' in the request; it has {sorted(request.inputs)}")
    dataset = request.inputs["dataset"]
    config = model_config(dataset, width=params.width)
    training_rows = load_examples(dataset, "train", config)
    validation_rows = load_examples(dataset, "validation", config)
    fingerprint = sha256_json(
        {"commit": request.commit, "data": sha256_tree(dataset), "seed": request.seed, "params": params.model_dump()}
    )
    print(f"training on {device} with {len(training_rows):,} rows of {len(config.classes)} classes", flush=True)

    with open_tracker(request) as tracker:
        logged = params.model_dump() | {"seed": request.seed, "device": device.type, "rows": len(training_rows)}
        tracker.log_params(logged)
        if {"data_tag", "data_md5"} <= request.facts.keys():
            card = DataCard.read(dataset / CARD_FILE)
            tracker.log_data_version(tag=request.facts["data_tag"], md5=request.facts["data_md5"], card=card)
        checkpoints = request.outputs["checkpoints"]
        checkpoints.mkdir(parents=True, exist_ok=True)
        training = Training(
            config=config,
            params=params,
            seed=request.seed,
            device=device,
            fingerprint=fingerprint,
            checkpoints=checkpoints,
            on_epoch=lambda figures: tracker.log_metrics(figures, step=int(figures["epoch"])),
        )
        state = training.fit(training_rows, validation_rows)
        for figures in state.history:  # those that a killed try could not deliver; the others are known
            tracker.log_metrics(figures, step=int(figures["epoch"]))

        model = request.outputs["model"]
        # Nothing that differs between two runs of the same training: equal runs give an equal digest.
        facts = {"pipeline": request.pipeline, "commit": request.commit, "training": fingerprint}
        if "data_md5" in request.facts:
            facts["data_md5"] = request.facts["data_md5"]
        build_artifact(model, config=config, weights=state.best_network, facts=facts)
        digest = sha256_tree(model)
        curve = checkpoints / "learning_curve.png"
        plots.learning_curve(curve, state.history, state.best_epoch)
        tracker.log_file(curve, "training")
        uri = tracker.log_model(model, name=request.pipeline, digest=digest, params=logged)

    best = state.history[state.best_epoch - 1]
    return StageResult(
        stage=Stage.TRAIN,
        status="ok",
        outputs={"model": Output.of(model), "checkpoints": Output.of(checkpoints)},
        metrics={
            **{name: best[name] for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")},
            "best_epoch": state.best_epoch,
            "epochs": state.epoch,
            "seconds_per_epoch": sum(row["epoch_seconds"] for row in state.history) / len(state.history),
        },
        facts={"model_digest": digest, "device": device.type} | ({"model_uri": uri} if uri else {}),
        started_at=started_at,
        finished_at=time.time(),
    )
