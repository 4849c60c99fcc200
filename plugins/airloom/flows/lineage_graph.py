"""Everything that is known of a pipeline's versions, as a graph whose arrows mean "led to".

Nothing is kept for it: it is read from where the facts are: version tags, plans, the model registry,
releases and the deployment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from airloom.contract import Deployment, Release, RunPlan
from airloom.contract.enums import Stage
from airloom.errors import AirloomError, NotFoundError
from airloom.flows.lineage_subject import Kind
from airloom.flows.resolve import PLAN_FILE, load_plan, run_plan_uri
from airloom.hooks import mlflow_records as records
from airloom.spec import load_pipelines

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks
    from airloom.hooks.git_tags import TagInfo
    from airloom.hooks.mlflow_records import ModelVersionInfo

T = TypeVar("T")
Key = tuple[Kind, str, str]  # kind, pipeline (or repo, for commits), name

_MOST_PLANS = 500


@dataclass(frozen=True)
class Node:
    """One thing. `title` is its name as people would ask for it again."""

    key: Key
    title: str
    detail: str = ""
    url: str | None = None


@dataclass
class Graph:
    """Nodes by key, and arrows both ways.

    Attributes:
        notes: what could not be read, so that a gap is not taken for an absence.
    """

    nodes: dict[Key, Node] = field(default_factory=dict)
    after: dict[Key, list[Key]] = field(default_factory=dict)
    before: dict[Key, list[Key]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, node: Node) -> Key:
        """Add a node, or what it tells more than the one that is there."""
        known = self.nodes.get(node.key)
        if known is None:
            self.nodes[node.key] = node
        elif node.detail and not known.detail:
            self.nodes[node.key] = replace(known, detail=node.detail)
        return node.key

    def link(self, earlier: Key, later: Key) -> None:
        """Say that one thing led to another."""
        if later not in self.after.setdefault(earlier, []):
            self.after[earlier].append(later)
            self.before.setdefault(later, []).append(earlier)


class GraphReader:
    """Reads the facts of pipelines into one graph."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._bucket = hooks.settings.bucket_airloom
        specs, _ = load_pipelines(hooks.settings.configs_dir)
        self._tag_repos = {spec.name: spec.stages[Stage.PREPROCESS].repo for spec in specs}
        self.graph = Graph()

    @property
    def pipelines(self) -> frozenset[str]:
        return frozenset(self._tag_repos)

    def read(self, pipeline: str) -> None:
        """Add a pipeline's version tags, model versions, releases and deployment."""
        for tag in self._each("the git server", lambda: self._tags(pipeline)):
            self._add_tag(pipeline, tag)
        for version in self._each("MLflow", lambda: self._hooks.mlflow.versions(pipeline)):
            self._add_version(version)
        releases = self._each("the store", lambda: self._releases(pipeline))
        for release in releases:
            self._add_release(release)
        deployment = self._one("the store", lambda: self._deployment(pipeline))
        if deployment is not None:
            self._add_deployment(deployment)

    def read_plan(self, key: Key) -> RunPlan | None:
        """Add what a run started from: commits, source, environment."""
        _, pipeline, run_id = key
        uri = run_plan_uri(self._hooks, pipeline, run_id)
        plan = self._one("the store", lambda: self._plan(uri))
        if plan is not None:
            self.add_plan(plan)
        return plan

    def read_plans(self, pipeline: str) -> None:
        """Add all runs of a pipeline, those that came to nothing too."""
        prefix = f"runs/{pipeline}/"

        def plans() -> list[RunPlan]:
            keys = [found.key for found in self._hooks.store.list(self._bucket, prefix)]
            chosen = [key for key in keys if key.endswith(f"/{PLAN_FILE}")]
            if len(chosen) > _MOST_PLANS:
                self.graph.notes.append(f"{pipeline}: only {_MOST_PLANS} of {len(chosen)} runs were looked at")
            found = [self._plan(f"s3://{self._bucket}/{key}") for key in chosen[-_MOST_PLANS:]]
            return [plan for plan in found if plan is not None]

        for plan in self._each("the store", plans):
            self.add_plan(plan)

    def add_plan(self, plan: RunPlan) -> Key:
        """Add a run and what it started from."""
        by = f" by {plan.trigger.by}" if plan.trigger.by else ""
        again = f", reproduces {plan.reproduces}" if plan.reproduces else ""
        run = self._run(
            plan.pipeline, plan.run_id, f"{plan.created_at:%Y-%m-%d %H:%M:%S} UTC, {plan.trigger.kind}{by}{again}"
        )
        for pin in plan.code.values():
            self.graph.link(self._commit(pin.repo, pin.commit, _first_line(pin.message)), run)
        source = plan.source
        detail = f"{source.objects:,} objects, {source.size_bytes:,} bytes, digest {source.digest[:12]}"
        key = (Kind.SOURCE, plan.pipeline, source.manifest)
        self.graph.link(self.graph.add(Node(key, source.uri, f"{detail}, listed in {source.manifest}")), run)
        for digest in dict.fromkeys(pin.environment for pin in plan.stages.values()):
            self.graph.link(self._environment(digest), run)
        return run

    # Parts

    def _add_tag(self, pipeline: str, tag: TagInfo) -> None:
        try:
            message = json.loads(tag.message)
        except ValueError:
            message = {}
        if not isinstance(message, dict):
            message = {}
        key = self._data_version(pipeline, tag.name, _tag_detail(message))
        run_id = message.get("run_id")
        if not run_id:
            return
        run = self._run(pipeline, str(run_id))
        self.graph.link(run, key)
        code = message.get("code")
        for repo, commit in code.items() if isinstance(code, dict) else ():
            self.graph.link(self._commit(str(repo), str(commit)), run)

    def _add_version(self, version: ModelVersionInfo) -> None:
        tags = version.tags
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        verdict = tags.get(records.GATE_TAG, "undecided")
        figures = _figures(tags.get(records.METRICS_TAG, ""))
        node = Node(
            (Kind.MODEL_VERSION, version.name, version.version),
            f"{version.name}/{version.version}",
            f"{verdict}{aliases}{figures}, {version.model_uri}, MLflow run {version.run_id}",
            self._hooks.mlflow.version_url(version.name, version.version),
        )
        key = self.graph.add(node)
        pipeline = tags.get(records.PIPELINE_TAG, version.name)
        if run_id := tags.get(records.RUN_TAG):
            run = self._run(pipeline, run_id)
            self.graph.link(run, key)
            for tag, commit in tags.items():
                if tag.startswith(records.COMMIT_TAG_PREFIX):
                    self.graph.link(self._commit(tag.removeprefix(records.COMMIT_TAG_PREFIX), commit), run)
        if data_tag := tags.get(records.DATA_TAG):
            self.graph.link(self._data_version(pipeline, data_tag), key)

    def _add_release(self, release: Release) -> None:
        pipeline = release.pipeline
        figures = _figures(json.dumps(release.metrics))
        node = Node(
            (Kind.RELEASE, pipeline, release.version),
            f"{pipeline}-{release.version}",
            f"{release.created_at:%Y-%m-%d %H:%M:%S} UTC, model digest {release.model_digest[:12]}{figures}",
            f"s3://{self._bucket}/releases/{pipeline}/{release.version}.json",
        )
        key = self.graph.add(node)
        model = (Kind.MODEL_VERSION, release.model_name, release.model_version)
        title = f"{release.model_name}/{release.model_version}"
        self.graph.link(self.graph.add(Node(model, title, release.model_uri)), key)
        self.graph.link(self._run(pipeline, release.run_id), key)
        self.graph.link(self._data_version(pipeline, release.data_tag), model)
        self.graph.link(self._commit(release.serving_repo, release.serving_commit), key)
        self.graph.link(self._environment(release.environment), key)
        for repo, commit in release.lineage.items():
            self.graph.link(self._commit(repo, commit), self._run(pipeline, release.run_id))

    def _add_deployment(self, deployment: Deployment) -> None:
        pipeline = deployment.pipeline
        name = f"{self._hooks.settings.gateway_base_url}/{pipeline}"
        detail = f"{deployment.state} since {deployment.updated_at:%Y-%m-%d %H:%M:%S} UTC"
        if deployment.previous:
            detail += f", before it {deployment.previous}"
        if deployment.detail:
            detail += f"; {deployment.detail}"
        key = self.graph.add(Node((Kind.DEPLOYMENT, pipeline, name), pipeline, detail, name))
        rolled_back = deployment.state == "rolled_back" and deployment.previous
        answering = deployment.previous if rolled_back else deployment.release
        release = (Kind.RELEASE, pipeline, str(answering))
        self.graph.link(self.graph.add(Node(release, f"{pipeline}-{answering}")), key)

    def _run(self, pipeline: str, run_id: str, detail: str = "") -> Key:
        url = f"{self._hooks.settings.airflow_page_url}/dags/{pipeline}/runs/{quote(run_id, safe='')}"
        return self.graph.add(Node((Kind.RUN, pipeline, run_id), run_id, detail, url))

    def _commit(self, repo: str, commit: str, detail: str = "") -> Key:
        url = self._link(lambda: self._hooks.gitbucket.commit_url(repo, commit))
        return self.graph.add(Node((Kind.COMMIT, repo, commit), f"{repo}@{commit}", detail, url))

    def _data_version(self, pipeline: str, tag: str, detail: str = "") -> Key:
        repo = self._tag_repos.get(pipeline)
        url = self._link(lambda: self._hooks.gitbucket.tag_url(repo, tag)) if repo else None
        return self.graph.add(Node((Kind.DATA_VERSION, pipeline, tag), tag, detail, url))

    def _environment(self, digest: str) -> Key:
        url = f"s3://{self._bucket}/environments/{digest}.json"
        return self.graph.add(Node((Kind.ENVIRONMENT, "", digest), digest, "", url))

    # Reading

    def _tags(self, pipeline: str) -> list[TagInfo]:
        repo = self._tag_repos.get(pipeline)
        return self._hooks.git.list_tags(repo, f"{pipeline}/") if repo else []

    def _releases(self, pipeline: str) -> list[Release]:
        found = self._hooks.store.list(self._bucket, f"releases/{pipeline}/")
        return list(_valid(Release, (self._hooks.store.get_json(self._bucket, item.key) for item in found)))

    def _deployment(self, pipeline: str) -> Deployment | None:
        try:
            value = self._hooks.store.get_json(self._bucket, f"deployments/{pipeline}.json")
        except NotFoundError:
            return None
        return next(iter(_valid(Deployment, [value])), None)

    def _plan(self, uri: str) -> RunPlan | None:
        try:
            return load_plan(self._hooks, uri)
        except NotFoundError:
            return None

    def _each(self, whom: str, call: Callable[[], list[T]]) -> list[T]:
        """What was read; nothing, and a note why, if it could not be."""
        return self._one(whom, call) or []

    def _one(self, whom: str, call: Callable[[], T | None]) -> T | None:
        try:
            return call()
        except NotFoundError:  # nothing was ever written there
            return None
        except AirloomError as error:
            self.graph.notes.append(f"{whom} could not be asked: {error.message}")
            return None

    @staticmethod
    def _link(call: Callable[[], str]) -> str | None:
        try:
            return call()
        except AirloomError:
            return None


def _valid(model: type[Any], values: Iterable[Any]) -> Iterable[Any]:
    """Those values that this version of Airloom can read."""
    for value in values:
        try:
            yield model.model_validate(value)
        except ValidationError:
            continue


def _tag_detail(message: dict[str, Any]) -> str:
    rows = message.get("rows")
    shown = [f"{split} {count}" for split, count in rows.items()] if isinstance(rows, dict) else []
    shown += [f"{name} {message[name]}" for name in ("files", "size_bytes", "md5") if name in message]
    return ", ".join(shown)


def _figures(text: str) -> str:
    try:
        figures = json.loads(text or "{}")
    except ValueError:
        return ""
    shown = ", ".join(f"{name} {float(value):.6g}" for name, value in sorted(figures.items()))
    return f", {shown}" if shown else ""


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0][:80]
