"""The file that tells a stage what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.enums import Stage


class Tracking(Frozen):
    """The MLflow run that a stage logs to. The run exists already: a stage that is tried again finds its own."""

    uri: str
    experiment: str
    run_id: str


class StageRequest(Frozen):
    """What a stage reads: everything but secrets, which arrive in its environment.

    Attributes:
        pipeline: name of the pipeline.
        run_id: the Airflow run's id.
        stage: which stage of the image is meant.
        commit: full hash of the code commit that the stage runs from.
        params: the stage's own parameters, from the pipeline's YAML.
        inputs: name -> a file or folder to read. Never written to.
        outputs: name -> a folder to fill; it exists and is empty at a first try, and holds what an
            earlier try left (checkpoints, say) at a later one.
        facts: what an earlier task found out and the stage may want to record (data version, tag …).
        tracking: the MLflow run to log to; `None` for stages that log nothing.
        seed: for every random number generator.
    """

    schema_version: Literal[1] = 1
    pipeline: str
    run_id: str
    stage: Stage
    commit: str
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Path] = Field(default_factory=dict)
    outputs: dict[str, Path] = Field(default_factory=dict)
    facts: dict[str, str] = Field(default_factory=dict)
    tracking: Tracking | None = None
    seed: int = 0
