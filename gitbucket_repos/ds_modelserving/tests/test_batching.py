"""The batcher and the engine without HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny import FAILS, SPOILS_BATCH, make_release, picture, scores

from airloom.contract.journal import read_entries
from airloom.contract.predictor import predict_items
from serving.batcher import MicroBatcher, QueueFullError, StoppedError
from serving.engine import Engine, Job
from serving.journal import JournalWriter
from serving.metrics import Metrics
from serving.problems import ProblemError
from serving.served import ServedHolder


class Held:
    """Work that waits until it is let go, and notes the sizes of its batches."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.busy = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, jobs: Sequence[int]) -> list[int | Exception]:
        self.busy.set()
        self.go.wait(10)
        self.sizes.append(len(jobs))
        return [ValueError(job) if job < 0 else job * 2 for job in jobs]


async def started(work: Held, *, max_batch: int = 4, max_queue: int = 100) -> MicroBatcher[int, int]:
    batcher: MicroBatcher[int, int] = MicroBatcher(work, max_batch=max_batch, max_queue=max_queue)
    batcher.start()
    return batcher


async def test_takes_what_is_queued_and_waits_for_nothing() -> None:
    work = Held()
    batcher = await started(work)
    first = batcher.submit(1)
    await asyncio.to_thread(work.busy.wait, 10)
    rest = [batcher.submit(n) for n in range(2, 9)]
    work.go.set()
    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert work.sizes == [1, 4, 3]
    await asyncio.to_thread(batcher.stop)


async def test_an_error_hits_its_own_job_alone() -> None:
    work = Held()
    work.go.set()
    batcher = await started(work)
    outcomes = await asyncio.gather(*(batcher.submit(n) for n in (1, -5, 3)), return_exceptions=True)
    assert [outcomes[0], outcomes[2]] == [2, 6]
    assert isinstance(outcomes[1], ValueError)
    await asyncio.to_thread(batcher.stop)


async def test_a_full_queue_refuses_and_a_stopped_batcher_finishes_first() -> None:
    work = Held()
    batcher = await started(work, max_queue=2)
    first = batcher.submit(1)
    await asyncio.to_thread(work.busy.wait, 10)
    waiting = [batcher.submit(2), batcher.submit(3)]
    with pytest.raises(QueueFullError):
        batcher.submit(4)
    stopped = asyncio.create_task(asyncio.to_thread(batcher.stop))
    work.go.set()
    await stopped
    assert await asyncio.gather(first, *waiting) == [2, 4, 6]
    with pytest.raises(StoppedError):
        batcher.submit(5)


async def test_work_that_raises_fails_its_batch_and_the_thread_lives() -> None:
    def work(jobs: Sequence[int]) -> list[int | Exception]:
        if 0 in jobs:
            raise RuntimeError("all of it")
        return list(jobs)

    batcher: MicroBatcher[int, int] = MicroBatcher(work, max_batch=4, max_queue=4)
    batcher.start()
    with pytest.raises(RuntimeError, match="all of it"):
        await batcher.submit(0)
    assert await batcher.submit(1) == 1
    assert await batcher.call(lambda: "called") == "called"
    await asyncio.to_thread(batcher.stop)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(tmp_path)


def make_engine(folder: Path, **journal: int) -> Engine:
    bundle = make_release(folder / "releases")
    holder = ServedHolder(
        pipeline="tiny",
        model=bundle / "model",
        release_file=bundle / "release.json",
        releases_root=folder / "releases",
        state_dir=folder / "journal",
        threads=1,
    )
    holder.load_first()
    writer = JournalWriter(folder / "journal", max_bytes=journal.get("max_bytes", 10**9))
    return Engine(holder, writer, Metrics("tiny"))


def job(*values: int) -> Job:
    return Job(picture(*values), "image/png", 0.0)


def test_a_batch_gives_what_each_gives_alone(engine: Engine) -> None:
    inputs = [(n, 2 * n, 3 * n % 256, 250 - n) for n in range(32)]
    together = [json.loads(answer) for answer in engine.predict([job(*values) for values in inputs])]  # type: ignore[arg-type]
    alone = [json.loads(engine.predict([job(*values)])[0]) for values in inputs]  # type: ignore[arg-type]
    assert [one["scores"] for one in together] == [one["scores"] for one in alone] == [scores(*v) for v in inputs]
    assert len({one["id"] for one in together + alone}) == 64


def test_what_the_model_is_fed_is_what_the_predictor_makes_of_the_bytes(engine: Engine) -> None:
    """Training and serving share decode and transform: nothing is added on the way."""
    served = engine._holder.current
    assert served is not None
    fed: list[np.ndarray] = []
    predict = served.predictor.predict
    served.predictor.predict = lambda batch: (fed.append(batch.copy()), predict(batch))[1]  # type: ignore[method-assign]
    contents = [picture(1, 2, 3, 4), picture(250, 0, 9, 1)]
    answers = engine.predict([Job(content, "image/png", 0.0) for content in contents])
    expected = np.stack([served.predictor.transform(served.predictor.decode(content)) for content in contents])
    assert len(fed) == 1
    assert fed[0].dtype == expected.dtype
    np.testing.assert_array_equal(fed[0], expected)
    outputs = predict_items(served.predictor, contents)
    assert [{k: json.loads(a)[k] for k in o} for a, o in zip(answers, outputs, strict=True)] == outputs  # type: ignore[arg-type]


def test_bad_rows_leave_the_others_alone(engine: Engine) -> None:
    outcomes = engine.predict(
        [job(1, 0, 0, 0), Job(b"no picture", "image/png", 0.0), job(FAILS, 0, 0, 0), job(SPOILS_BATCH, 0, 0, 0)]
    )
    assert json.loads(outcomes[0])["scores"] == [1.0, 0.0, 0.0]  # type: ignore[arg-type]
    assert json.loads(outcomes[3])["scores"] == [253.0, 0.0, 0.0]  # type: ignore[arg-type]
    assert [outcome.status for outcome in outcomes[1:3] if isinstance(outcome, ProblemError)] == [422, 500]


def test_every_answer_is_in_the_journal_before_it_is_given(engine: Engine) -> None:
    contents = [picture(n, 1, 2, 3) for n in range(5)]
    answers = [json.loads(a) for a in engine.predict([Job(c, "image/png", 0.0) for c in contents])]  # type: ignore[arg-type]
    with engine._journal.current.open("rb") as file:
        entries = [entry for entry, _ in read_entries(file)]
    assert [entry.id for entry in entries] == [answer["id"] for answer in answers]
    assert [entry.content for entry in entries] == contents
    assert [(entry.batch_size, entry.batch_index) for entry in entries] == [(5, n) for n in range(5)]
    assert entries[2].output == {"label": answers[2]["label"], "scores": answers[2]["scores"]}


def test_a_full_journal_does_not_stop_answers_but_they_say_so(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, max_bytes=600)
    first, *_, last = [json.loads(engine.predict([job(n, 0, 0, 0)])[0]) for n in range(4)]  # type: ignore[arg-type]
    assert "logged" not in first
    assert (last["logged"], last["scores"]) == (False, [3.0, 0.0, 0.0])
    assert b"airloom_serving_unlogged_predictions_total" in engine._metrics.render()
