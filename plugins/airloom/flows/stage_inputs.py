"""What each stage reads: as digests for its key, as files for its request, as facts for its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airloom.contract import DataVersion, RunPlan, Stage, StageOutcome, Tracking
from airloom.errors import ConfigError, ContractError
from airloom.flows.cache import NO_CHAMPION, source_inputs
from airloom.flows.resolve import plan_uri
from airloom.hooks import mlflow_records as records

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

# Folders that each stage fills.
OUTPUTS = {
    Stage.PREPROCESS: ("dataset", "rejected"),
    Stage.TRAIN: ("checkpoints", "model"),
    Stage.EVALUATE: ("report",),
}
# What a later try of the same work goes on with.
KEPT_OUTPUTS = frozenset({"checkpoints"})
TRACKED = frozenset({Stage.TRAIN, Stage.EVALUATE})


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads.

    Attributes:
        digests: name -> digest of its content, for the key.
        facts: for the request.
        known: facts that the platform adds to the result.
        environment: variables that the stage needs, secrets among them.
        objects: what `StageJob.objects` holds, when the inputs have been fetched.
        fetch: brings the inputs to this machine, given a folder for those that belong to one run alone.
    """

    digests: Mapping[str, str]
    facts: Mapping[str, str]
    fetch: Callable[[Path], dict[str, Path]] = field(repr=False)
    objects: Callable[[], dict[str, dict[str, str]]] = field(default=dict, repr=False)
    known: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def inputs_of(
    hooks: Hooks,
    plan: RunPlan,
    stage: Stage,
    *,
    data_version: DataVersion | None,
    train: StageOutcome | None,
) -> StageInputs:
    """The inputs of a stage.

    Args:
        data_version: needed by train and evaluate.
        train: needed by evaluate.

    Raises:
        ContractError: the stage lacks what an earlier task should have handed on.
        ConfigError: a run has no such stage.
    """
    if stage is Stage.PREPROCESS:
        return _preprocess(hooks, plan)
    if stage not in OUTPUTS:
        raise ConfigError(f"{stage.value} is no stage of a run", hint=f"stages are: {', '.join(OUTPUTS)}")
    if data_version is None:
        raise ContractError(f"{stage.value} needs a data version", hint="did the task 'version' run?")
    if stage is Stage.TRAIN:
        return _train(hooks, plan, data_version)
    return _evaluate(hooks, plan, data_version, train)


def tracking_of(hooks: Hooks, plan: RunPlan, stage: Stage, data_version: DataVersion | None) -> Tracking | None:
    """The MLflow run that a stage logs to: one for each run of the pipeline. None for stages that log nothing.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    if stage not in TRACKED:
        return None
    code = plan.code_of(stage)
    tags = {
        records.PIPELINE_TAG: plan.pipeline,
        records.RUN_TAG: plan.run_id,
        records.PLAN_TAG: plan_uri(hooks, plan),
        **{f"{records.COMMIT_TAG_PREFIX}{repo}": pin.commit for repo, pin in plan.code.items()},
        # Names that MLflow's own pages show.
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": code.repo,
        "mlflow.source.git.commit": code.commit,
        "mlflow.user": plan.trigger.by or plan.trigger.kind,
    }
    if data_version is not None:
        tags[records.DATA_TAG] = data_version.tag
    run_id = hooks.mlflow.start_run(plan.pipeline, f"{plan.pipeline}/{plan.run_id}", tags)
    return Tracking(uri=hooks.settings.mlflow_api_url, experiment=plan.pipeline, run_id=run_id)


def _preprocess(hooks: Hooks, plan: RunPlan) -> StageInputs:
    settings = hooks.settings

    def fetch(folder: Path) -> dict[str, Path]:
        manifest = folder / "manifest.jsonl"
        hooks.store.download(*hooks.store.split_uri(plan.source.manifest), manifest)
        return {"manifest": manifest}

    return StageInputs(
        digests=source_inputs(plan),
        facts={
            "source_uri": plan.source.uri,
            "source_digest": plan.source.digest,
            "s3_endpoint": settings.s3_endpoint_url,
            "commit": plan.code_of(Stage.PREPROCESS).commit,
        },
        fetch=fetch,
        environment={
            "AWS_ACCESS_KEY_ID": "airloom",
            "AWS_SECRET_ACCESS_KEY": settings.secret("s3_airloom_secret"),
            "AWS_REGION": settings.s3_region,
            "AWS_DEFAULT_REGION": settings.s3_region,
            "AWS_ENDPOINT_URL_S3": settings.s3_endpoint_url,
        },
    )


def _train(hooks: Hooks, plan: RunPlan, data_version: DataVersion) -> StageInputs:
    return StageInputs(
        digests={"dataset": data_version.md5},
        facts=_data_facts(plan, Stage.TRAIN, data_version),
        fetch=lambda folder: {"dataset": _materialize(hooks, data_version)},
        objects=lambda: {"dataset": _objects(hooks, data_version)},
        environment=_tracking_environment(hooks),
    )


def _evaluate(hooks: Hooks, plan: RunPlan, data_version: DataVersion, train: StageOutcome | None) -> StageInputs:
    from airloom.flows.gate import measured_beside

    facts: Mapping[str, Any] = train.result.facts if train is not None else {}
    missing = [name for name in ("model_uri", "model_digest") if not facts.get(name)]
    if missing:
        raise ContractError(
            f"evaluate needs the train stage's {' and '.join(missing)}; it handed on {sorted(facts) or 'nothing'}",
            hint=f"{plan.stages[Stage.TRAIN].repo} must log its model and say so in its result's facts",
        )
    model_uri, model_digest = str(facts["model_uri"]), str(facts["model_digest"])
    found = measured_beside(hooks, plan, model_uri, model_digest)

    def fetch(folder: Path) -> dict[str, Path]:
        inputs = {
            "dataset": _materialize(hooks, data_version),
            "model": hooks.mlflow.download_model(model_uri, model_digest),
        }
        if found is not None:
            inputs["champion"] = hooks.mlflow.download_model(found.model_uri, found.digest)
        return inputs

    request_facts = {**_data_facts(plan, Stage.EVALUATE, data_version), "model_uri": model_uri}
    if found is not None:
        request_facts |= {"champion_version": found.version, "champion_uri": found.model_uri}
    return StageInputs(
        digests={
            "dataset": data_version.md5,
            "model": model_digest,
            "champion": (found.digest or found.model_uri) if found is not None else NO_CHAMPION,
        },
        facts=request_facts,
        fetch=fetch,
        objects=lambda: {"dataset": _objects(hooks, data_version)},
        known={"champion_version": found.version} if found is not None else {},
        environment=_tracking_environment(hooks),
    )


def _materialize(hooks: Hooks, data_version: DataVersion) -> Path:
    from airloom.flows.datasets import materialize  # the data tools are slow to import, and a hit needs none

    return materialize(hooks, data_version)


def _objects(hooks: Hooks, data_version: DataVersion) -> dict[str, str]:
    from airloom.flows.datasets import objects_of

    return objects_of(hooks, data_version)


def _data_facts(plan: RunPlan, stage: Stage, data_version: DataVersion) -> dict[str, str]:
    return {"data_tag": data_version.tag, "data_md5": data_version.md5, "commit": plan.code_of(stage).commit}


def _tracking_environment(hooks: Hooks) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": hooks.settings.mlflow_api_url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
