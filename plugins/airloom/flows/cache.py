"""The stage cache: what a stage's result depends on as one key, and the results that are known by it.

Entries stand in the store as `cache/<stage>/<key>.json`; `cache/<stage>/latest/<pipeline>.json` is the one that
a pipeline recorded last, from which people are told what has changed since. See `cache_lookup` for reading.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from airloom.contract import DataVersion, Frozen, RunPlan, Stage, StageOutcome, StageResult, sha256_json
from airloom.errors import ContractError

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

NO_CHAMPION = "none"


class KeyParts(Frozen):
    """What a key is made of.

    Attributes:
        pipeline: stands in the request, and from there in models and tags.
        inputs: name -> digest of what the stage reads.
    """

    stage: Stage
    pipeline: str
    code_digest: str
    environment: str
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    inputs: dict[str, str]

    @property
    def key(self) -> str:
        return sha256_json(self.model_dump(mode="json"))


class CacheEntry(Frozen):
    """A result that may be used again, and where it came from.

    Attributes:
        data_version: of preprocess: where its dataset is.
        recorded_at: seconds since 1970.
        seconds: what the stage took, and what a hit saves.
    """

    schema_version: int = 1
    key: str
    parts: KeyParts
    run_id: str
    commit: str
    recorded_at: float
    seconds: float
    result: StageResult
    data_version: DataVersion | None = None


def key_parts(plan: RunPlan, stage: Stage, inputs: Mapping[str, str]) -> KeyParts:
    """Everything that a stage's result depends on. Runs and commits don't count, only what they hold."""
    pin = plan.stages[stage]
    return KeyParts(
        stage=stage,
        pipeline=plan.pipeline,
        code_digest=pin.code_digest,
        environment=pin.environment,
        params=pin.params,
        seed=pin.seed,
        inputs=dict(inputs),
    )


def source_inputs(plan: RunPlan) -> dict[str, str]:
    """What preprocess reads, for its key."""
    return {"source": plan.source.digest}


def record(hooks: Hooks, plan: RunPlan, outcome: StageOutcome, *, inputs: Mapping[str, str] | None = None) -> None:
    """Let later runs find a result. A hit is not recorded again.

    Args:
        inputs: those of the outcome's key; may be left out for preprocess.

    Raises:
        ContractError: the inputs don't give the outcome's key, or a preprocess outcome has no data version.
        StorageFullError, UnavailableError: the store.
    """
    if outcome.cache == "hit":
        return
    if outcome.stage is Stage.PREPROCESS:
        inputs = source_inputs(plan) if inputs is None else inputs
        if outcome.data_version is None:
            raise ContractError("a preprocess result without a data version is no use to later runs")
    parts = key_parts(plan, outcome.stage, inputs or {})
    if parts.key != outcome.key:
        raise ContractError(
            f"the outcome of {outcome.stage.value} has the key {outcome.key[:12]}, its inputs give {parts.key[:12]}",
            hint="was it made by another version of Airloom? Start a new run",
        )
    entry = CacheEntry(
        key=parts.key,
        parts=parts,
        run_id=plan.run_id,
        commit=plan.code_of(outcome.stage).commit,
        recorded_at=time.time(),
        seconds=outcome.seconds,
        result=outcome.result,
        data_version=outcome.data_version,
    )
    value = entry.model_dump(mode="json")
    bucket = hooks.settings.bucket_airloom
    hooks.store.put_json(bucket, entry_key(outcome.stage, parts.key), value)
    hooks.store.put_json(bucket, latest_key(outcome.stage, plan.pipeline), value)


def entry_key(stage: Stage, key: str) -> str:
    """Where the entry of a key stands in the store."""
    return f"cache/{stage.value}/{key}.json"


def latest_key(stage: Stage, pipeline: str) -> str:
    """Where a pipeline's last recorded entry stands in the store."""
    return f"cache/{stage.value}/latest/{pipeline}.json"
