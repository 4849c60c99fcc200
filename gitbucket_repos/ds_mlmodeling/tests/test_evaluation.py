"""The evaluate stage and its figures."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from modeling_samples import CLASSES, request_for, write_dataset

from airloom.contract import Stage, StageInputError, StageResult
from airloom.contract.model import load_predictor
from airloom.contract.predictor import predict_items
from airloom.contract.shards import read_split
from modeling import metrics
from modeling.evaluate import evaluate
from modeling.train import train


def test_figures_agree_with_scikit_learn() -> None:
    measured = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    labels = random.integers(0, 4, 300)
    probabilities = random.dirichlet(np.ones(4), 300).round(2) + 1e-3  # rounded, so that there are ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, 4)
    assert np.array_equal(confusion, measured.confusion_matrix(labels, predicted))
    f1 = metrics.per_class(confusion)["f1"].mean()
    assert f1 == pytest.approx(measured.f1_score(labels, predicted, average="macro"))
    assert metrics.log_loss(labels, probabilities) == pytest.approx(measured.log_loss(labels, probabilities))
    area = measured.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert metrics.auc_one_vs_rest(labels, probabilities) == pytest.approx(area)


def test_a_class_without_rows_counts_nothing_and_breaks_nothing() -> None:
    labels, probabilities = np.array([0, 1, 0]), np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.7, 0.3, 0]])
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), 3)
    assert metrics.per_class(confusion)["f1"].tolist() == [1, 1, 0]
    assert metrics.auc_one_vs_rest(labels, probabilities) == 1


def test_calibration_error_of_a_known_case() -> None:
    probabilities = np.array([[0.95, 0.05]] * 10)
    labels = np.array([0] * 5 + [1] * 5)
    curve = metrics.calibration(labels, probabilities)
    assert curve == [(pytest.approx(0.95), 0.5, 10)]
    assert metrics.calibration_error(curve) == pytest.approx(0.45)


def test_predictions_stand_beside_their_own_labels(evaluated: StageResult, dataset: Path, model: Path) -> None:
    rows = pq.read_table(evaluated.outputs["report"].path / "predictions.parquet").to_pylist()
    stored = read_split(dataset, "test").to_pylist()
    assert [(row["id"], row["label"]) for row in rows] == [(row["id"], row["label"]) for row in stored]
    _, predictor = load_predictor(model)
    assert [row["predicted"] for row in rows] == [
        predict_items(predictor, [row["image"]])[0]["label"] for row in stored
    ]
    hits = sum(row["label"] == row["predicted"] for row in rows)
    assert evaluated.metrics["accuracy"] == hits / len(rows)


def test_the_same_evaluation_gives_the_same_figures(
    evaluated: StageResult, dataset: Path, model: Path, tmp_path: Path
) -> None:
    again = evaluate(request_for(Stage.EVALUATE, {"dataset": dataset, "model": model}, tmp_path))
    assert again.metrics == evaluated.metrics
    assert again.facts == evaluated.facts


def test_reference_rows_give_the_answers_that_serving_must_give(evaluated: StageResult, model: Path) -> None:
    rows = json.loads((evaluated.outputs["report"].path / "reference.json").read_text())["rows"]
    assert len(rows) == 20  # all of them: the test split has no more
    _, predictor = load_predictor(model)
    for row in rows:
        assert predict_items(predictor, [base64.b64decode(row["image_base64"])])[0] == row["output"]
    ids = {
        row["id"]: row["label"]
        for row in pq.read_table(evaluated.outputs["report"].path / "predictions.parquet").to_pylist()
    }
    assert {ids[row["id"]] for row in rows[:3]} == set(CLASSES)


def test_the_report_has_its_pictures_and_tables(evaluated: StageResult) -> None:
    from PIL import Image

    folder = evaluated.outputs["report"].path
    for name in ("confusion_matrix.png", "calibration.png", "mistakes.png", "explanation.png"):
        with Image.open(folder / name) as shown:
            shown.load()
            assert min(shown.size) >= 100
    lines = (folder / "per_class.csv").read_text().splitlines()
    assert lines[0] == "label,rows,precision,recall,f1"
    assert [line.split(",")[0] for line in lines[1:]] == CLASSES


def test_the_champion_is_measured_on_the_same_rows(
    evaluated: StageResult, dataset: Path, model: Path, tmp_path: Path
) -> None:
    weak = train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, params={"epochs": 1, "width": 1}))
    inputs = {"dataset": dataset, "model": weak.outputs["model"].path, "champion": model}
    result = evaluate(request_for(Stage.EVALUATE, inputs, tmp_path))
    of_champion = {name: value for name, value in result.metrics.items() if name.startswith("champion.")}
    assert of_champion == {f"champion.{name}": value for name, value in evaluated.metrics.items()}
    assert result.metrics["accuracy"] < result.metrics["champion.accuracy"]


def test_a_champion_of_fewer_classes_is_measured_too(model: Path, tmp_path: Path) -> None:
    fewer = write_dataset(tmp_path / "fewer", classes=["flat", "upright"])
    champion = train(request_for(Stage.TRAIN, {"dataset": fewer}, tmp_path / "champion"))
    whole = write_dataset(tmp_path / "whole")
    inputs = {"dataset": whole, "model": model, "champion": champion.outputs["model"].path}
    result = evaluate(request_for(Stage.EVALUATE, inputs, tmp_path))
    assert 0.2 < result.metrics["champion.accuracy"] <= 2 / 3 + 0.05
    assert result.metrics["champion.log_loss"] > 5  # the class that it doesn't know


def test_a_missing_input_is_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(StageInputError, match="no input model"):
        evaluate(request_for(Stage.EVALUATE, {"dataset": dataset}, tmp_path))
