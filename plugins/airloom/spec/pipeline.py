"""The one model of a pipeline's YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from airloom.contract.base import Frozen
from airloom.contract.digest import sha256_json
from airloom.contract.enums import DeployTarget, Runner, Stage
from airloom.contract.version_tag import PIPELINE_PATTERN
from airloom.spec.units import Seconds, SizeBytes

Name = Annotated[str, StringConstraints(pattern=f"^{PIPELINE_PATTERN}$", max_length=40)]
RepoName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_.-]{0,99}$")]

REQUIRED_STAGES = (Stage.PREPROCESS, Stage.TRAIN, Stage.EVALUATE, Stage.SERVE)


class Source(Frozen):
    """Where the raw data comes from: a prefix in the object store, `s3://bucket/prefix/`."""

    type: Literal["object_store"] = "object_store"
    uri: str = Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+/(?:[^/].*/)?$")
    description: str = ""


class Resources(Frozen):
    """Limits of a stage.

    Attributes:
        cpus: whole or part processors; for runner `process` the number of threads that
            numeric libraries may use.
        memory: of all processes of the stage together; more ends it.
        timeout: wall time of one try; more ends it.
        gpus: number of GPUs, or 0.
        shm, tmp: of a container's /dev/shm and /tmp. What is written there is memory, and counts as such.
            Runner `process` ignores them: its stages have the machine's.
    """

    cpus: float = Field(default=1.0, gt=0, le=1024)
    memory: SizeBytes = 2 * 2**30
    timeout: Seconds = 1800.0
    gpus: int = Field(default=0, ge=0, le=64)
    shm: SizeBytes = 256 * 2**20
    tmp: SizeBytes = 512 * 2**20


# Keys that came after pipelines had digests: at their default they are left out, so that those stay as they were.
_LATER = ("shm", "tmp")


class StageSpec(Frozen):
    """How one stage is run: the repo with its code, its limits and parameters."""

    repo: RepoName
    resources: Resources = Resources()
    params: dict[str, Any] = Field(default_factory=dict)
    retries: int = Field(default=2, ge=0, le=10)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)


class Validation(Frozen):
    """What a dataset must fulfil before it becomes a data version. Fractions are between 0 and 1."""

    min_rows: int = Field(default=1, ge=1)
    min_rows_by_class: int = Field(default=0, ge=0)
    max_rejected_fraction: float = Field(default=0.05, ge=0, le=1)
    max_leaks: int = Field(default=0, ge=0)
    required_splits: list[str] = Field(default_factory=lambda: ["train", "validation", "test"])


class Threshold(Frozen):
    """Bounds of a metric, both included."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a threshold needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class ChampionRule(Frozen):
    """A candidate may be worse than the champion by at most `max_regression`, on the same data version."""

    metric: str
    higher_is_better: bool = True
    max_regression: float = Field(default=0.0, ge=0)


class GateSpec(Frozen):
    """What a candidate must fulfil to be promoted; `approval` asks a person as well."""

    thresholds: dict[str, Threshold] = Field(default_factory=dict)
    champion: ChampionRule | None = None
    approval: bool = False


class Canary(Frozen):
    """How traffic moves to a new release.

    Attributes:
        steps: percent of traffic, rising, the last 100.
        step_time: how long each step is watched.
        max_error_rate: of the new release's answers with status 5xx, between 0 and 1.
        max_latency_ratio: of the new release's median latency to the old one's.
    """

    steps: list[int] = Field(default_factory=lambda: [10, 50, 100])
    step_time: Seconds = 30.0
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    max_latency_ratio: float = Field(default=3.0, gt=0)

    @model_validator(mode="after")
    def _rising_to_100(self) -> Self:
        steps = self.steps
        if not steps or steps[-1] != 100 or any(not 0 < step <= 100 for step in steps) or sorted(set(steps)) != steps:
            raise ValueError(f"steps must be rising percentages up to 100, such as [10, 50, 100]; found {steps}")
        return self


class DeploySpec(Frozen):
    """Where and how a release is served. `max_upload` bounds one request's body."""

    target: DeployTarget = DeployTarget.PROCESS
    version: str = Field(default="1.0", pattern=r"^\d+\.\d+$", description="MAJOR.MINOR of the releases")
    canary: Canary = Canary()
    max_upload: SizeBytes = 2 * 2**20


class MonitorSpec(Frozen):
    """When the drift monitor runs: a cron expression of five fields, or `null` for never."""

    schedule: str | None = None

    @field_validator("schedule")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None:
            # Imported late: the CLI starts without it.
            from croniter import croniter

            if len(value.split()) != 5 or not croniter.is_valid(value):
                raise ValueError(f"{value!r} is no cron expression of five fields, such as '0 6 * * 1'")
        return value


class PipelineSpec(Frozen):
    """One pipeline."""

    name: Name
    description: str = Field(min_length=1)
    owner: str = Field(min_length=1)
    tags: list[str] = Field(default_factory=list)
    task: Literal["classification", "detection", "pose", "tabular"]
    runner: Runner = Runner.PROCESS
    source: Source
    stages: dict[Stage, StageSpec]
    validation: Validation = Validation()
    gate: GateSpec = GateSpec()
    deploy: DeploySpec = DeploySpec()
    monitor: MonitorSpec = MonitorSpec()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        missing = [stage.value for stage in REQUIRED_STAGES if stage not in self.stages]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; a pipeline needs preprocess, train, evaluate, serve")
        if self.runner is Runner.PROCESS and self.deploy.target is not DeployTarget.PROCESS:
            raise ValueError(
                f"deploy.target {self.deploy.target.value!r} needs images, but runner 'process' builds none; "
                "use target 'process' or runner 'docker'"
            )
        return self

    @property
    def repos(self) -> list[str]:
        """The stage repos in the order of the flow, each once."""
        return list(dict.fromkeys(self.stages[stage].repo for stage in Stage if stage in self.stages))

    @property
    def digest(self) -> str:
        """Digest of the whole configuration, defaults included."""
        content = self.model_dump(mode="json")
        for stage in content["stages"].values():
            for name in _LATER:
                if stage["resources"][name] == Resources.model_fields[name].default:
                    del stage["resources"][name]
        return sha256_json(content)
