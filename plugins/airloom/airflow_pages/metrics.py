"""What the ledger knows, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from airloom.hooks.ledger import DURATION_BUCKETS_SECONDS, Ledger

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DATASET_FIGURES = ("size_bytes", "files")


def render_metrics(ledger: Ledger) -> bytes:
    """All metrics of pipelines, tasks and gates.

    Raises:
        UnavailableError: the ledger cannot be read.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            return collect(ledger)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


def collect(ledger: Ledger) -> Iterator[Metric]:
    """The metric families, made from the ledger's aggregates."""
    yield _durations(ledger)
    yield _counter(
        "airloom_task_attempts", "Tries of tasks by outcome.", ("pipeline", "task", "state"), ledger.task_counts()
    )
    yield _counter(
        "airloom_stage_cache",
        "Stages that reused or made a result.",
        ("pipeline", "stage", "cache"),
        ledger.cache_counts(),
    )
    yield _counter("airloom_gate_verdicts", "Decisions of the gate.", ("pipeline", "verdict"), ledger.verdict_counts())
    yield _gauge("airloom_runs", "Runs by state.", ("pipeline", "state"), ledger.run_counts())
    yield _gauge(
        "airloom_last_success_timestamp_seconds",
        "When a run of the pipeline last ended well.",
        ("pipeline",),
        [(pipeline, at.timestamp()) for pipeline, at in sorted(ledger.last_success().items())],
    )
    yield from _latest(ledger)


def _durations(ledger: Ledger) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(
        "airloom_task_duration_seconds", "Wall time of ended tries.", labels=("pipeline", "task", "state")
    )
    for row in ledger.durations():
        bounds = [(str(bound), count) for bound, count in zip(DURATION_BUCKETS_SECONDS, row.buckets, strict=True)]
        family.add_metric([row.pipeline, row.task, row.state], [*bounds, ("+Inf", row.count)], sum_value=row.seconds)
    return family


def _latest(ledger: Ledger) -> Iterator[Metric]:
    """Figures of the latest try: the dataset's size, and what the gate decided on."""
    dataset, gate, stage = [], [], []
    for outcome in ledger.latest_values():
        for name, value in sorted(outcome.values.items()):
            if outcome.task == "version" and name in DATASET_FIGURES:
                dataset.append((outcome.pipeline, name, value))
            elif outcome.task == "gate":
                model, _, metric = name.rpartition("champion.")
                gate.append(
                    (outcome.pipeline, "champion" if model or "champion." in name else "candidate", metric, value)
                )
            elif outcome.task in {"preprocess", "train", "evaluate"}:
                stage.append((outcome.pipeline, outcome.task, name, value))
    yield _gauge("airloom_dataset", "The latest data version.", ("pipeline", "figure"), dataset)
    yield _gauge("airloom_gate_metric", "What the gate decided on.", ("pipeline", "model", "metric"), gate)
    yield _gauge("airloom_stage_metric", "Figures of the latest stage.", ("pipeline", "stage", "metric"), stage)


def _counter(name: str, text: str, labels: tuple[str, ...], rows: Any) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for *values, count in rows:
        family.add_metric([str(value) for value in values], count)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...], rows: Any) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=labels)
    for *values, number in rows:
        family.add_metric([str(value) for value in values], number)
    return family
