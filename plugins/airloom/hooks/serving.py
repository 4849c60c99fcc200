"""A serving process, or the gateway before it, as a client sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from airloom.errors import ServiceError, UnavailableError

REQUESTS_METRIC = "airloom_serving_requests_total"


@dataclass(frozen=True)
class Answer:
    """An answer to one prediction and how long it took."""

    body: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Counters:
    """Predictions that a serving process has answered since it started; `failed` are those with status 5xx."""

    answered: int
    failed: int

    def since(self, earlier: Counters) -> Counters:
        return Counters(self.answered - earlier.answered, self.failed - earlier.failed)


class ServingClient:
    """Asks for predictions.

    Args:
        url: of the process, or of the pipeline at the gateway.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 30.0) -> None:
        import httpx

        self.url = url
        self._client = httpx.Client(base_url=url, timeout=timeout_seconds, trust_env=False)

    def __enter__(self) -> ServingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def predict(self, content: bytes, media_type: str) -> Answer:
        """One prediction.

        Raises:
            UnavailableError: nobody answered, or the answer was 502, 503 or 504.
            ServiceError: any other answer but 200.
        """
        import httpx

        started = time.perf_counter()
        try:
            answer = self._client.post("/predict", content=content, headers={"Content-Type": media_type})
        except httpx.TransportError as error:
            raise UnavailableError(f"{self.url} does not answer: {error or type(error).__name__}") from error
        if answer.status_code in {502, 503, 504}:
            raise UnavailableError(f"{self.url} answered {answer.status_code}: {answer.text[:300]}")
        if answer.is_error:
            raise ServiceError(f"{self.url} answered {answer.status_code}: {answer.text[:300]}")
        return Answer(body=answer.json(), seconds=time.perf_counter() - started)

    def counters(self) -> Counters:
        """What the process has counted, from its metrics.

        Raises:
            UnavailableError: it does not answer.
        """
        import httpx
        from prometheus_client.parser import text_string_to_metric_families

        try:
            text = self._client.get("/metrics").raise_for_status().text
        except httpx.HTTPError as error:
            raise UnavailableError(f"{self.url}/metrics does not answer: {error}") from error
        answered = failed = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == REQUESTS_METRIC and "predict" in sample.labels.get("route", ""):
                    answered += int(sample.value)
                    failed += int(sample.value) if sample.labels.get("status", "").startswith("5") else 0
        return Counters(answered, failed)
