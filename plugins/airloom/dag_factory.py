"""From pipeline specifications to Airflow DAGs.

Everything here is executed whenever Airflow parses dags/: nothing heavier than Airflow's task SDK and
pydantic is imported.
"""

from __future__ import annotations

import itertools
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, AssetAny, BaseOperator, CronTriggerTimetable, Param
from airflow.sdk.definitions.context import get_parsing_context

from airloom.contract.assets import stage_asset
from airloom.contract.enums import Stage
from airloom.errors import ConfigError
from airloom.hooks.airflow_api import STAGE_POOL
from airloom.operators.flow import FlowOperator
from airloom.operators.links import MlflowRunLink, ReceiptLink, RunPageLink, VersionTagLink
from airloom.operators.reconcile import ReconcileOperator
from airloom.operators.stage import StageOperator
from airloom.settings import Settings, get_settings
from airloom.spec import PipelineSpec, load_pipeline, load_pipelines
from airloom.spec.doc import pipeline_doc

# No pipeline's name: two underscores are refused there.
RECONCILE_DAG = "airloom__reconcile"

# Runs of one pipeline that may be under way at once; their versions, models and releases don't clash.
MAX_ACTIVE_RUNS = 4

FLOW_RETRIES = 2
RETRY_DELAY = timedelta(seconds=5)
FLOW_TIMEOUT = timedelta(minutes=30)
# What a stage task may take beside the stage: fetching code and inputs, ending the process.
STAGE_MARGIN = timedelta(minutes=5)


def use_configs(folder: Path) -> None:
    """Have this process read pipelines from here: a DAG bundle checks out one folder for each commit.

    The project's own folder changes nothing.
    """
    if folder.resolve() == get_settings().configs_dir.resolve():
        return
    os.environ["AIRLOOM_CONFIGS"] = str(folder)
    get_settings.cache_clear()


def pipeline_dags(settings: Settings | None = None) -> list[DAG]:
    """The DAG of each valid YAML in dags/configs.

    A task that starts needs its own DAG only, so the others are not built for it.
    """
    settings = settings or get_settings()
    wanted = get_parsing_context().dag_id
    if wanted == RECONCILE_DAG:
        return []
    path = settings.configs_dir / f"{wanted}.yaml"
    if wanted and path.is_file():
        return [build_dag(load_pipeline(path))]
    specs, _ = load_pipelines(settings.configs_dir)
    return [build_dag(spec) for spec in specs]


def reconcile_dag(settings: Settings | None = None) -> DAG | None:
    """The DAG that makes up for lost push events; None for a task that starts and needs another."""
    settings = settings or get_settings()
    if get_parsing_context().dag_id not in {None, RECONCILE_DAG}:
        return None
    minutes = settings.reconcile_minutes
    doc = "Compares `main` of each stage repo with what was built and told, and makes up for what is missing."
    with DAG(
        dag_id=RECONCILE_DAG,
        description="Builds and starts what a lost push event should have.",
        doc_md=f"{doc} How often: `AIRLOOM_RECONCILE_MINUTES`. By hand: `airloom pushes reconcile`.",
        # Without a start date, the first run waits for the next full interval.
        schedule=CronTriggerTimetable(f"*/{minutes} * * * *", timezone="UTC") if minutes else None,
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=False,
        # Not `airloom`: the ledger is of pipelines.
        tags={"airloom-platform"},
        default_args={"owner": "airloom", "retries": 1, "retry_delay": RETRY_DELAY, "execution_timeout": FLOW_TIMEOUT},
    ) as dag:
        ReconcileOperator(task_id="reconcile", doc_md=doc)
    return dag


def check_configs(settings: Settings | None = None) -> None:
    """Do nothing if every YAML in dags/configs is valid.

    Raises:
        ConfigError: some are not; each problem is a line with file, line, key, value and what is allowed.
    """
    settings = settings or get_settings()
    if get_parsing_context().dag_id:
        return
    _, errors = load_pipelines(settings.configs_dir)
    if errors:
        listed = "\n\n".join(str(error) for error in errors)
        raise ConfigError(f"{len(errors)} invalid in {settings.configs_dir}; the others work on\n\n{listed}")


