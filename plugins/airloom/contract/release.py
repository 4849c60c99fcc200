"""Gate decisions, releases and receipts."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.enums import DeployTarget, Verdict
from airloom.contract.image import ImageRef


class GateDecision(Frozen):
    """The gate's verdict on a candidate, with the numbers it rests on.

    Attributes:
        reasons: one sentence for each check, passed or not, with its figures.
        failed: those of `reasons` that reject the candidate; empty when promoted.
        metrics / champion_metrics: both evaluated on `data_tag`.
        champion_version: that it was measured beside; where the candidate is the champion itself, the one before it.
    """

    verdict: Verdict
    reasons: list[str]
    failed: list[str] = Field(default_factory=list)
    metrics: dict[str, float]
    champion_metrics: dict[str, float] | None = None
    champion_version: str | None = None
    model_name: str
    model_version: str
    mlflow_run_id: str
    data_tag: str


class Release(Frozen):
    """An immutable thing that can be served: `release.json` in the store, written once.

    Attributes:
        version: `MAJOR.MINOR.PATCH`.
        model_digest: `sha256_tree` of the model artifact.
        serving_commit: of the serving repo.
        environment: digest of the image, or of the installed packages.
        image: of the serving code, where releases answer from containers.
        plan: URI of the run's plan.
        lineage: repo -> commit of every stage that led to the model.
    """

    schema_version: Literal[1] = 1
    pipeline: str
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    created_at: datetime
    run_id: str
    model_name: str
    model_version: str
    model_uri: str
    model_digest: str
    mlflow_run_id: str
    data_tag: str
    data_md5: str
    serving_repo: str
    serving_commit: str
    environment: str
    image: ImageRef | None = None
    plan: str
    lineage: dict[str, str]
    metrics: dict[str, float] = Field(default_factory=dict)
    target: DeployTarget = DeployTarget.PROCESS


class Receipt(Frozen):
    """What a prediction's id leads back to.

    Attributes:
        image: that the release answered from, where a registry holds it.
    """

    prediction_id: str
    answered_at: datetime
    pipeline: str
    latency_ms: float
    input_sha256: str
    output: dict[str, Any]
    release: Release
    image: ImageRef | None = None
