"""What a task's result says in figures: for the ledger, and through it for the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The tasks of every pipeline in the order of the flow.
TASK_ORDER = (
    "resolve",
    "preprocess",
    "validate",
    "version",
    "train",
    "evaluate",
    "gate",
    "approve",
    "release",
    "deploy",
    "verify",
)


@dataclass(frozen=True)
class Figures:
    """`cache` and `reason` of a stage, the gate's `verdict`, and numbers by name."""

    cache: str | None = None
    reason: str = ""
    verdict: str | None = None
    values: dict[str, float] = field(default_factory=dict)


def figures_of(task: str, returned: Any) -> Figures:
    """The figures in what a task returned (its contract model as JSON); none for what is no such thing."""
    if not isinstance(returned, Mapping):
        return Figures()
    read = _READERS.get(task)
    return read(returned) if read else Figures(reason=str(returned.get("detail") or ""))


def _stage(outcome: Mapping[str, Any]) -> Figures:
    result = outcome.get("result") or {}
    outputs = result.get("outputs") or {}
    values = _numbers(result.get("metrics") or {})
    values["size_bytes"] = float(sum(output.get("size_bytes", 0) for output in outputs.values()))
    values["files"] = float(sum(output.get("files", 0) for output in outputs.values()))
    values["stage_seconds"] = float(outcome.get("seconds") or 0.0)
    return Figures(cache=outcome.get("cache"), reason=str(outcome.get("reason") or ""), values=values)


def _version(version: Mapping[str, Any]) -> Figures:
    return Figures(reason=str(version.get("tag", "")), values=_numbers(version, "files", "size_bytes", "created"))


def _gate(decision: Mapping[str, Any]) -> Figures:
    champion = _numbers(decision.get("champion_metrics") or {})
    values = {
        **_numbers(decision.get("metrics") or {}),
        **{f"champion.{name}": value for name, value in champion.items()},
    }
    reasons = decision.get("failed") or decision.get("reasons") or []
    return Figures(reason="; ".join(map(str, reasons)), verdict=decision.get("verdict"), values=values)


def _release(release: Mapping[str, Any]) -> Figures:
    return Figures(reason=str(release.get("version", "")), values=_numbers(release.get("metrics") or {}))


def _verify(report: Mapping[str, Any]) -> Figures:
    return Figures(values=_numbers(report, "checked", "equal"))


def _numbers(source: Mapping[str, Any], *names: str) -> dict[str, float]:
    chosen = {name: source.get(name) for name in names} if names else source
    return {str(name): float(value) for name, value in chosen.items() if isinstance(value, int | float)}


_READERS: dict[str, Callable[[Mapping[str, Any]], Figures]] = {
    "preprocess": _stage,
    "train": _stage,
    "evaluate": _stage,
    "version": _version,
    "gate": _gate,
    "release": _release,
    "verify": _verify,
}
