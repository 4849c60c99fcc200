"""What MLflow's answers hold, and the names of the tags that Airloom writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from airloom.errors import ContractError

# How runs and model versions name what they came from.
KEY_TAG = "airloom.key"
RUN_TAG = "airloom.run_id"
PIPELINE_TAG = "airloom.pipeline"
PLAN_TAG = "airloom.plan"
DATA_TAG = "airloom.data_tag"
GATE_TAG = "airloom.gate"
GATE_RUN_TAG = "airloom.gate.run_id"
GATE_CHAMPION_TAG = "airloom.gate.champion"  # the version that it was measured beside; empty: none
METRICS_TAG = "airloom.metrics"
COMMIT_TAG_PREFIX = "airloom.commit."
DIGEST_TAG = "airloom.digest"

CHAMPION = "champion"
CANDIDATE = "candidate"

MODEL_URI_PREFIX = "models:/"
_MAX_TAG_CHARACTERS = 5000


@dataclass(frozen=True)
class ModelVersionInfo:
    """One version of a registered model. `model_uri` is that of its logged model, `models:/m-…`."""

    name: str
    version: str
    run_id: str
    model_uri: str
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    created_at: float = 0.0

    @property
    def digest(self) -> str | None:
        """`sha256_tree` of the model artifact, where the version was registered with it."""
        return self.tags.get(DIGEST_TAG)


@dataclass(frozen=True)
class RunInfo:
    """One MLflow run. `status` is RUNNING, FINISHED, FAILED or KILLED; times are seconds since 1970."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    artifact_uri: str
    started_at: float
    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


def model_version(item: Mapping[str, Any]) -> ModelVersionInfo:
    model_id = item.get("model_id")
    return ModelVersionInfo(
        name=str(item["name"]),
        version=str(item["version"]),
        run_id=str(item.get("run_id", "")),
        model_uri=f"{MODEL_URI_PREFIX}{model_id}" if model_id else str(item.get("source", "")),
        tags=tags_of(item),
        aliases=tuple(sorted(item.get("aliases", []))),
        created_at=int(item.get("creation_timestamp", 0)) / 1000,
    )


def with_aliases(version: ModelVersionInfo, aliases: Mapping[tuple[str, str], list[str]]) -> ModelVersionInfo:
    return replace(version, aliases=tuple(sorted(aliases.get((version.name, version.version), []))))


def run_info(run: Mapping[str, Any]) -> RunInfo:
    info, data = run["info"], run.get("data", {})
    return RunInfo(
        run_id=str(info["run_id"]),
        name=str(info.get("run_name", "")),
        experiment_id=str(info["experiment_id"]),
        status=str(info.get("status", "")),
        artifact_uri=str(info.get("artifact_uri", "")),
        started_at=int(info.get("start_time", 0)) / 1000,
        metrics={str(item["key"]): float(item["value"]) for item in data.get("metrics", [])},
        params={str(item["key"]): str(item["value"]) for item in data.get("params", [])},
        tags=tags_of(data),
    )


def tags_of(item: Mapping[str, Any]) -> dict[str, str]:
    return {str(tag["key"]): str(tag.get("value", "")) for tag in item.get("tags", [])}


def pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": tag_text(value)} for key, value in tags.items()]


def tag_text(value: object) -> str:
    """A tag's value as MLflow keeps it: text of at most 5,000 characters."""
    return str(value)[:_MAX_TAG_CHARACTERS]


def json_number(value: float) -> float | str:
    """A figure as MLflow's JSON has it: numbers that are not finite are words."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(value)


def model_id_of(model_uri: str) -> str:
    """The id in `models:/m-…`.

    Raises:
        ContractError: that is no address of a logged model.
    """
    model_id = model_uri.removeprefix(MODEL_URI_PREFIX)
    if not model_uri.startswith(f"{MODEL_URI_PREFIX}m-") or "/" in model_id:
        raise ContractError(f"{model_uri!r} is no address of a logged model", hint="expected models:/m-…")
    return model_id


def quoted(value: str) -> str:
    """A value in MLflow's filter language, which has no way to escape a quote.

    Raises:
        ContractError: it has both kinds of quotes.
    """
    if "'" not in value:
        return f"'{value}'"
    if '"' in value:
        raise ContractError(f"{value!r} has both kinds of quotes, and MLflow cannot search for that")
    return f'"{value}"'
