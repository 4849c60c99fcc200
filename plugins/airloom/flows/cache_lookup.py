"""Find an earlier result of a stage, or say why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from airloom.contract import Stage, sha256_tree
from airloom.errors import ContractError, NotFoundError
from airloom.flows.cache import NO_CHAMPION, CacheEntry, KeyParts, entry_key, latest_key
from airloom.flows.version import verify_remote

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

_MOST_CHANGES = 4
_SHOWN_CHARACTERS = 40
_INPUT_NAMES = {"source": "raw data", "dataset": "data", "model": "candidate model", "champion": "champion"}


@dataclass(frozen=True)
class Lookup:
    """`entry` is what was found; `reason` says to people which run it is of, or why there is none.

    Attributes:
        lost: whether there was an entry, but what it points at is gone.
    """

    entry: CacheEntry | None
    reason: str
    lost: bool = False


def lookup(hooks: Hooks, parts: KeyParts) -> Lookup:
    """The result of an equal stage, if all that it points at still exists.

    Raises:
        UnavailableError: the store, the git server or MLflow does not answer.
    """
    bucket = hooks.settings.bucket_airloom
    entry = _read(hooks, bucket, entry_key(parts.stage, parts.key))
    if entry is None:
        return Lookup(None, why_new(_read(hooks, bucket, latest_key(parts.stage, parts.pipeline)), parts))
    gone = what_is_gone(hooks, entry)
    if gone is not None:
        return Lookup(None, f"an equal stage ran in {entry.run_id}, but {gone}", lost=True)
    return Lookup(entry, f"equal to run {entry.run_id}")


def what_is_gone(hooks: Hooks, entry: CacheEntry) -> str | None:
    """What a result points at and is there no more, in words; None if all of it is."""
    match entry.parts.stage:
        case Stage.PREPROCESS:
            if entry.data_version is None:
                return "its entry names no data version"
            try:
                verify_remote(hooks, entry.data_version)
            except (NotFoundError, ContractError) as error:
                return f"its data version is gone: {error.message}"
        case Stage.TRAIN:
            uri = entry.result.facts.get("model_uri")
            if not uri or not hooks.mlflow.model_exists(uri):
                return f"its model {uri or '(none)'} is gone from MLflow"
        case _:
            # Small folders, read again by later tasks.
            for name, output in entry.result.outputs.items():
                if not output.path.is_dir() or sha256_tree(output.path) != output.digest:
                    return f"its output {name!r} is gone from {output.path}"
    return None


def why_new(latest: CacheEntry | None, parts: KeyParts) -> str:
    """What differs from the result that the pipeline recorded last."""
    if latest is None:
        return "first run of this stage"
    then = latest.parts
    changes = []
    if then.code_digest != parts.code_digest:
        changes.append("code changed")
    if then.params != parts.params:
        changes.append(f"parameters changed: {_differences(then.params, parts.params)}")
    if then.seed != parts.seed:
        changes.append(f"seed changed: {then.seed} -> {parts.seed}")
    changes += _changed_inputs(then.inputs, parts.inputs)
    if then.environment != parts.environment:
        changes.append(f"environment changed: {then.environment[:8]} -> {parts.environment[:8]}")
    # The same as last time, and yet there is no entry: somebody has deleted it.
    return "; ".join(changes) or f"the result of {latest.run_id} is no longer in the cache"


def _changed_inputs(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changes = []
    for name in sorted({*then, *now}):
        before, after = then.get(name), now.get(name)
        if before != after:
            shown = _INPUT_NAMES.get(name, name)
            gone = after in (None, NO_CHAMPION)
            new = before in (None, NO_CHAMPION)
            changes.append(f"{shown} {'new' if new else 'gone' if gone else 'changed'}")
    return changes


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    found = list(_changed_values(then, now, prefix))
    more = f" and {len(found) - _MOST_CHANGES} more" if len(found) > _MOST_CHANGES else ""
    return ", ".join(found[:_MOST_CHANGES]) + more


def _changed_values(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for name in sorted({*then, *now}):
        before, after, path = then.get(name), now.get(name), f"{prefix}{name}"
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _changed_values(before, after, f"{path}.")
        elif name not in now:
            found.append(f"{path} {_shown(before)} removed")
        elif name not in then:
            found.append(f"{path} {_shown(after)} added")
        elif before != after:
            found.append(f"{path} {_shown(before)} -> {_shown(after)}")
    return found


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def _read(hooks: Hooks, bucket: str, key: str) -> CacheEntry | None:
    """An entry; one that another version of Airloom wrote in another form is none."""
    try:
        return CacheEntry.model_validate(hooks.store.get_json(bucket, key))
    except (NotFoundError, ContractError, ValidationError):
        return None
