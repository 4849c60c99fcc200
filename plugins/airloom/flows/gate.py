"""Decide on a candidate: thresholds, then not worse than the champion on the same data version."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airloom.contract import DataVersion, GateDecision, RunPlan, StageOutcome, Verdict, canonical_json
from airloom.contract.enums import Stage
from airloom.errors import ContractError, NotFoundError
from airloom.flows.gate_plot import gate_plot
from airloom.flows.resolve import plan_uri, spec_of
from airloom.hooks import mlflow_records as records
from airloom.hooks.mlflow_records import CANDIDATE, CHAMPION
from airloom.spec.pipeline import ChampionRule, GateSpec, Threshold

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.hooks.mlflow_records import ModelVersionInfo

CHAMPION_METRIC_PREFIX = "champion."
GATE_FILE = "gate.json"
PLOT_FILE = "gate.png"

# 0.95 - 0.945 is 0.0050000000000000044: a difference of rounding decides nothing.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Check:
    """One sentence with the figures that it rests on."""

    passed: bool
    text: str


def champion(hooks: Hooks, plan: RunPlan) -> ModelVersionInfo | None:
    """The model version that is served now; `None` before the first release.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    return hooks.mlflow.alias(plan.pipeline, CHAMPION)


def measured_beside(hooks: Hooks, plan: RunPlan, model_uri: str, digest: str | None) -> ModelVersionInfo | None:
    """What a candidate is evaluated together with: the champion.

    The champion itself, met again, is evaluated together with what it was when it was a candidate: the verdict that
    promoted it stands, and so does that evaluation.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    incumbent = champion(hooks, plan)
    if incumbent is None or not _same_model(incumbent, model_uri, digest):
        return incumbent
    version = incumbent.tags.get(records.GATE_CHAMPION_TAG)
    if not version:
        return None
    try:
        before = hooks.mlflow.version(plan.pipeline, version)
    except NotFoundError:
        return None
    return before if hooks.mlflow.model_exists(before.model_uri) else None


def decide(
    hooks: Hooks, *, plan: RunPlan, data_version: DataVersion, train: StageOutcome, evaluate: StageOutcome
) -> GateDecision:
    """Register the candidate, decide on it, and keep the verdict with its numbers on the MLflow run.

    A rejection is a decision and no error. Deciding again gives the same version and overwrites the verdict.

    Raises:
        ContractError: the training stage handed on no model.
        NotFoundError: its model is not in MLflow.
        UnavailableError: MLflow does not answer.
    """
    spec = spec_of(plan)
    model_uri = train.result.facts.get("model_uri")
    if not model_uri:
        raise ContractError(
            "the train stage handed on no 'model_uri'",
            hint=f"{plan.stages[Stage.TRAIN].repo} must log its model and say so in its result's facts",
        )
    mlflow_run_id = train.result.facts.get("mlflow_run_id") or hooks.mlflow.source_run(model_uri)
    if not mlflow_run_id:
        raise NotFoundError(f"nobody knows which MLflow run made {model_uri}", hint="train again with --force")
    incumbent = champion(hooks, plan)
    metrics, champion_metrics = split_metrics(evaluate.result.metrics)
    evaluated_against = evaluate.result.facts.get("champion_version")
    checks = [
        *check_thresholds(spec.gate, metrics),
        *check_champion(
            spec.gate.champion,
            metrics,
            champion_metrics,
            champion_version=incumbent.version if incumbent else None,
            evaluated_against=evaluated_against,
            same=incumbent is not None and _same_model(incumbent, model_uri, train.result.facts.get("model_digest")),
        ),
    ]
    failed = [check.text for check in checks if not check.passed]
    version = _register(hooks, plan, data_version, train, model_uri=model_uri, mlflow_run_id=mlflow_run_id)
    decision = GateDecision(
        verdict=Verdict.REJECTED if failed else Verdict.PROMOTED,
        reasons=[check.text for check in checks],
        failed=failed,
        metrics=finite(metrics),
        champion_metrics=finite(champion_metrics) if incumbent and champion_metrics else None,
        champion_version=evaluated_against or (incumbent.version if incumbent else None),
        model_name=plan.pipeline,
        model_version=version,
        mlflow_run_id=mlflow_run_id,
        data_tag=data_version.tag,
    )
    _record(hooks, plan, spec.gate, decision, evaluated_against or "")
    return decision


def split_metrics(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """An evaluation's figures: the candidate's, and the champion's without their prefix."""
    own = {name: value for name, value in metrics.items() if not name.startswith(CHAMPION_METRIC_PREFIX)}
    other = {
        name.removeprefix(CHAMPION_METRIC_PREFIX): value
        for name, value in metrics.items()
        if name.startswith(CHAMPION_METRIC_PREFIX)
    }
    return own, other


def check_thresholds(gate: GateSpec, metrics: Mapping[str, float]) -> list[Check]:
    """One check for each threshold. A figure that is missing or not finite passes none."""
    if not gate.thresholds and gate.champion is None:
        return [Check(True, "the gate has no checks: every candidate is promoted")]
    return [_check_threshold(name, bounds, metrics) for name, bounds in gate.thresholds.items()]


