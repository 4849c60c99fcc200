"""Write what an evaluation found: tables for machines, pictures for people."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from airloom.contract import sha256_json
from airloom.contract.predictor import Predictor, predict_items
from modeling import metrics, plots
from modeling.scoring import Scored

REFERENCE_ROWS = 20
SHOWN_MISTAKES = 32


def write_report(folder: Path, scored: Scored, predictor: Predictor) -> None:
    """Fill the folder: metrics.json, per_class.csv, predictions.parquet, reference.json and four pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    confusion = metrics.confusion_matrix(scored.labels, scored.predicted, len(scored.classes))
    curve = metrics.calibration(scored.labels, scored.probabilities)
    error = metrics.calibration_error(curve)
    _write_json(folder / "metrics.json", scored.metrics() | {"calibration_error": error, "rows": len(scored.ids)})
    _write_per_class(folder / "per_class.csv", scored, confusion)
    _write_predictions(folder / "predictions.parquet", scored)
    _write_json(folder / "reference.json", {"rows": _reference_rows(scored, predictor)})
    plots.confusion(folder / "confusion_matrix.png", confusion, scored.classes)
    plots.calibration(folder / "calibration.png", curve, error)
    wrong = np.flatnonzero(scored.labels != scored.predicted)
    plots.mistakes(folder / "mistakes.png", _surest_mistakes(scored, wrong, predictor), len(wrong), len(scored.ids))
    # What the model looked at where it was surest and right, for one row.
    surest = int(np.argmax(scored.probabilities.max(axis=1) * (scored.labels == scored.predicted)))
    (folder / "explanation.png").write_bytes(predictor.explain(predictor.decode(scored.images[surest])))


def predictions_digest(scored: Scored) -> str:
    """SHA-256 of the rows' ids and predicted labels: equal when two evaluations predict the same."""
    return sha256_json([[row, scored.classes[k]] for row, k in zip(scored.ids, scored.predicted.tolist(), strict=True)])


def _write_per_class(path: Path, scored: Scored, confusion: Any) -> None:
    figures = metrics.per_class(confusion)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "rows", *figures])
        for index, name in enumerate(scored.classes):
            writer.writerow(
                [name, int(confusion[index].sum()), *(f"{column[index]:.6f}" for column in figures.values())]
            )


def _write_predictions(path: Path, scored: Scored) -> None:
    names = np.array(scored.classes, dtype=object)
    table = pa.table(
        {
            "id": scored.ids,
            "label": names[scored.labels].tolist(),
            "predicted": names[scored.predicted].tolist(),
            "probability": scored.probabilities.max(axis=1),
            "probabilities": pa.array(scored.probabilities.tolist(), type=pa.list_(pa.float64())),
        }
    )
    pq.write_table(table, path)


def _reference_rows(scored: Scored, predictor: Predictor) -> list[dict[str, Any]]:
    """Rows with the answer that serving must give to them: classes by turns, within a class by id.

    Each is predicted alone, as one request is.
    """
    by_id = sorted(range(len(scored.ids)), key=lambda row: scored.ids[row])
    by_class = [[row for row in by_id if scored.labels[row] == number] for number in range(len(scored.classes))]
    turns = [rows[turn] for turn in range(REFERENCE_ROWS) for rows in by_class if turn < len(rows)]
    return [
        {
            "id": scored.ids[row],
            "image_base64": base64.b64encode(scored.images[row]).decode(),
            "media_type": "image/png",
            "output": predict_items(predictor, [scored.images[row]])[0],
        }
        for row in turns[:REFERENCE_ROWS]
    ]


def _surest_mistakes(scored: Scored, wrong: Any, predictor: Predictor) -> list[plots.Mistake]:
    confidence = scored.probabilities.max(axis=1)
    chosen = sorted(wrong, key=lambda row: (-confidence[row], scored.ids[row]))[:SHOWN_MISTAKES]
    return [
        plots.Mistake(
            pixels=predictor.decode(scored.images[row]),
            label=scored.classes[scored.labels[row]],
            predicted=scored.classes[scored.predicted[row]],
            probability=float(confidence[row]),
        )
        for row in chosen
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
