"""Tasks that decide and record: each calls one function of `airloom.flows` with what earlier tasks returned."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator
from airflow.sdk.bases.skipmixin import SkipMixin
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airloom.contract import (
    DataVersion,
    Deployment,
    Frozen,
    GateDecision,
    Release,
    RunPlan,
    StageOutcome,
    ValidationReport,
    Verdict,
    VerifyReport,
)
from airloom.errors import AirloomError, ConfigError, DataRejectedError, RolledBackError, StageFailedError
from airloom.operators.notes import decision_note, note_run, note_task, plan_note
from airloom.operators.trigger import pinned_at, pushed_commits, trigger_of
from airloom.settings import get_settings

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

    from airloom.contract.build import BuildRecord
    from airloom.hooks.connect import Hooks

# What each task returns, for those that come after it.
RETURNS: dict[str, type[Frozen]] = {
    "resolve": RunPlan,
    "preprocess": StageOutcome,
    "validate": ValidationReport,
    "version": DataVersion,
    "train": StageOutcome,
    "evaluate": StageOutcome,
    "gate": GateDecision,
    "release": Release,
    "deploy": Deployment,
}


@dataclass(frozen=True)
class Step:
    """A function of `airloom.flows` (`module:function`), and which task's result each of its arguments is."""

    function: str
    arguments: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., Frozen]:
        """Import the function: here and not earlier, because flows import what parsing must not."""
        module, name = self.function.split(":")
        loaded: Callable[..., Frozen] = getattr(importlib.import_module(f"airloom.flows.{module}"), name)
        return loaded


_PLAN = {"plan": "resolve"}
STEPS = {
    "resolve": Step("resolve:resolve"),
    "validate": Step("validate:validate_dataset", {**_PLAN, "outcome": "preprocess"}),
    "version": Step("version:version_dataset", {**_PLAN, "outcome": "preprocess"}),
    "gate": Step("gate:decide", {**_PLAN, "data_version": "version", "train": "train", "evaluate": "evaluate"}),
    "release": Step(
        "release:make_release",
        {**_PLAN, "decision": "gate", "train": "train", "evaluate": "evaluate", "data_version": "version"},
    ),
    "deploy": Step("deploy:deploy_release", {**_PLAN, "release": "release"}),
    "verify": Step("verify:verify_release", {**_PLAN, "release": "release", "deployment": "deploy"}),
}