def check_champion(
    rule: ChampionRule | None,
    metrics: Mapping[str, float],
    champion_metrics: Mapping[str, float],
    *,
    champion_version: str | None,
    evaluated_against: str | None = None,
    same: bool = False,
) -> list[Check]:
    """The check against the champion, if the gate has one.

    Args:
        champion_version: of the champion now; `None` if there is none.
        evaluated_against: the champion's version when the evaluation ran, where that is known.
        same: whether the candidate is the champion, byte for byte.
    """
    if rule is None:
        return []
    if champion_version is None:
        return [Check(True, "there is no champion yet to compare with")]
    if same:
        return [Check(True, f"the candidate is the same model as the champion (version {champion_version})")]
    if evaluated_against is not None and evaluated_against != champion_version:
        text = (
            f"the champion is version {champion_version} now, but the candidate was evaluated against version "
            f"{evaluated_against}: another run was promoted meanwhile; run the pipeline again"
        )
        return [Check(False, text)]
    return [_check_regression(rule, metrics, champion_metrics, champion_version)]


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Only what JSON can carry to wherever decisions are read."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _check_threshold(name: str, bounds: Threshold, metrics: Mapping[str, float]) -> Check:
    value = metrics.get(name)
    parts = [f"at least {bounds.min:g}"] if bounds.min is not None else []
    parts += [f"at most {bounds.max:g}"] if bounds.max is not None else []
    asked = " and ".join(parts)
    if value is None:
        measured = ", ".join(sorted(metrics)) or "nothing"
        return Check(False, f"{name} must be {asked}, but the evaluation did not measure it; it measured {measured}")
    if not math.isfinite(value):
        return Check(False, f"{name} is {value}, which is no number; it must be {asked}")
    low = bounds.min is not None and value < bounds.min
    high = bounds.max is not None and value > bounds.max
    if low or high:
        return Check(False, f"{name} {figure(value)} is not {asked}")
    return Check(True, f"{name} {figure(value)} is {asked}")


def _check_regression(
    rule: ChampionRule, metrics: Mapping[str, float], champion_metrics: Mapping[str, float], champion_version: str
) -> Check:
    name = rule.metric
    own, other = metrics.get(name), champion_metrics.get(name)
    against = f"the champion's (version {champion_version})"
    if own is None or not math.isfinite(own):
        found = "was not measured" if own is None else f"is {own}"
        return Check(False, f"{name} of the candidate {found}, so it cannot be held against {against}")
    if other is None or not math.isfinite(other):
        found = "was not measured on this data version" if other is None else f"is {other} on this data version"
        return Check(False, f"{name} of the champion (version {champion_version}) {found}, so nothing can be compared")
    worse = other - own if rule.higher_is_better else own - other
    change = "equal to" if worse == 0 else f"{figure(abs(worse))} {'worse' if worse > 0 else 'better'} than"
    text = f"{name} {figure(own)} is {change} {against} {figure(other)}"
    allowed = f"at most {rule.max_regression:g} worse is allowed"
    if worse > rule.max_regression + _ROUNDING:
        return Check(False, f"{text}; {allowed}")
    return Check(True, f"{text}; {allowed}" if worse > 0 else text)


def figure(value: float) -> str:
    """A figure as people read it; enough digits to tell 0.9333 from 0.93."""
    return f"{value:.6g}"


def _same_model(incumbent: ModelVersionInfo, model_uri: str, digest: str | None) -> bool:
    return incumbent.model_uri == model_uri or (digest is not None and incumbent.digest == digest)


def _register(
    hooks: Hooks, plan: RunPlan, data_version: DataVersion, train: StageOutcome, *, model_uri: str, mlflow_run_id: str
) -> str:
    """The candidate's version. Its tags say where it came from, and stay if a later run meets it in the cache."""
    origin = {
        records.PIPELINE_TAG: plan.pipeline,
        records.RUN_TAG: plan.run_id,
        records.PLAN_TAG: plan_uri(hooks, plan),
        records.DATA_TAG: data_version.tag,
        records.DIGEST_TAG: train.result.facts.get("model_digest", ""),
        **{f"{records.COMMIT_TAG_PREFIX}{repo}": pin.commit for repo, pin in plan.code.items()},
    }
    tags = {name: value for name, value in origin.items() if value}
    version = hooks.mlflow.register(plan.pipeline, model_uri, mlflow_run_id, tags)
    hooks.mlflow.set_alias(plan.pipeline, CANDIDATE, version)
    return version


def _record(hooks: Hooks, plan: RunPlan, gate: GateSpec, decision: GateDecision, evaluated_against: str) -> None:
    """Write the verdict on the MLflow run and the model version, and end the run."""
    hooks.mlflow.set_version_tags(
        decision.model_name,
        decision.model_version,
        {
            records.GATE_TAG: decision.verdict.value,
            records.GATE_RUN_TAG: plan.run_id,
            records.GATE_CHAMPION_TAG: evaluated_against,
            records.METRICS_TAG: canonical_json(decision.metrics),
        },
    )
    hooks.mlflow.log(
        decision.mlflow_run_id,
        metrics=None,
        tags={
            records.GATE_TAG: decision.verdict.value,
            records.GATE_RUN_TAG: plan.run_id,
            f"{records.GATE_TAG}.reasons": "\n".join(decision.failed or decision.reasons),
            records.DATA_TAG: decision.data_tag,
        },
        artifacts={
            GATE_FILE: decision.model_dump(mode="json"),
            PLOT_FILE: gate_plot(gate, decision),
        },
    )
    hooks.mlflow.finish_run(decision.mlflow_run_id, "FINISHED")
