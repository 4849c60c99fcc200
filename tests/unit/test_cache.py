"""Keys of the stage cache, and what people are told about a miss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from airloom.contract import RunPlan, Stage, StageOutcome, StagePin
from airloom.errors import ContractError
from airloom.flows import cache
from airloom.flows.cache_lookup import lookup, why_new
from airloom.hooks.mlflow import ModelRegistry
from tests.fixtures.plans import MemoryStore, make_data_version, make_outcome, make_plan, make_spec

INPUTS = {"dataset": "0" * 32 + ".dir"}
PARAMS = {"epochs": 6, "split": {"train": 0.7, "test": 0.3}}


def plan_with(run_id: str = "run-1", **pin: Any) -> RunPlan:
    values = {"repo": "ds_model", "code_digest": "d" * 64, "environment": "e" * 64, "params": PARAMS, "seed": 7, **pin}
    plan = make_plan(run_id)
    return plan.model_copy(update={"stages": {**plan.stages, Stage.TRAIN: StagePin(**values)}})


def parts(inputs: dict[str, str] | None = None, **pin: Any) -> cache.KeyParts:
    return cache.key_parts(plan_with(**pin), Stage.TRAIN, INPUTS if inputs is None else inputs)


def entry(**changes: Any) -> cache.CacheEntry:
    values = {
        "key": parts().key,
        "parts": parts(),
        "run_id": "run-1",
        "commit": "b" * 40,
        "recorded_at": 1.0,
        "seconds": 2.0,
        "result": make_outcome(Stage.TRAIN).result,
        **changes,
    }
    return cache.CacheEntry(**values)


def hooks_of(store: MemoryStore, *, model_exists: bool = True) -> Any:
    from unittest.mock import create_autospec

    registry = create_autospec(ModelRegistry, instance=True)
    registry.model_exists.return_value = model_exists
    return SimpleNamespace(store=store, mlflow=registry, settings=SimpleNamespace(bucket_airloom="airloom"))


def trained(**changes: Any) -> StageOutcome:
    outcome = make_outcome(Stage.TRAIN, facts={"model_uri": "models:/m-1", "model_digest": "a" * 64})
    return outcome.model_copy(update={"key": parts().key, **changes})


@pytest.mark.parametrize(
    "pin",
    [
        {"code_digest": "f" * 64},
        {"environment": "f" * 64},
        {"params": {**PARAMS, "epochs": 8}},
        {"params": {**PARAMS, "more": None}},
        {"seed": 8},
    ],
)
def test_what_changes_a_key(pin: dict[str, Any]) -> None:
    assert parts(**pin).key != parts().key


def test_inputs_and_stage_and_pipeline_change_a_key() -> None:
    keys = {
        parts().key,
        parts({"dataset": "1" * 32 + ".dir"}).key,
        parts({**INPUTS, "champion": "none"}).key,
        cache.key_parts(plan_with(), Stage.EVALUATE, INPUTS).key,
        cache.key_parts(make_plan(spec=make_spec(name="other")), Stage.TRAIN, INPUTS).key,
    }
    assert len(keys) == 5


def test_what_does_not_change_a_key() -> None:
    plan = plan_with("another-run")
    moved = plan.code["ds_model"].model_copy(update={"commit": "9" * 40, "message": "Change the README"})
    plan = plan.model_copy(update={"code": {**plan.code, "ds_model": moved}, "force": True})
    assert cache.key_parts(plan, Stage.TRAIN, INPUTS).key == parts().key
    assert parts(params=dict(reversed(PARAMS.items()))).key == parts().key


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (parts(code_digest="f" * 64), "code changed"),
        (parts(params={**PARAMS, "epochs": 8}), "parameters changed: epochs 6 -> 8"),
        (
            parts(params={"epochs": 6, "split": {"train": 0.8, "test": 0.3}}),
            "parameters changed: split.train 0.7 -> 0.8",
        ),
        (parts(params={"split": PARAMS["split"]}), "parameters changed: epochs 6 removed"),
        (parts(params={**PARAMS, "width": 16}), "parameters changed: width 16 added"),
        (parts(seed=8), "seed changed: 7 -> 8"),
        (parts({"dataset": "other"}), "data changed"),
        (parts({**INPUTS, "champion": "abc"}), "champion new"),
        (parts(environment="f" * 64), "environment changed: eeeeeeee -> ffffffff"),
        (parts(code_digest="f" * 64, seed=8), "code changed; seed changed: 7 -> 8"),
        (parts(), "the result of run-1 is no longer in the cache"),
    ],
)
def test_reasons_of_a_miss(now: cache.KeyParts, reason: str) -> None:
    assert why_new(entry(), now) == reason


def test_many_changed_parameters_are_counted() -> None:
    reason = why_new(entry(), parts(params={**PARAMS, **{f"p{n}": n for n in range(9)}}))
    assert reason.endswith("and 5 more")


def test_first_run() -> None:
    assert why_new(None, parts()) == "first run of this stage"


def test_recorded_and_found() -> None:
    store = MemoryStore()
    hooks = hooks_of(store)
    assert lookup(hooks, parts()).reason == "first run of this stage"
    cache.record(hooks, plan_with(), trained(), inputs=INPUTS)
    found = lookup(hooks, parts())
    assert found.entry is not None
    assert found.entry.result.facts["model_uri"] == "models:/m-1"
    assert found.reason == "equal to run run-1"
    assert lookup(hooks, parts(params={**PARAMS, "epochs": 8})).reason == "parameters changed: epochs 6 -> 8"
    assert {key for _, key in store.objects} == {f"cache/train/{parts().key}.json", "cache/train/latest/digits.json"}


def test_a_hit_counts_only_while_its_model_exists() -> None:
    store = MemoryStore()
    cache.record(hooks_of(store), plan_with(), trained(), inputs=INPUTS)
    found = lookup(hooks_of(store, model_exists=False), parts())
    assert found.entry is None
    assert found.lost
    assert "models:/m-1 is gone from MLflow" in found.reason


def test_a_hit_is_not_recorded_again() -> None:
    store = MemoryStore()
    cache.record(hooks_of(store), plan_with(), trained(cache="hit"), inputs=INPUTS)
    assert not store.objects


def test_inputs_that_do_not_give_the_key() -> None:
    with pytest.raises(ContractError, match="has the key"):
        cache.record(hooks_of(MemoryStore()), plan_with(), trained(), inputs={"dataset": "other"})


def test_preprocess_needs_its_data_version() -> None:
    plan = make_plan()
    outcome = make_outcome(Stage.PREPROCESS)
    outcome = outcome.model_copy(update={"key": cache.key_parts(plan, Stage.PREPROCESS, cache.source_inputs(plan)).key})
    store = MemoryStore()
    with pytest.raises(ContractError, match="without a data version"):
        cache.record(hooks_of(store), plan, outcome)
    cache.record(hooks_of(store), plan, outcome.model_copy(update={"data_version": make_data_version()}))
    assert len(store.objects) == 2


def test_an_unreadable_entry_is_none() -> None:
    store = MemoryStore()
    store.put_json("airloom", f"cache/train/{parts().key}.json", {"schema": "of another time"})
    assert lookup(hooks_of(store), parts()).entry is None


def test_evaluate_needs_its_report(tmp_path: Any) -> None:
    store, plan = MemoryStore(), make_plan()
    report = tmp_path / "report"
    report.mkdir()
    (report / "reference.json").write_text("{}")
    outcome = make_outcome(Stage.EVALUATE, outputs={"report": report})
    now = cache.key_parts(plan, Stage.EVALUATE, INPUTS)
    cache.record(hooks_of(store), plan, outcome.model_copy(update={"key": now.key}), inputs=INPUTS)
    assert lookup(hooks_of(store), now).entry is not None
    (report / "reference.json").write_text("[]")
    assert "its output 'report' is gone" in lookup(hooks_of(store), now).reason
