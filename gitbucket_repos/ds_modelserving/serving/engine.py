"""From bytes to answers: what the model's thread does with a batch."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airloom.contract.journal import encode_entry
from airloom.contract.prediction_id import new_unique
from airloom.contract.predictor import InputRejectedError
from serving.journal import JournalWriter
from serving.metrics import Metrics
from serving.problems import internal, not_ready, unusable
from serving.served import Served, ServedHolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """One request for a prediction. `arrived` is `time.perf_counter()` at its headers."""

    content: bytes
    media_type: str
    arrived: float


@dataclass(slots=True)
class _Output:
    """What the model said to one job, and in which batch."""

    json: str
    label: object
    batch_size: int
    batch_index: int


class Engine:
    """Predicts batches with whatever release answers at that moment, and keeps each answer in the journal."""

    def __init__(self, holder: ServedHolder, journal: JournalWriter, metrics: Metrics) -> None:
        self._holder = holder
        self._journal = journal
        self._metrics = metrics

    def predict(self, jobs: Sequence[Job]) -> list[bytes | Exception]:
        """The JSON answer of each job, or the error that is its own."""
        served = self._holder.current
        if served is None:
            return [not_ready(self._holder.reason)] * len(jobs)
        self._metrics.batch_size.observe(len(jobs))
        outcomes: list[Any] = [None] * len(jobs)
        by_shape: defaultdict[tuple[int, ...], list[tuple[int, NDArray[np.float32]]]] = defaultdict(list)
        for index, job in enumerate(jobs):
            try:
                row = served.predictor.transform(served.predictor.decode(job.content))
            except Exception as error:
                outcomes[index] = _problem(error)
            else:
                by_shape[row.shape].append((index, row))
        for rows in by_shape.values():
            self._predict_rows(served, rows, outcomes)
        self._record(served, jobs, outcomes)
        return outcomes

    def explain(self, content: bytes) -> bytes:
        """A PNG picture of what the model looked at. Raises `ProblemError`."""
        served = self._holder.current
        if served is None:
            raise not_ready(self._holder.reason)
        try:
            return served.predictor.explain(served.predictor.decode(content))
        except Exception as error:
            raise _problem(error) from error

    def _predict_rows(self, served: Served, rows: list[tuple[int, NDArray[np.float32]]], outcomes: list[Any]) -> None:
        """Fill in the outputs of rows of one shape; one that fails alone fails alone."""
        import numpy as np

        try:
            with _inference_mode():
                outputs = served.predictor.predict(np.stack([row for _, row in rows]))
        except Exception as error:
            if len(rows) == 1:
                outcomes[rows[0][0]] = _problem(error)
                return
            for row in rows:
                self._predict_rows(served, [row], outcomes)
            return
        for place, ((index, _), output) in enumerate(zip(rows, outputs, strict=True)):
            try:
                value = served.predictor.encode(output)
                text = json.dumps(value, allow_nan=False, separators=(",", ":"))
                outcomes[index] = _Output(text, value.get("label"), len(rows), place)
            except Exception as error:
                outcomes[index] = _problem(error)

    def _record(self, served: Served, jobs: Sequence[Job], outcomes: list[Any]) -> None:
        """Give each output its id, keep all of them with one write, and turn them into answers."""
        pieces: list[bytes] = []
        answers: list[tuple[int, str, str]] = []
        release = served.release
        prefix = f"{release.pipeline}-{release.version}-"
        names = f'"release":"{release.version}","model_version":"{release.model_version}"'
        answered_at, now = time.time(), time.perf_counter()
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                continue
            job = jobs[index]
            prediction_id = prefix + new_unique()
            pieces += encode_entry(
                prediction_id=prediction_id,
                pipeline=release.pipeline,
                release=release.version,
                answered_at=answered_at,
                latency_ms=round((now - job.arrived) * 1000, 3),
                input_sha256=hashlib.sha256(job.content).hexdigest(),
                output_json=outcome.json,
                media_type=job.media_type,
                batch_size=outcome.batch_size,
                batch_index=outcome.batch_index,
                content=job.content,
            )
            rest = "}" if outcome.json == "{}" else f",{outcome.json[1:]}"
            answers.append((index, f'{{"id":"{prediction_id}",{names}', rest))
            self._metrics.predicted(outcome.label)
        if not answers:
            return
        logged = self._journal.append(pieces)
        if not logged:
            self._metrics.unlogged.inc(len(answers))
        note = "" if logged else ',"logged":false'
        for index, head, rest in answers:
            outcomes[index] = f"{head}{note}{rest}".encode()


def _problem(error: Exception) -> Exception:
    if isinstance(error, InputRejectedError):
        return unusable(str(error))
    log.error("the model failed on a request", exc_info=error)
    return internal()


def _inference_mode() -> AbstractContextManager[Any]:
    """Torch's, when the model brought torch in: it drops the bookkeeping for gradients."""
    torch = sys.modules.get("torch")
    return torch.inference_mode() if torch is not None else nullcontext()