def build_dag(spec: PipelineSpec) -> DAG:
    """The DAG of one pipeline."""
    dag = DAG(
        dag_id=spec.name,
        description=spec.description,
        doc_md=pipeline_doc(spec),
        # A new build of any repo that the pipeline is made of starts it.
        schedule=AssetAny(*(_asset(repo) for repo in spec.repos)),
        start_date=datetime(2024, 1, 1, tzinfo=UTC),
        catchup=False,
        max_active_runs=MAX_ACTIVE_RUNS,
        tags={"airloom", spec.task, *spec.tags},
        default_args={
            "owner": spec.owner,
            "retries": FLOW_RETRIES,
            "retry_delay": RETRY_DELAY,
            "execution_timeout": FLOW_TIMEOUT,
        },
        params=_params(spec),
        render_template_as_native_obj=False,
    )
    with dag:
        tasks: list[Any] = [
            _flow(spec, "resolve", "Pin commits, environment, configuration and input once for the whole run."),
            _stage(spec, Stage.PREPROCESS, "Make a dataset from raw data: packed shards and a data card."),
            _flow(spec, "validate", "Hold the data card against the pipeline's rules."),
            _flow(spec, "version", "Push the dataset, then write its version tag.", VersionTagLink()),
            _stage(spec, Stage.TRAIN, "Train a candidate model.", MlflowRunLink()),
            _stage(spec, Stage.EVALUATE, "Evaluate candidate and champion on the same data.", MlflowRunLink()),
            _flow(spec, "gate", "Promote or reject the candidate.", MlflowRunLink(), VersionTagLink()),
        ]
        if spec.gate.approval:
            tasks.append(_approve(spec))
        tasks += [
            _flow(spec, "release", "Make an immutable release of the promoted model."),
            _flow(spec, "deploy", "Start the release beside the old one and move traffic to it in steps."),
            _flow(spec, "verify", "Ask the served model and compare its answers with the evaluation's.", ReceiptLink()),
        ]
        for earlier, later in itertools.pairwise(tasks):
            earlier >> later
    return dag


def _asset(repo: str) -> Asset:
    return Asset(name=stage_asset(repo), uri=stage_asset(repo), group="stage-repos")


def _params(spec: PipelineSpec) -> dict[str, Param]:
    return {
        "commits": Param(
            {},
            type="object",
            title="Commits",
            description_md=(
                'Revision of each stage repo to run, such as `{"ds_mlmodeling": "3f2a91c0"}`; the head of `main` '
                f"where none is given. Repos: {', '.join(spec.repos)}."
            ),
            properties={repo: {"type": "string", "minLength": 1} for repo in spec.repos},
            additionalProperties=False,
        ),
        "reproduce": Param(
            None,
            type=["null", "string"],
            title="Reproduce",
            description_md="Version tag to make again: its commits, input and parameters.",
        ),
        "force": Param(
            False, type="boolean", title="Force", description_md="Run stages whose result is known already."
        ),
        "skip_approval": Param(
            False, type="boolean", title="Skip approval", description_md="Ask nobody before the release."
        ),
    }


def _flow(spec: PipelineSpec, step: str, doc: str, *links: Any) -> FlowOperator:
    task = FlowOperator(task_id=step, pipeline=spec.name, doc_md=doc)
    task.operator_extra_links = (*links, RunPageLink())
    return task


def _stage(spec: PipelineSpec, stage: Stage, doc: str, *links: Any) -> StageOperator:
    stage_spec = spec.stages[stage]
    task = StageOperator(
        task_id=stage.value,
        stage=stage,
        pool=STAGE_POOL,
        retries=stage_spec.retries,
        execution_timeout=timedelta(seconds=stage_spec.resources.timeout) + STAGE_MARGIN,
        doc_md=doc,
    )
    task.operator_extra_links = (*links, RunPageLink())
    return task


def _approve(spec: PipelineSpec) -> BaseOperator:
    # Imported where it is needed: few pipelines ask a person, and all are parsed.
    from airloom.operators.approve import ApproveOperator

    return ApproveOperator(
        task_id="approve",
        subject=f"Release the new model of {spec.name}?",
        body="{{ '\\n\\n'.join((ti.xcom_pull(task_ids='gate') or {}).get('reasons', [])) }}",
        # The wait for a person has no limit; the execution timeout bounds what is done before and after it.
        execution_timeout=None,
        doc_md="Ask a person; Reject ends the run without a release.",
    )
