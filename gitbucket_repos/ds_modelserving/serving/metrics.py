"""What the process tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

disable_created_metrics()  # a second series for each counter that nobody asks for

LATENCY_BUCKETS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
# A model without stated classes, or one that makes its labels up, must not make a time series of each.
OTHER_CLASS = "other"


class Metrics:
    """One registry for one server, so that two of them (in a test, say) don't mix."""

    def __init__(self, pipeline: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._pipeline = pipeline
        self._requests = Counter(
            "airloom_serving_requests", "Answers by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self._latency = Histogram(
            "airloom_serving_latency_seconds",
            "From a request's headers to its answer, by route",
            ["route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "airloom_serving_batch_size",
            "Requests that the model saw at once",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self._predictions = Counter(
            "airloom_serving_predictions", "Predictions by class", ["label"], registry=self.registry
        )
        self._model = Gauge(
            "airloom_serving_model_info",
            "1 for the release that answers",
            ["pipeline", "release", "model_version"],
            registry=self.registry,
        )
        self._ready = Gauge("airloom_serving_ready", "1 when a model is loaded", registry=self.registry)
        self.swaps = Counter(
            "airloom_serving_swaps", "Swaps of the model by outcome", ["outcome"], registry=self.registry
        )
        self.unlogged = Counter(
            "airloom_serving_unlogged_predictions",
            "Answers that could not be kept: the journal is full or cannot be written",
            registry=self.registry,
        )
        self.drained = Counter(
            "airloom_serving_drained_predictions", "Predictions moved to the prediction log", registry=self.registry
        )
        self.drain_failures = Counter(
            "airloom_serving_drain_failures", "Times the prediction log did not take a batch", registry=self.registry
        )
        self._route_children: dict[tuple[str, int], Counter] = {}
        self._latency_children: dict[str, Histogram] = {}
        self._class_children: dict[str, Counter] = {}

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        key = (route, status)
        child = self._route_children.get(key)
        if child is None:
            child = self._route_children[key] = self._requests.labels(route, str(status))
        child.inc()
        timer = self._latency_children.get(route)
        if timer is None:
            timer = self._latency_children[route] = self._latency.labels(route)
        timer.observe(seconds)

    def serves(self, release: str, model_version: str, classes: Iterable[str]) -> None:
        """Say which release answers from now on; its classes are shown with a count of 0."""
        self._model.clear()
        self._model.labels(self._pipeline, release, model_version).set(1)
        self._ready.set(1)
        self._class_children = {label: self._predictions.labels(label) for label in classes}

    def predicted(self, label: object) -> None:
        """Count one prediction of a class."""
        child = self._class_children.get(label) if isinstance(label, str) else None
        (child or self._predictions.labels(OTHER_CLASS)).inc()

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
