"""Decisions that are kept in a real MLflow."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from airloom.contract import GateDecision, RunPlan, Stage, StageOutcome, Verdict
from airloom.errors import ContractError, NotFoundError
from airloom.flows.gate import champion, decide, measured_beside
from tests.fixtures.plans import TAG, MemoryStore, make_data_version, make_outcome, make_plan, make_spec

if TYPE_CHECKING:
    from tests.fixtures.registry import LoggedModel, RegistryFixture

FILES = {"model.json": b"{}", "weights/network.pt": b"weights"}


def hooks(models: RegistryFixture) -> Any:
    settings = SimpleNamespace(bucket_airloom="airloom")
    return SimpleNamespace(mlflow=models.registry, store=MemoryStore(), settings=settings)


def plan_of(models: RegistryFixture, run_id: str = "run-1", **gate: Any) -> RunPlan:
    return make_plan(run_id, make_spec(name=models.name, **({"gate": gate} if gate else {})))


def trained(model: LoggedModel, **facts: str) -> StageOutcome:
    known = {"model_uri": model.uri, "model_digest": model.digest, "mlflow_run_id": model.run_id, **facts}
    return make_outcome(Stage.TRAIN, facts={name: value for name, value in known.items() if value})


def deciding(
    models: RegistryFixture,
    plan: RunPlan,
    train: StageOutcome,
    *,
    facts: dict[str, str] | None = None,
    **metrics: float,
) -> GateDecision:
    figures = {name.replace("__", "."): value for name, value in metrics.items()}
    evaluate = make_outcome(Stage.EVALUATE, metrics=figures, facts=facts)
    return decide(hooks(models), plan=plan, data_version=make_data_version(), train=train, evaluate=evaluate)


def test_a_first_candidate_is_promoted_and_everything_is_kept(models: RegistryFixture) -> None:
    model, plan = models.log_model(FILES), plan_of(models)
    decision = deciding(models, plan, trained(model), accuracy=0.95, log_loss=0.2)
    assert decision.verdict is Verdict.PROMOTED
    assert decision.failed == []
    assert (decision.model_name, decision.model_version, decision.data_tag) == (models.name, "1", TAG)
    assert (decision.champion_version, decision.champion_metrics) == (None, None)

    candidate = models.registry.alias(models.name, "candidate")
    assert candidate is not None
    assert candidate.version == "1"
    assert candidate.digest == model.digest
    assert candidate.tags["airloom.run_id"] == "run-1"
    assert candidate.tags["airloom.plan"] == f"s3://airloom/runs/{models.name}/run-1/plan.json"
    assert candidate.tags["airloom.commit.ds_model"] == "b" * 40
    assert candidate.tags["airloom.data_tag"] == TAG
    assert candidate.tags["airloom.gate"] == "promoted"
    assert json.loads(candidate.tags["airloom.metrics"]) == {"accuracy": 0.95, "log_loss": 0.2}

    run = models.registry.run_info(model.run_id)
    assert run.status == "FINISHED"
    assert run.tags["airloom.gate"] == "promoted"
    kept = models.api.read_file(run.artifact_uri, "gate.json")
    assert GateDecision.model_validate_json(kept) == decision
    assert models.api.read_file(run.artifact_uri, "gate.png").startswith(b"\x89PNG")


def test_deciding_again_changes_nothing(models: RegistryFixture) -> None:
    model, plan = models.log_model(FILES), plan_of(models)
    first = deciding(models, plan, trained(model), accuracy=0.95)
    before = models.registry.version(models.name, "1")
    assert deciding(models, plan, trained(model), accuracy=0.95) == first
    assert models.registry.version(models.name, "1") == before
    assert len(models.registry.versions(models.name)) == 1


def test_a_worse_candidate_is_rejected_and_the_champion_stays(models: RegistryFixture) -> None:
    good, worse = models.log_model(FILES, key="good"), models.log_model({**FILES, "more": b"x"}, key="worse")
    deciding(models, plan_of(models, "run-1"), trained(good), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    plan = plan_of(models, "run-2")
    decision = deciding(models, plan, trained(worse), accuracy=0.92, champion__accuracy=0.95)
    assert decision.verdict is Verdict.REJECTED
    assert len(decision.failed) == 1
    assert "0.03 worse than the champion's (version 1)" in decision.failed[0]
    assert decision.champion_metrics == {"accuracy": 0.95}
    incumbent = champion(hooks(models), plan)
    assert incumbent is not None
    assert incumbent.version == "1"
    assert models.registry.version(models.name, "2").tags["airloom.gate"] == "rejected"
    assert "worse" in models.registry.run_info(worse.run_id).tags["airloom.gate.reasons"]


def test_a_candidate_that_was_not_held_against_the_champion_is_rejected(models: RegistryFixture) -> None:
    one, two = models.log_model(FILES, key="1"), models.log_model({**FILES, "more": b"x"}, key="2")
    deciding(models, plan_of(models, "run-1"), trained(one), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    decision = deciding(models, plan_of(models, "run-2"), trained(two), accuracy=0.99)
    assert decision.verdict is Verdict.REJECTED
    assert "was not measured on this data version" in decision.failed[0]
    facts = {"champion_version": "7"}
    decision = deciding(
        models, plan_of(models, "run-2"), trained(two), facts=facts, accuracy=0.99, champion__accuracy=0.9
    )
    assert "evaluated against version 7" in decision.failed[0]


def test_the_champion_met_again_in_the_cache_keeps_its_version(models: RegistryFixture) -> None:
    model = models.log_model(FILES)
    deciding(models, plan_of(models, "run-1"), trained(model), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    decision = deciding(models, plan_of(models, "run-2"), trained(model), accuracy=0.95)
    assert (decision.verdict, decision.model_version, decision.champion_version) == (Verdict.PROMOTED, "1", "1")
    assert any("same model as the champion (version 1)" in reason for reason in decision.reasons)
    tags = models.registry.version(models.name, "1").tags
    assert (tags["airloom.run_id"], tags["airloom.gate.run_id"]) == ("run-1", "run-2")


def test_the_champion_met_again_keeps_what_it_was_measured_beside(models: RegistryFixture) -> None:
    one, two = models.log_model(FILES, key="1"), models.log_model({**FILES, "more": b"x"}, key="2")
    deciding(models, plan_of(models, "run-1"), trained(one), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    beside = measured_beside(hooks(models), plan_of(models), two.uri, two.digest)
    assert beside is not None
    assert beside.version == "1"
    figures = {"accuracy": 0.97, "champion__accuracy": 0.95}
    first = deciding(models, plan_of(models, "run-2"), trained(two), facts={"champion_version": "1"}, **figures)
    models.registry.set_alias(models.name, "champion", "2")
    for run_id in ("run-3", "run-4"):  # what the first of them decides is what the second finds
        beside = measured_beside(hooks(models), plan_of(models), two.uri, two.digest)
        assert beside is not None
        facts = {"champion_version": beside.version}
        later = deciding(models, plan_of(models, run_id), trained(two), facts=facts, **figures)
        assert (later.verdict, later.champion_version) == (Verdict.PROMOTED, "1")
        assert later.champion_metrics == first.champion_metrics == {"accuracy": 0.95}
        assert any("same model as the champion (version 2)" in reason for reason in later.reasons)
    models.registry.set_alias(models.name, "champion", "1")
    assert measured_beside(hooks(models), plan_of(models), one.uri, one.digest) is None, "it was the first"


def test_a_champion_below_a_new_threshold_is_told(models: RegistryFixture) -> None:
    model = models.log_model(FILES)
    deciding(models, plan_of(models, "run-1"), trained(model), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    stricter = plan_of(models, "run-2", thresholds={"accuracy": {"min": 0.99}})
    assert deciding(models, stricter, trained(model), accuracy=0.95).verdict is Verdict.REJECTED


def test_equal_bytes_of_another_run_are_the_same_model(models: RegistryFixture) -> None:
    one, two = models.log_model(FILES, key="1"), models.log_model(FILES, key="2")
    deciding(models, plan_of(models, "run-1"), trained(one), accuracy=0.95)
    models.registry.set_alias(models.name, "champion", "1")
    decision = deciding(models, plan_of(models, "run-2"), trained(two), accuracy=0.95)
    assert (decision.verdict, decision.model_version) == (Verdict.PROMOTED, "2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_rejected_and_can_be_kept(models: RegistryFixture, value: float) -> None:
    model = models.log_model(FILES)
    decision = deciding(models, plan_of(models), trained(model), accuracy=value, log_loss=0.1)
    assert decision.verdict is Verdict.REJECTED
    assert "which is no number" in decision.failed[0]
    json.dumps(decision.model_dump(mode="json"), allow_nan=False)


def test_the_run_of_a_model_is_found_where_nobody_said_it(models: RegistryFixture) -> None:
    model = models.log_model(FILES)
    decision = deciding(models, plan_of(models), trained(model, mlflow_run_id=""), accuracy=0.95)
    assert decision.mlflow_run_id == model.run_id


def test_a_training_without_a_model_is_a_broken_contract(models: RegistryFixture) -> None:
    with pytest.raises(ContractError, match="no 'model_uri'"):
        deciding(models, plan_of(models), make_outcome(Stage.TRAIN), accuracy=0.95)


def test_a_model_that_is_not_there_is_never_registered(models: RegistryFixture) -> None:
    uri = f"models:/m-{'0' * 32}"
    run_id = models.registry.start_run(models.name, "x")
    train = make_outcome(Stage.TRAIN, facts={"model_uri": uri, "mlflow_run_id": run_id})
    with pytest.raises(NotFoundError, match=uri):
        deciding(models, plan_of(models), train, accuracy=0.95)
    assert models.registry.versions(models.name) == []
