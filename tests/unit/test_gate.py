"""The gate's checks: figures in, verdicts with reasons out."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from airloom.contract import GateDecision, Verdict
from airloom.errors import NotFoundError
from airloom.flows.gate import Check, check_champion, check_thresholds, finite, measured_beside, split_metrics
from airloom.flows.gate_plot import gate_plot
from airloom.hooks.mlflow import ModelRegistry
from airloom.hooks.mlflow_records import ModelVersionInfo
from airloom.spec.pipeline import ChampionRule, GateSpec, Threshold
from tests.fixtures.plans import make_plan

NAN, INF = math.nan, math.inf

# bounds, what was measured, passed, what the reason must say
THRESHOLDS: list[tuple[dict[str, float], dict[str, float], bool, str]] = [
    ({"min": 0.9}, {"a": 0.95}, True, "a 0.95 is at least 0.9"),
    ({"min": 0.9}, {"a": 0.9}, True, "a 0.9 is at least 0.9"),
    ({"min": 0.9}, {"a": 0.899999999}, False, "is not at least 0.9"),
    ({"min": 0.9}, {"a": 0.5}, False, "a 0.5 is not at least 0.9"),
    ({"min": 0.9}, {"a": -1.0}, False, "a -1 is not at least 0.9"),
    ({"max": 0.4}, {"a": 0.3}, True, "a 0.3 is at most 0.4"),
    ({"max": 0.4}, {"a": 0.4}, True, "a 0.4 is at most 0.4"),
    ({"max": 0.4}, {"a": 0.41}, False, "a 0.41 is not at most 0.4"),
    ({"min": 0.1, "max": 0.4}, {"a": 0.2}, True, "at least 0.1 and at most 0.4"),
    ({"min": 0.1, "max": 0.4}, {"a": 0.05}, False, "not at least 0.1 and at most 0.4"),
    ({"min": 0.1, "max": 0.4}, {"a": 0.5}, False, "not at least 0.1 and at most 0.4"),
    ({"min": 0.0}, {"a": 0.0}, True, "a 0 is at least 0"),
    ({"min": 0.9}, {}, False, "did not measure it; it measured nothing"),
    ({"min": 0.9}, {"b": 1.0, "A": 1.0}, False, "did not measure it; it measured A, b"),
    ({"min": 0.9}, {"a": NAN}, False, "a is nan, which is no number"),
    ({"max": 0.9}, {"a": NAN}, False, "a is nan, which is no number"),
    ({"min": 0.9}, {"a": INF}, False, "a is inf, which is no number"),
    ({"max": 0.9}, {"a": -INF}, False, "a is -inf, which is no number"),
]


@pytest.mark.parametrize(("bounds", "metrics", "passed", "said"), THRESHOLDS)
def test_thresholds(bounds: dict[str, float], metrics: dict[str, float], passed: bool, said: str) -> None:
    [check] = check_thresholds(GateSpec(thresholds={"a": Threshold(**bounds)}), metrics)
    assert check.passed is passed
    assert said in check.text


def test_each_threshold_is_one_check() -> None:
    gate = GateSpec(thresholds={"a": Threshold(min=0.5), "b": Threshold(max=1), "c": Threshold(min=0)})
    checks = check_thresholds(gate, {"a": 0.1, "b": 0.5})
    assert [check.passed for check in checks] == [False, True, False]


def test_a_gate_without_checks_says_so() -> None:
    [check] = check_thresholds(GateSpec(), {"a": NAN})
    assert check.passed
    assert "no checks" in check.text


HIGHER = ChampionRule(metric="a", max_regression=0.005)
LOWER = ChampionRule(metric="a", max_regression=0.005, higher_is_better=False)
STRICT = ChampionRule(metric="a")

# rule, candidate, champion, passed, said
CHAMPIONS: list[tuple[ChampionRule, dict[str, float], dict[str, float], bool, str]] = [
    (HIGHER, {"a": 0.96}, {"a": 0.95}, True, "a 0.96 is 0.01 better than the champion's (version 3) 0.95"),
    (HIGHER, {"a": 0.95}, {"a": 0.95}, True, "equal to the champion's"),
    (HIGHER, {"a": 0.946}, {"a": 0.95}, True, "0.004 worse than the champion's (version 3) 0.95; at most 0.005"),
    (HIGHER, {"a": 0.945}, {"a": 0.95}, True, "0.005 worse"),
    (HIGHER, {"a": 0.9449}, {"a": 0.95}, False, "0.0051 worse than the champion's (version 3) 0.95; at most 0.005"),
    (HIGHER, {"a": 0.1}, {"a": 0.95}, False, "0.85 worse"),
    (LOWER, {"a": 0.30}, {"a": 0.31}, True, "0.01 better"),
    (LOWER, {"a": 0.315}, {"a": 0.31}, True, "0.005 worse"),
    (LOWER, {"a": 0.32}, {"a": 0.31}, False, "0.01 worse"),
    (STRICT, {"a": 0.95}, {"a": 0.95}, True, "equal to"),
    (STRICT, {"a": 0.9499}, {"a": 0.95}, False, "0.0001 worse"),
    (STRICT, {"a": 0.1 + 0.2}, {"a": 0.3}, True, "a 0.3"),
    (STRICT, {"a": 0.3}, {"a": 0.1 + 0.2}, True, "a 0.3"),
    (HIGHER, {"a": 0.99}, {}, False, "of the champion (version 3) was not measured on this data version"),
    (HIGHER, {"a": 0.99}, {"b": 0.5}, False, "was not measured on this data version"),
    (HIGHER, {"a": 0.99}, {"a": NAN}, False, "is nan on this data version"),
    (HIGHER, {}, {"a": 0.95}, False, "a of the candidate was not measured"),
    (HIGHER, {"a": NAN}, {"a": 0.95}, False, "a of the candidate is nan"),
    (LOWER, {"a": -INF}, {"a": 0.3}, False, "a of the candidate is -inf"),
    (HIGHER, {}, {}, False, "a of the candidate was not measured"),
]


@pytest.mark.parametrize(("rule", "own", "other", "passed", "said"), CHAMPIONS)
def test_the_champion_rule(
    rule: ChampionRule, own: dict[str, float], other: dict[str, float], passed: bool, said: str
) -> None:
    [check] = check_champion(rule, own, other, champion_version="3")
    assert check.passed is passed, check.text
    assert said in check.text


def rule_of(**changes: Any) -> list[Check]:
    given: dict[str, Any] = {"champion_version": "3", **changes}
    return check_champion(HIGHER, {"a": 0.1}, {"a": 0.9}, **given)


def test_without_a_rule_or_a_champion_nothing_is_compared() -> None:
    assert check_champion(None, {"a": 0.1}, {"a": 0.9}, champion_version="3") == []
    [check] = rule_of(champion_version=None)
    assert check.passed
    assert "no champion yet" in check.text


def test_the_champion_itself_passes() -> None:
    [check] = rule_of(same=True)
    assert check.passed
    assert "same model as the champion (version 3)" in check.text


BEFORE = ModelVersionInfo("digits", "2", "r", "models:/m-2", {"airloom.digest": "b"})


@pytest.mark.parametrize(
    ("now", "before", "exists", "expected"),
    [
        (None, None, True, None),
        ({"airloom.digest": "other"}, None, True, "3"),
        ({"airloom.digest": "same"}, None, True, None),
        ({"airloom.digest": "same", "airloom.gate.champion": ""}, None, True, None),
        ({"airloom.digest": "same", "airloom.gate.champion": "2"}, BEFORE, True, "2"),
        ({"airloom.digest": "same", "airloom.gate.champion": "2"}, BEFORE, False, None),
        ({"airloom.digest": "same", "airloom.gate.champion": "2"}, NotFoundError("gone"), True, None),
    ],
)
def test_what_a_candidate_is_measured_beside(
    now: dict[str, str] | None, before: Any, exists: bool, expected: str | None
) -> None:
    mlflow = create_autospec(ModelRegistry, instance=True)
    mlflow.alias.return_value = now and ModelVersionInfo("digits", "3", "r", "models:/m-3", now)
    mlflow.version.side_effect = [before]
    mlflow.model_exists.return_value = exists
    found = measured_beside(SimpleNamespace(mlflow=mlflow), make_plan(), "models:/m-4", "same")  # type: ignore[arg-type]
    assert (found.version if found else None) == expected


def test_a_champion_that_changed_meanwhile_is_no_comparison() -> None:
    [check] = rule_of(evaluated_against="2")
    assert not check.passed
    assert "version 3 now" in check.text
    assert "against version 2" in check.text
    assert "worse" in rule_of(evaluated_against="3")[0].text


def test_an_evaluation_holds_both_models_figures() -> None:
    own, other = split_metrics({"a": 1.0, "champion.a": 2.0, "champion.b.c": 3.0, "championship": 4.0})
    assert own == {"a": 1.0, "championship": 4.0}
    assert other == {"a": 2.0, "b.c": 3.0}


def test_what_json_cannot_carry_is_left_out() -> None:
    assert finite({"a": 1.0, "b": NAN, "c": INF, "d": -INF}) == {"a": 1.0}


@pytest.mark.parametrize(
    ("gate", "metrics", "champion"),
    [
        (GateSpec(thresholds={"a": Threshold(min=0.5, max=1)}, champion=HIGHER), {"a": 0.7}, {"a": 0.6}),
        (GateSpec(thresholds={"a": Threshold(min=0.5)}), {"a": 0.7, "b": 1.0}, None),
        (GateSpec(), {}, None),
        (GateSpec(), {f"metric_{number}": float(number) for number in range(40)}, None),
        (GateSpec(thresholds={"missing": Threshold(min=0.5)}), {"a": 0.7}, {}),
    ],
)
def test_every_decision_has_its_picture(
    gate: GateSpec, metrics: dict[str, float], champion: dict[str, float] | None
) -> None:
    from PIL import Image

    decision = GateDecision(
        verdict=Verdict.REJECTED,
        reasons=[],
        metrics=metrics,
        champion_metrics=champion,
        champion_version="1" if champion is not None else None,
        model_name="digits",
        model_version="2",
        mlflow_run_id="0",
        data_tag="t",
    )
    picture = Image.open(io.BytesIO(gate_plot(gate, decision)))
    assert picture.format == "PNG"
    assert len(set(picture.convert("L").tobytes())) > 10
