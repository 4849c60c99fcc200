"""What the ledger knows, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airloom.contract import Verdict
from airloom.hooks.ledger import DURATION_BUCKETS_SECONDS, Ledger, RunOutcome

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
RUN_ENDS = ("success", "failed")
TASK_ENDS = ("success", "failed", "skipped")
VERDICTS = tuple(Verdict)
CACHES = ("hit", "miss", "forced")
# A model that reports a figure for each of thousands of classes must not make a time series of each.
FIGURES_PER_STAGE = 200


def render_metrics(ledger: Ledger, addresses: Mapping[str, str] | None = None) -> bytes:
    """All metrics of pipelines, tasks and gates.

    Args:
        addresses: of what people open, by service: dashboards make their links of them.

    Raises:
        UnavailableError: the ledger cannot be read.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from collect(ledger)
            yield _gauge(
                "airloom_addresses_info",
                "Where people reach each service.",
                tuple(addresses or ()),
                [(*addresses.values(), 1)] if addresses else [],
            )

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry)


def collect(ledger: Ledger) -> Iterator[Metric]:
    """The metric families, made from the ledger's aggregates."""
    yield _durations(ledger)
    yield _counter(
        "airloom_task_attempts",
        "Ended tries of tasks by outcome.",
        ("pipeline", "task", "state"),
        _with_zeros(ledger.task_counts(), TASK_ENDS),
    )
    yield _counter(
        "airloom_stage_cache",
        "Stages that reused or made a result.",
        ("pipeline", "stage", "cache"),
        _with_zeros(ledger.cache_counts(), CACHES),
    )
    verdicts = _with_zeros(ledger.verdict_counts(), VERDICTS)
    yield _counter("airloom_gate_verdicts", "Decisions of the gate.", ("pipeline", "verdict"), verdicts)
    yield _gauge(
        "airloom_gate_rejections_in_a_row",
        "Candidates that the gate has rejected since it last promoted one.",
        ("pipeline",),
        sorted(ledger.rejections_in_a_row().items()),
    )
    yield from _runs(ledger)
    yield from _latest(ledger)


def _runs(ledger: Ledger) -> Iterator[Metric]:
    counts = ledger.run_counts()
    ended = [row for row in counts if row[1] in RUN_ENDS]
    pipelines = sorted({pipeline for pipeline, *_ in counts})
    running = {pipeline: count for pipeline, state, count in counts if state == "running"}
    yield _counter("airloom_runs", "Ended runs by outcome.", ("pipeline", "state"), _with_zeros(ended, RUN_ENDS))
    yield _gauge(
        "airloom_running_runs",
        "Runs that have begun and not ended.",
        ("pipeline",),
        [(pipeline, running.get(pipeline, 0)) for pipeline in pipelines],
    )
    yield _gauge(
        "airloom_oldest_running_run_timestamp_seconds",
        "When the first of the runs that still run began.",
        ("pipeline",),
        [(pipeline, at.timestamp()) for pipeline, at in sorted(ledger.oldest_running().items())],
    )
    ends = sorted(ledger.last_ends().items())
    for state, name in (("success", "success"), ("failed", "failure")):
        yield _gauge(
            f"airloom_last_{name}_timestamp_seconds",
            f"When a run of the pipeline last ended in {name}.",
            ("pipeline",),
            [(pipeline, at.timestamp()) for (pipeline, ended), at in ends if ended == state],
        )
    yield _gauge(
        "airloom_last_run_timestamp_seconds",
        "When the pipeline's latest run began; one series for each pipeline.",
        ("pipeline", "run_id", "state"),
        [(run.pipeline, run.run_id, run.state, run.started_at.timestamp()) for run in _started(ledger.latest_runs())],
    )


def _started(runs: list[RunOutcome]) -> Iterator[Any]:
    return (run for run in runs if run.started_at is not None)


def _with_zeros(rows: Sequence[tuple[Any, ...]], last: Sequence[str]) -> list[tuple[Any, ...]]:
    """The rows, and a 0 for each value of the last label that has none: an increase from nothing is none."""
    counts = {row[:-1]: row[-1] for row in rows}
    for row in rows:
        for value in last:
            counts.setdefault((*row[:-2], value), 0)
    return [(*labels, count) for labels, count in sorted(counts.items())]


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
    sizes, files, gate, stage = [], [], [], []
    for outcome in ledger.latest_values():
        values = sorted(outcome.values.items())[:FIGURES_PER_STAGE]
        if outcome.task == "version":
            sizes += [(outcome.pipeline, value) for name, value in values if name == "size_bytes"]
            files += [(outcome.pipeline, value) for name, value in values if name == "files"]
        elif outcome.task == "gate":
            gate += [(outcome.pipeline, *_model_and_metric(name), value) for name, value in values]
        elif outcome.task in {"preprocess", "train", "evaluate"}:
            stage += [(outcome.pipeline, outcome.task, name, value) for name, value in values]
    yield _gauge("airloom_dataset_size_bytes", "Size of the latest data version.", ("pipeline",), sizes)
    yield _gauge("airloom_dataset_files", "Files of the latest data version.", ("pipeline",), files)
    yield _gauge("airloom_gate_metric", "What the gate decided on.", ("pipeline", "model", "metric"), gate)
    yield _gauge("airloom_stage_metric", "Figures of the latest stage.", ("pipeline", "stage", "metric"), stage)


def _model_and_metric(name: str) -> tuple[str, str]:
    metric = name.removeprefix("champion.")
    return ("candidate" if metric == name else "champion"), metric


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
