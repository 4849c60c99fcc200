"""Checks of a dataset by its data card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airloom.contract import DataCard, Stage, StageOutcome
from airloom.contract.card import CARD_FILE
from airloom.errors import ContractError, DataRejectedError
from airloom.flows.validate import check_card, validate_dataset
from airloom.spec.pipeline import Validation
from tests.fixtures.plans import MemoryStore, make_outcome, make_plan, make_spec

ROWS = {"train": 70, "validation": 15, "test": 15}


def card(**changes: Any) -> DataCard:
    values: dict[str, Any] = {
        "rows": ROWS,
        "classes": ["0", "1"],
        "rows_by_class": {split: {"0": rows // 2, "1": rows - rows // 2} for split, rows in ROWS.items()},
        **changes,
    }
    return DataCard(**values)


# rules, what the card says, which words stand in the failures (none: passed)
CASES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {}, []),
    ({"min_rows": 100}, {}, []),
    ({"min_rows": 101}, {}, ["100 rows, at least 101"]),
    ({}, {"rows": {}}, ["0 rows, at least 1", "'train': 0 rows", "'validation': 0 rows", "'test': 0 rows"]),
    ({}, {"rows": {**ROWS, "test": 0}}, ["split 'test': 0 rows, at least 1"]),
    ({"required_splits": ["train", "holdout"]}, {}, ["split 'holdout': 0 rows"]),
    ({"required_splits": []}, {"rows": {"all": 5}}, []),
    ({"min_rows_by_class": 49}, {}, []),
    ({"min_rows_by_class": 50}, {}, ["1 of 2 classes have under 50 rows: '0' 49"]),
    ({"min_rows_by_class": 60}, {}, ["2 of 2 classes have under 60 rows: '0' 49, '1' 51"]),
    ({"min_rows_by_class": 1}, {"classes": ["0", "1", "2"]}, ["'2' 0"]),
    ({"min_rows_by_class": 1}, {"classes": [], "rows_by_class": {}}, ["no classes"]),
    ({}, {"classes": [], "rows_by_class": {}}, []),
    ({"max_rejected_fraction": 0.05}, {"rejected": {"empty": 5}}, []),
    ({"max_rejected_fraction": 0.05}, {"rejected": {"empty": 4, "truncated": 2}}, ["6 of 106 files rejected (5.66%)"]),
    ({"max_rejected_fraction": 0.0}, {"rejected": {"duplicate": 9}, "duplicates": 9}, []),
    ({"max_rejected_fraction": 0.0}, {"rejected": {"duplicate": 9, "empty": 1}, "duplicates": 9}, ["1 of 101"]),
    ({"max_rejected_fraction": 1.0, "min_rows": 1}, {"rejected": {"empty": 900}}, []),
    ({"max_leaks": 0}, {"leaks": 1}, ["1 rows in more than one split, at most 0"]),
    ({"max_leaks": 3}, {"leaks": 3}, []),
]


@pytest.mark.parametrize(("rules", "changes", "said"), CASES)
def test_a_card_is_held_against_the_rules(rules: dict[str, Any], changes: dict[str, Any], said: list[str]) -> None:
    checks, failed = check_card(card(**changes), Validation(**rules))
    assert len(failed) == len(said), failed
    for text, part in zip(failed, said, strict=True):
        assert part in text
    assert set(failed) <= set(checks)


def test_the_most_frequent_reasons_are_told() -> None:
    reasons = {"empty": 3, "truncated": 30, "not_an_image": 1, "too_large": 2, "a": 7, "b": 8}
    _, [failed] = check_card(card(rejected=reasons), Validation())
    assert failed.endswith(": 30 truncated, 8 b, 7 a, 3 empty, 2 too_large")


# As a task


def hooks() -> Any:
    return SimpleNamespace(store=MemoryStore(), settings=SimpleNamespace(bucket_airloom="airloom"))


def preprocessed(folder: Path, found: DataCard, **changes: Any) -> StageOutcome:
    found.write(folder / CARD_FILE)
    return make_outcome(Stage.PREPROCESS, outputs={"dataset": folder}, **changes)


def test_good_data_passes_with_its_figures(tmp_path: Path) -> None:
    report = validate_dataset(hooks(), plan=make_plan(), outcome=preprocessed(tmp_path / "d", card()))
    assert report.failed == []
    assert "100 rows, at least 1" in report.checks


def test_bad_data_is_rejected_with_every_failure_and_what_to_do(tmp_path: Path) -> None:
    found = card(leaks=4, rejected={"truncated": 50}, rows={**ROWS, "test": 0})
    outcome = preprocessed(tmp_path / "d", found)
    with pytest.raises(DataRejectedError) as caught:
        validate_dataset(hooks(), plan=make_plan(), outcome=outcome)
    message = str(caught.value)
    for part in ("fails 3 of", "4 rows in more than one split", "50 truncated", "'test': 0 rows"):
        assert part in message
    assert "s3://raw/digits/" in message
    assert str(tmp_path / "d" / "rejected.jsonl") in message


def test_data_from_the_cache_is_held_against_todays_rules(tmp_path: Path) -> None:
    shared, folder = hooks(), tmp_path / "d"
    outcome = preprocessed(folder, card())
    validate_dataset(shared, plan=make_plan(), outcome=outcome)
    hit = outcome.model_copy(update={"cache": "hit", "reason": "equal to run-1"})
    (folder / CARD_FILE).unlink()
    folder.rmdir()  # the workspace is gone
    report = validate_dataset(shared, plan=make_plan("run-2"), outcome=hit)
    assert "has passed before" in report.checks[0]
    assert "100 rows, at least 1" in report.checks
    stricter = make_plan("run-3", make_spec(validation={"min_rows": 101}))
    with pytest.raises(DataRejectedError, match="100 rows, at least 101"):
        validate_dataset(shared, plan=stricter, outcome=hit)


def test_data_from_the_cache_without_a_card_passes_and_says_so(tmp_path: Path) -> None:
    outcome = preprocessed(tmp_path / "d", card(rows={})).model_copy(update={"cache": "hit", "reason": "as run-1"})
    report = validate_dataset(hooks(), plan=make_plan(), outcome=outcome)
    assert report.checks == ["the dataset is an earlier run's and has passed before: as run-1"]


def test_rejected_data_leaves_no_card_behind(tmp_path: Path) -> None:
    shared = hooks()
    with pytest.raises(DataRejectedError):
        validate_dataset(shared, plan=make_plan(), outcome=preprocessed(tmp_path / "d", card(leaks=1)))
    assert shared.store.objects == {}


def test_a_stage_without_dataset_or_card_is_a_broken_contract(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no output 'dataset'"):
        validate_dataset(hooks(), plan=make_plan(), outcome=make_outcome(Stage.PREPROCESS))
    outcome = preprocessed(tmp_path / "d", card())
    (tmp_path / "d" / CARD_FILE).write_text('{"rows": "many"}')
    with pytest.raises(ContractError, match=r"card\.json is not a valid DataCard: rows"):
        validate_dataset(hooks(), plan=make_plan(), outcome=outcome)
