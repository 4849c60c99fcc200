"""The way back: what came of a commit is said on the commit itself, and a release is published on the git server.

Nothing here may fail a run. Saying it again changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from urllib.parse import quote

from airloom.contract import DataVersion, Frozen, GateDecision, Release, RunPlan, Stage, Verdict, VerifyReport
from airloom.errors import AirloomError
from airloom.flows.gate import figure
from airloom.hooks.connect import Hooks
from airloom.hooks.gitbucket import StatusState

log = logging.getLogger(__name__)

# Followed by the pipeline's name, since several may use one commit.
DATA, GATE, RELEASE = "airloom/data", "airloom/gate", "airloom/release"
# A name of its own: what begins with the pipeline's are version tags.
RELEASE_TAG = "release/{pipeline}/{version}"
_MADE_OF = (Stage.PREPROCESS, Stage.TRAIN, Stage.EVALUATE)


def report_result(hooks: Hooks, plan: RunPlan, result: Frozen) -> None:
    """Say what a task of a run has decided or made, on the commits that it is made of."""
    if isinstance(result, DataVersion):
        made = "" if result.created else ", as an earlier run made it"
        text = f"{result.tag}: {result.files} files, {result.size_bytes:,} bytes{made}"
        url = hooks.gitbucket.tag_url(result.repo, result.tag)
        _set(hooks, plan, (Stage.PREPROCESS,), (DATA, "success", text), url)
    elif isinstance(result, GateDecision):
        rejected = result.verdict is Verdict.REJECTED
        reasons = [*result.failed, *(reason for reason in result.reasons if reason not in result.failed)]
        text = f"{plan.pipeline}: model {result.model_version} {result.verdict.value}: {'; '.join(reasons)}"
        _set(hooks, plan, _MADE_OF, (GATE, "failure" if rejected else "success", text))
    elif isinstance(result, Release):
        text = f"release {result.version} of {plan.pipeline} was made; it is being deployed"
        _set(hooks, plan, tuple(plan.stages), (RELEASE, "pending", text))


def report_verified(
    hooks: Hooks,
    plan: RunPlan,
    report: VerifyReport,
    *,
    release: Release,
    decision: GateDecision,
    data_version: DataVersion,
) -> None:
    """Say that a release answers, and publish it on the git server with its model card."""
    text = f"release {release.version} of {plan.pipeline} answers: model {release.model_version}, {_metrics(release)}"
    if report.superseded_by:
        text = f"release {release.version} of {plan.pipeline} was made; {report.superseded_by} of a later run answers"
    _set(hooks, plan, tuple(plan.stages), (RELEASE, "success", text))
    code = plan.code_of(Stage.TRAIN)
    tag = RELEASE_TAG.format(pipeline=plan.pipeline, version=release.version)
    try:
        hooks.git.push(code.repo, hooks.git.mirror(code.repo), f"{code.commit}:refs/tags/{tag}")
        card = model_card(plan, release=release, decision=decision, data_version=data_version)
        hooks.gitbucket.create_release(code.repo, tag, f"{plan.pipeline} {release.version}", card)
    except AirloomError as error:
        log.warning("release %s could not be published on the git server: %s", release.version, error.message)


def report_failed_release(hooks: Hooks, plan: RunPlan, release: Release, reason: str) -> None:
    """Say why a release does not answer."""
    text = f"release {release.version} of {plan.pipeline}: {reason}"
    _set(hooks, plan, tuple(plan.stages), (RELEASE, "failure", text))


def context_of(kind: str, pipeline: str) -> str:
    """What the status of a kind is called for a pipeline: `airloom/gate/digits`."""
    return f"{kind}/{pipeline}"


def model_card(plan: RunPlan, *, release: Release, decision: GateDecision, data_version: DataVersion) -> str:
    """What a model is, was made of and was held against, as Markdown."""
    champion = decision.champion_metrics or {}
    head = "| metric | value |" + (f" version {decision.champion_version} before it |" if champion else "")
    lines = [
        f"# {plan.pipeline} {release.version}",
        "",
        f"Model `{release.model_name}` version {release.model_version} (`sha256:{release.model_digest}`).",
        "",
        head,
        "|---|---|" + ("---|" if champion else ""),
    ]
    for name, value in sorted(decision.metrics.items()):
        before = f" {figure(champion[name])} |" if name in champion else " |" if champion else ""
        lines.append(f"| {name} | {figure(value)} |{before}")
    lines += ["", "## Gate", "", *(f"- {reason}" for reason in decision.reasons), "", "## Made of", ""]
    lines += [f"- `{pin.repo}@{pin.commit[:12]}` {pin.message.partition(chr(10))[0]}" for pin in plan.code.values()]
    lines += [
        f"- data version `{data_version.tag}`: {data_version.files} files, {data_version.size_bytes:,} bytes,"
        f" md5 `{data_version.md5}`",
        f"- raw data `{plan.source.uri}`: {plan.source.objects:,} objects, digest `{plan.source.digest[:12]}`",
        f"- run `{plan.run_id}`, MLflow run `{release.mlflow_run_id}`, environment `{release.environment[:12]}`",
    ]
    for stage, pin in plan.stages.items():
        if pin.params:
            shown = ", ".join(f"{name} {value}" for name, value in sorted(pin.params.items()))
            lines.append(f"- {stage.value}: {shown}; seed {pin.seed}")
    lines += ["", f"To make it again: `airloom run {plan.pipeline} --reproduce {data_version.tag}`"]
    return "\n".join(lines) + "\n"


def _metrics(release: Release) -> str:
    return ", ".join(f"{name} {figure(value)}" for name, value in sorted(release.metrics.items()))


def _set(
    hooks: Hooks, plan: RunPlan, stages: Iterable[Stage], status: tuple[str, StatusState, str], url: str | None = None
) -> None:
    """Set one status (context, state, text) on the commits that stages of the run are made of."""
    context, state, text = status
    pins = {plan.code_of(stage).repo: plan.code_of(stage) for stage in stages if stage in plan.stages}
    run = f"{hooks.settings.airflow_page_url}/dags/{quote(plan.pipeline, safe='')}/runs/{quote(plan.run_id, safe='')}"
    try:
        for pin in pins.values():
            hooks.gitbucket.set_status(
                pin.repo,
                pin.commit,
                state=state,
                context=context_of(context, plan.pipeline),
                description=text,
                target_url=url or run,
            )
    except AirloomError as error:
        log.warning("the status %s could not be set: %s", context, error.message)