class FlowOperator(BaseOperator, SkipMixin):
    """Run the flow that the task is named after and return its result as JSON.

    What an `AirloomError` says is not retryable fails the task at once; anything else is tried again. A gate's
    rejection is a decision: the task succeeds, what comes after it is skipped, and so the run succeeds.

    Args:
        pipeline: name of the pipeline.

    Raises:
        AirflowFailException: trying again would not help.
        AirflowException: it might.
    """

    ui_color = "#e6eefc"

    def __init__(self, *, pipeline: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.task_id not in STEPS:
            raise ValueError(f"no flow is called {self.task_id!r}; there are: {', '.join(STEPS)}")
        self.pipeline = pipeline

    def execute(self, context: Context) -> dict[str, Any]:
        from airloom.hooks.connect import Hooks

        hooks = Hooks(get_settings())
        try:
            if self.task_id == "resolve":
                result = self._resolve(hooks, context)
            else:
                step = STEPS[self.task_id]
                inputs = {name: returned(context["ti"], task) for name, task in step.arguments.items()}
                if self.task_id == "deploy":
                    inputs["on_step"] = lambda text: self.log.info("%s", text)
                result = step.load()(hooks, **inputs)
        except (DataRejectedError, RolledBackError) as error:
            note_task(hooks, context, str(error))
            self._say_why_not_served(hooks, context, error)
            raise AirflowFailException(str(error)) from error
        except AirloomError as error:
            note_task(hooks, context, str(error))
            final = not getattr(error, "retryable", False)
            if final:
                self._say_why_not_served(hooks, context, error)
            raise (AirflowFailException if final else AirflowException)(str(error)) from error
        self._say_on_commits(hooks, context, result)
        self._report(hooks, context, result)
        return result.model_dump(mode="json")

    def _resolve(self, hooks: Hooks, context: Context) -> Frozen:
        from airloom.flows.resolve import RunParams
        from airloom.spec import load_pipeline

        given = dict(context["params"])
        events = context.get("triggering_asset_events")
        try:
            params = RunParams(
                commits={**pushed_commits(events), **(given.get("commits") or {})},
                reproduce=given.get("reproduce") or None,
                force=bool(given.get("force")),
                skip_approval=bool(given.get("skip_approval")),
            )
        except ValueError as error:
            raise ConfigError(f"the run's parameters are wrong: {error}") from error
        return STEPS["resolve"].load()(
            hooks,
            spec=load_pipeline(hooks.settings.configs_dir / f"{self.pipeline}.yaml"),
            run_id=context["run_id"],
            params=params,
            trigger=trigger_of(context["dag_run"], events),
            now=pinned_at(context["dag_run"]),
        )

    def _say_on_commits(self, hooks: Hooks, context: Context, result: Frozen) -> None:
        """Say on the commits what came of them, and publish what is served."""
        from airloom.flows import commit_report

        ti = context["ti"]
        if isinstance(result, VerifyReport):
            commit_report.report_verified(
                hooks,
                returned(ti, "resolve"),
                result,
                release=returned(ti, "release"),
                decision=returned(ti, "gate"),
                data_version=returned(ti, "version"),
            )
        elif isinstance(result, DataVersion | GateDecision | Release):
            commit_report.report_result(hooks, returned(ti, "resolve"), result)

    def _say_why_not_served(self, hooks: Hooks, context: Context, error: AirloomError) -> None:
        from airloom.flows.commit_report import report_failed_release

        if self.task_id not in {"deploy", "verify"}:
            return
        with suppress(StageFailedError):  # without a plan or a release there is nothing to say it of
            ti = context["ti"]
            report_failed_release(hooks, returned(ti, "resolve"), returned(ti, "release"), error.message)

    def _report(self, hooks: Hooks, context: Context, result: Frozen) -> None:
        """Say what was decided where people look: the log, the task's note and the run's note."""
        if isinstance(result, RunPlan):
            note_run(hooks, context, plan_note(result, self._builds(hooks, result)))
        elif isinstance(result, GateDecision):
            for reason in result.reasons:
                self.log.info("%s", reason)
            note_task(hooks, context, decision_note(result))
            plan = returned(context["ti"], "resolve")
            note_run(hooks, context, f"{plan_note(plan, self._builds(hooks, plan))}\n\n{decision_note(result)}")
            if result.verdict is Verdict.REJECTED:
                self._end_run(context, result, "the gate rejected the candidate; the champion stays")
        elif isinstance(result, ValidationReport):
            for check in result.checks:
                self.log.info("%s", check)
            note_task(hooks, context, "\n".join(result.checks))
        elif isinstance(result, DataVersion):
            made = "made" if result.created else "unchanged, made by an earlier run"
            note_task(hooks, context, f"{result.tag} ({made}); {result.files} files, {result.size_bytes} bytes")
        elif isinstance(result, Release):
            note_task(hooks, context, f"release {result.version}: {result.model_name} version {result.model_version}")
        elif isinstance(result, Deployment):
            note_task(
                hooks, context, f"{result.release} is {result.state}" + f": {result.detail}" * bool(result.detail)
            )
        elif isinstance(result, VerifyReport):
            checked = f"release {result.release}: {result.equal} of {result.checked} answers are the evaluation's"
            later = f"release {result.superseded_by} of a later run answers instead of {result.release}"
            note_task(hooks, context, later if result.superseded_by else checked)

    def _builds(self, hooks: Hooks, plan: RunPlan) -> dict[str, BuildRecord]:
        from airloom.flows.build import builds_of

        return builds_of(hooks, {repo: pin.commit for repo, pin in plan.code.items()})

    def _end_run(self, context: Context, result: Frozen, reason: str) -> None:
        """Skip all tasks that come after this one."""
        self.log.info("%s: what comes after it is skipped", reason)
        # Skipping raises, so that `execute` never returns what it decided.
        context["ti"].xcom_push(key="return_value", value=result.model_dump(mode="json"))
        self.skip(context["ti"], self.get_flat_relatives(upstream=False))


def returned(ti: Any, task_id: str) -> Any:
    """What an earlier task of the run returned, as the contract's model.

    Raises:
        StageFailedError: it returned nothing.
    """
    value = ti.xcom_pull(task_ids=task_id)
    if value is None:
        raise StageFailedError(
            f"the task {task_id!r} has handed nothing on",
            hint=f"run the pipeline again, or clear {task_id!r} in Airflow",
        )
    return RETURNS[task_id].model_validate(value)
