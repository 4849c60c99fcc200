"""Writes what happens to tasks and runs into the ledger, and cleans up after runs that have ended.

Airflow calls the task hooks in the task's own process and the run hooks in the scheduler. Nothing here may
fail or hold up either: every error is logged and forgotten, and what may take long runs beside.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from airflow.exceptions import AirflowException
from airflow.listeners import hookimpl

log = logging.getLogger(__name__)

DAG_TAG = "airloom"

# Set for the scheduler alone, whose forked workers start tasks: what it has imported they need not import.
PRELOAD_VARIABLE = "AIRLOOM_PRELOAD"
PRELOADED = (
    "airflow.sdk.execution_time.supervisor",
    "airflow.sdk.execution_time.task_runner",
    "airflow.dag_processing.dagbag",
    "airloom.dag_factory",
    "airloom.hooks.airflow_api",
    "airloom.hooks.ledger_tables",
    "requests",
    "tenacity",
)


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:
            log.warning("the ledger was not written", exc_info=True)

    return wrapped


# pluggy matches hooks by the names of their arguments, so each keeps its own signature and hands on to a
# function that cannot raise.


@hookimpl
def on_starting(component: Any) -> None:
    """A component of Airflow begins. The scheduler has not forked its workers yet."""
    if os.environ.get(PRELOAD_VARIABLE):
        for name in PRELOADED:
            try:
                importlib.import_module(name)
            except Exception:
                log.warning("%s was not preloaded", name, exc_info=True)


@hookimpl
def on_task_instance_running(previous_state: Any, task_instance: Any) -> None:
    """A try has begun."""
    _record_task(task_instance, "running")


@hookimpl
def on_task_instance_success(previous_state: Any, task_instance: Any) -> None:
    """A try has ended well."""
    _record_task(task_instance, "success")


@hookimpl
def on_task_instance_failed(previous_state: Any, task_instance: Any, error: Any) -> None:
    """A try has failed; Airflow may try again."""
    _record_task(task_instance, "failed", error)


@hookimpl
def on_task_instance_skipped(previous_state: Any, task_instance: Any) -> None:
    """A task has skipped itself."""
    _record_task(task_instance, "skipped")


@hookimpl
def on_dag_run_running(dag_run: Any, msg: str) -> None:
    """A run has begun."""
    _record_run(dag_run, "running")


@hookimpl
def on_dag_run_success(dag_run: Any, msg: str) -> None:
    """A run has ended well."""
    _record_run(dag_run, "success")


@hookimpl
def on_dag_run_failed(dag_run: Any, msg: str) -> None:
    """A run has failed. Only this hook tells of a task whose worker was killed."""
    _record_run(dag_run, "failed")


@_harmless
def _record_task(ti: Any, state: str, error: Any = None) -> None:
    if not _is_pipeline_task(ti):
        return
    from airloom.flows.figures import figures_of
    from airloom.hooks.ledger import Ledger, TaskOutcome
    from airloom.settings import get_settings

    started = ti.start_date
    finished = None if state == "running" else (ti.end_date or datetime.now(UTC))
    # A task returns nothing unless it succeeds, and its return value can be asked for only by then.
    returned = ti.xcom_pull(task_ids=ti.task_id) if state == "success" else None
    found = figures_of(ti.task_id, returned)
    ledger = Ledger.from_settings(get_settings())
    ledger.record_task(
        TaskOutcome(
            pipeline=ti.dag_id,
            run_id=ti.run_id,
            task=ti.task_id,
            attempt=ti.try_number,
            state=state,
            started_at=started,
            finished_at=finished,
            seconds=(finished - started).total_seconds() if finished and started else None,
            cache=found.cache,
            reason=_said(error) if error else found.reason,
            values=found.values,
        )
    )
    if found.verdict:
        ledger.record_run(ti.dag_id, ti.run_id, verdict=found.verdict)


@_harmless
def _record_run(dag_run: Any, state: str) -> None:
    if not _is_pipeline_run(dag_run):
        return
    pipeline, run_id = dag_run.dag_id, dag_run.run_id
    started, finished = dag_run.start_date, None if state == "running" else (dag_run.end_date or datetime.now(UTC))
    # The scheduler's loop must not wait for a database or for processes that end.
    threading.Thread(
        target=_after_run, args=(pipeline, run_id, state, started, finished), name="airloom-run-outcome", daemon=True
    ).start()


def _after_run(pipeline: str, run_id: str, state: str, started: datetime, finished: datetime | None) -> None:
    from airloom.settings import get_settings

    settings = get_settings()
    try:
        from airloom.hooks.ledger import Ledger

        Ledger.from_settings(settings).record_run(
            pipeline, run_id, state=state, started_at=started, finished_at=finished
        )
    except Exception:
        log.warning("the ledger was not written", exc_info=True)
    if finished is None:
        return
    try:
        from airloom.flows.reap import reap_run

        reap_run(settings, pipeline, run_id)
    except Exception:
        log.warning("what the run %s of %s has left could not be cleaned up", run_id, pipeline, exc_info=True)


def _said(error: Any) -> str:
    """An error's message; that of one which was not foreseen says little without its kind."""
    from airloom.errors import AirloomError

    foreseen = not isinstance(error, BaseException) or isinstance(error, AirloomError | AirflowException)
    return str(error) if foreseen else f"{type(error).__name__}: {error}"


def _is_pipeline_task(ti: Any) -> bool:
    return DAG_TAG in (getattr(ti.task.dag, "tags", None) or ())


def _is_pipeline_run(dag_run: Any) -> bool:
    """Whether the run is of a DAG that Airloom made: others have no configuration of that name."""
    from airloom.settings import get_settings

    return (get_settings().configs_dir / f"{dag_run.dag_id}.yaml").is_file()
