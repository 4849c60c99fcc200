"""What a run was made of and what came of it: the content of its page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airloom.contract.build import BuildRecord
from airloom.flows.figures import TASK_ORDER
from airloom.hooks.ledger import TaskOutcome


@dataclass(frozen=True)
class Check:
    """One of the gate's figures beside the champion's."""

    metric: str
    candidate: float
    champion: float | None


@dataclass(frozen=True)
class RunPage:
    """A run as its page shows it. Parts that the run has not come to are `None`.

    Attributes:
        results: task -> what it returned, as JSON.
        links: name -> address, each only if there is one.
        builds: repo -> the build of the run's commit.
    """

    pipeline: str
    run_id: str
    state: str
    results: Mapping[str, Any]
    tasks: Sequence[TaskOutcome]
    links: Mapping[str, str] = field(default_factory=dict)
    builds: Mapping[str, BuildRecord] = field(default_factory=dict)

    def part(self, task: str) -> Mapping[str, Any] | None:
        """What a task returned, if it did."""
        found = self.results.get(task)
        return found if isinstance(found, Mapping) else None

    @property
    def rows(self) -> list[TaskOutcome]:
        """The last try of each task, in the order of the flow."""
        last = {outcome.task: outcome for outcome in sorted(self.tasks, key=lambda outcome: outcome.attempt)}
        return [last[name] for name in (*TASK_ORDER, *sorted(set(last) - set(TASK_ORDER))) if name in last]

    @property
    def checks(self) -> list[Check]:
        """The gate's figures."""
        decision = self.part("gate") or {}
        champion = decision.get("champion_metrics") or {}
        return [
            Check(name, value, champion.get(name)) for name, value in sorted((decision.get("metrics") or {}).items())
        ]


def run_links(results: Mapping[str, Any], hooks: Any) -> dict[str, str]:
    """Addresses of what the run has made. One that cannot be worked out is left out."""
    version, decision = results.get("version") or {}, results.get("gate") or {}
    wanted: list[tuple[str, Callable[[], str]]] = []
    if version.get("tag"):
        wanted.append(("version tag", lambda: hooks.gitbucket.tag_url(version["repo"], version["tag"])))
    if decision.get("mlflow_run_id"):
        wanted.append(("MLflow run", lambda: hooks.mlflow.run_url(decision["mlflow_run_id"])))
    links = {}
    for name, address in wanted:
        try:
            links[name] = str(address())
        except Exception:  # noqa: S112 - the page is of use without the link
            continue
    return links
