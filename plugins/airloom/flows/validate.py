"""Decide whether a dataset may become a data version, by its data card."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pydantic import ValidationError

from airloom.contract import DataCard, RunPlan, StageOutcome, ValidationReport
from airloom.contract.card import CARD_FILE, REJECTED_FILE
from airloom.errors import ConflictError, ContractError, DataRejectedError, NotFoundError
from airloom.flows.resolve import spec_of
from airloom.spec.pipeline import Validation

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

DATASET = "dataset"
_MOST_REASONS = 5


def validate_dataset(hooks: Hooks, *, plan: RunPlan, outcome: StageOutcome) -> ValidationReport:
    """Check the dataset of a preprocess outcome against the pipeline's `validation`.

    A dataset from the cache is checked by the card that was kept when it was new, since what is asked may
    have changed since; without one it passes as it did then, and the report says so.

    Raises:
        DataRejectedError: lists every check that failed, and what most rejected files had.
        ContractError: the stage left no dataset or no readable card.
    """
    rules = spec_of(plan).validation
    output = outcome.result.outputs.get(DATASET)
    if output is None:
        raise ContractError(
            f"the preprocess stage left no output {DATASET!r}; it has {sorted(outcome.result.outputs)}",
            hint="a preprocess stage fills outputs['dataset'] and lists it in its result",
        )
    key = f"cards/{plan.pipeline}/{output.digest}.json"
    bucket = hooks.settings.bucket_airloom
    reused = "the dataset is an earlier run's and has passed before"
    if outcome.cache == "hit":
        card = _kept_card(hooks, bucket, key)
        if card is None:
            return ValidationReport(checks=[f"{reused}: {outcome.reason}"])
    else:
        card = DataCard.read(output.path / CARD_FILE)
    checks, failed = check_card(card, rules)
    if failed:
        raise DataRejectedError(
            "\n".join([f"the dataset of {plan.pipeline} fails {len(failed)} of {len(checks)} checks:", *failed]),
            hint=_hint(card, plan, output.path / REJECTED_FILE if outcome.cache != "hit" else None),
        )
    if outcome.cache == "hit":
        return ValidationReport(checks=[f"{reused}; checked again by its card", *checks])
    with suppress(ConflictError):
        hooks.store.put_json(bucket, key, card.model_dump(mode="json"), if_none_match=True)
    return ValidationReport(checks=checks)


def check_card(card: DataCard, rules: Validation) -> tuple[list[str], list[str]]:
    """One sentence for each check with its figures, and those that failed among them."""
    checks: list[tuple[bool, str]] = [
        _at_least("rows", card.total_rows, rules.min_rows),
        *_check_splits(card, rules),
        *_check_classes(card, rules),
        _check_rejected(card, rules),
        (card.leaks <= rules.max_leaks, f"{_count(card.leaks)} rows in more than one split, at most {rules.max_leaks}"),
    ]
    return [text for _, text in checks], [text for passed, text in checks if not passed]


def _check_splits(card: DataCard, rules: Validation) -> list[tuple[bool, str]]:
    return [
        (card.rows.get(split, 0) > 0, f"split {split!r}: {_count(card.rows.get(split, 0))} rows, at least 1")
        for split in rules.required_splits
    ]


def _check_classes(card: DataCard, rules: Validation) -> list[tuple[bool, str]]:
    """The smallest class over all splits, and in words all that are too small."""
    if not card.classes:
        passed = rules.min_rows_by_class == 0
        return [] if passed else [(False, f"no classes, where each needs {rules.min_rows_by_class} rows")]
    totals = {label: sum(split.get(label, 0) for split in card.rows_by_class.values()) for label in card.classes}
    small = {label: rows for label, rows in sorted(totals.items()) if rows < rules.min_rows_by_class}
    if small:
        listed = ", ".join(f"{label!r} {rows}" for label, rows in small.items())
        text = f"{len(small)} of {len(totals)} classes have under {rules.min_rows_by_class} rows: {listed}"
        return [(False, text)]
    label = min(totals, key=lambda name: (totals[name], name))
    text = f"{len(totals)} classes; the smallest, {label!r}, has {_count(totals[label])} rows"
    return [(True, f"{text}, at least {rules.min_rows_by_class}")]


def _check_rejected(card: DataCard, rules: Validation) -> tuple[bool, str]:
    """Duplicates are no fault of the data: an equal row was kept."""
    faulty = max(card.total_rejected - card.duplicates, 0)
    seen = card.total_rows + faulty
    fraction = faulty / seen if seen else 0.0
    text = (
        f"{_count(faulty)} of {_count(seen)} files rejected ({fraction:.2%}), at most {rules.max_rejected_fraction:.2%}"
    )
    return fraction <= rules.max_rejected_fraction, text + _reasons(card)


def _reasons(card: DataCard) -> str:
    most = sorted(card.rejected.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS]
    return f": {', '.join(f'{_count(number)} {reason}' for reason, number in most)}" if most else ""


def _at_least(what: str, found: int, least: int) -> tuple[bool, str]:
    return found >= least, f"{_count(found)} {what}, at least {_count(least)}"


def _count(number: int) -> str:
    return f"{number:,}"


def _hint(card: DataCard, plan: RunPlan, rejected: object) -> str:
    listed = f"; each rejected file is listed in {rejected}" if card.rejected and rejected is not None else ""
    return f"correct the files below {plan.source.uri}, or what `validation` asks for in {plan.pipeline}.yaml{listed}"


def _kept_card(hooks: Hooks, bucket: str, key: str) -> DataCard | None:
    try:
        return DataCard.model_validate(hooks.store.get_json(bucket, key))
    except (NotFoundError, ValidationError):
        return None
