"""Tasks that run a stage: start, stream, adopt, stop, collect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airloom.contract.enums import Stage
from airloom.errors import AirloomError
from airloom.operators.flow import returned
from airloom.operators.notes import note_task
from airloom.operators.registry_login import REGISTRY_CONNECTION, login_from
from airloom.operators.wanted import STOP_SECONDS, StageLeftRunningError, is_wanted
from airloom.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

    from airloom.contract import StageOutcome
    from airloom.hooks.connect import Hooks
    from airloom.hooks.runner import JobHandle, Runner

# Which earlier task's result each argument of `run_stage` is.
ARGUMENTS = {
    Stage.PREPROCESS: {"plan": "resolve"},
    Stage.TRAIN: {"plan": "resolve", "data_version": "version"},
    Stage.EVALUATE: {"plan": "resolve", "data_version": "version", "train": "train"},
}
CACHE_XCOM = "cache"


class StageOperator(BaseOperator):
    """Run a stage of the pipeline and return its `StageOutcome` as JSON.

    The stage is no child of the task: it outlives a worker that is killed, and the next try adopts it. When the task
    is told to end, it asks Airflow why: a stage that nobody wants any more is stopped; one whose worker alone has
    to go (a lost heartbeat, a scheduler that restarts) is left running.

    Args:
        stage: preprocess, train or evaluate.

    Raises:
        AirflowFailException: trying again would not help.
        AirflowException: it might.
    """

    ui_color = "#e4f5e7"

    def __init__(self, *, stage: Stage, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if stage not in ARGUMENTS:
            raise ValueError(f"no task runs the stage {stage!r}; there are: {', '.join(ARGUMENTS)}")
        self.stage = Stage(stage)

    def execute(self, context: Context) -> dict[str, Any]:
        from airloom.flows.stages import run_stage
        from airloom.hooks.connect import Hooks

        hooks = Hooks(get_settings())
        ti = context["ti"]
        self._told_to_end = False
        self._job: tuple[Runner, JobHandle] | None = None
        self._waits = True

        def started(runner: Runner, handle: JobHandle) -> None:
            self._job = (runner, handle)

        def should_stop() -> bool:
            if not self._told_to_end:
                return False
            if not is_wanted(ti):
                return True
            raise StageLeftRunningError(
                f"this try ends, but stage {self.stage.value} goes on", hint="the next try adopts it"
            )

        try:
            inputs = {name: returned(ti, task) for name, task in ARGUMENTS[self.stage].items()}
            outcome = run_stage(
                hooks,
                stage=self.stage,
                on_log=lambda line: self.log.info("%s", line),
                should_stop=should_stop,
                on_start=started,
                registry_login=login_from(REGISTRY_CONNECTION),
                try_number=ti.try_number,
                **inputs,
            )
        except AirloomError as error:
            if not isinstance(error, StageLeftRunningError):
                note_task(hooks, context, str(error))
            again = getattr(error, "retryable", False)
            raise (AirflowException if again else AirflowFailException)(str(error)) from error
        finally:
            self._waits = False
        self._report(hooks, context, outcome)
        return outcome.model_dump(mode="json")

    def on_kill(self) -> None:
        """Called by Airflow in a signal handler while `execute` goes on, or after a timeout has ended it."""
        self._told_to_end = True
        job = getattr(self, "_job", None)
        if job is not None and not getattr(self, "_waits", False):
            runner, handle = job
            self.log.info("stopping %s", handle.label)
            runner.stop(handle, STOP_SECONDS)

    def _report(self, hooks: Hooks, context: Context, outcome: StageOutcome) -> None:
        """Say where people look whether the stage ran, and why."""
        used = {"cache": outcome.cache, "reason": outcome.reason, "key": outcome.key, "seconds": outcome.seconds}
        context["ti"].xcom_push(key=CACHE_XCOM, value=used)
        if outcome.cache == "hit":
            note = f"cache hit, not run: {outcome.reason}"
        else:
            note = f"cache {outcome.cache}: {outcome.reason}; ran {outcome.seconds:.1f} s"
        self.log.info("%s", note)
        note_task(hooks, context, note)
