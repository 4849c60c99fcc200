"""Walk both ways from anything that has a name: what it came from, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.errors import AirloomError, NotFoundError, UnavailableError
from airloom.flows.lineage_graph import Graph, GraphReader, Key
from airloom.flows.lineage_subject import EXAMPLES, Kind, Subject, parse_subject
from airloom.hooks import mlflow_records as records

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks


class LineageNode(Frozen):
    """One thing, and what stands next to it in the direction of the walk.

    Attributes:
        title: what to ask for to see this thing's own lineage.
        repeated: it stands elsewhere in the tree with what follows it.
    """

    kind: Kind
    title: str
    detail: str = ""
    url: str | None = None
    repeated: bool = False
    next: list[LineageNode] = Field(default_factory=list)


class Lineage(Frozen):
    """What a thing came from and what came of it.

    Attributes:
        notes: what could not be read: then something may be missing.
    """

    subject: LineageNode
    came_from: list[LineageNode]
    led_to: list[LineageNode]
    notes: list[str] = Field(default_factory=list)


def lineage(hooks: Hooks, subject: str) -> Lineage:
    """The lineage of a version tag, run, model version, release, commit, prediction or pipeline.

    Raises:
        NotFoundError: nothing of that name is known.
        UnavailableError: it may be known, but not everybody could be asked.
    """
    reader = GraphReader(hooks)
    asked = _looked_up(hooks, parse_subject(subject, reader.pipelines))
    for pipeline in [asked.pipeline] if asked.pipeline else sorted(reader.pipelines):
        reader.read(pipeline)
        if asked.kind is Kind.COMMIT:
            reader.read_plans(pipeline)
        elif asked.kind is Kind.RUN:
            reader.read_plan((Kind.RUN, pipeline, asked.name))
    graph = reader.graph
    if asked.kind is Kind.PIPELINE:
        return _of_pipeline(graph, asked.name)
    start = _find(graph, asked, subject)
    for key in [key for key in _reach(start, graph.before) if key[0] is Kind.RUN]:
        reader.read_plan(key)
    root = graph.nodes[start]
    return Lineage(
        subject=LineageNode(kind=start[0], title=root.title, detail=root.detail, url=root.url),
        came_from=_tree(graph, start, graph.before),
        led_to=_tree(graph, start, graph.after),
        notes=list(dict.fromkeys(graph.notes)),
    )


def _looked_up(hooks: Hooks, asked: Subject) -> Subject:
    """The model version or run that an MLflow run or a logged model stands for."""
    if asked.kind is Kind.MODEL:
        run_id = hooks.mlflow.source_run(asked.name)
        if not run_id:
            raise NotFoundError(f"nobody knows which MLflow run made {asked.name}")
        return _of_mlflow_run(hooks, run_id)
    if asked.kind is Kind.MLFLOW_RUN:
        return _of_mlflow_run(hooks, asked.name)
    return asked


def _of_mlflow_run(hooks: Hooks, run_id: str) -> Subject:
    versions = hooks.mlflow.versions(run_id=run_id)
    if versions:
        return Subject(Kind.MODEL_VERSION, versions[-1].version, versions[-1].name)
    tags = hooks.mlflow.run_info(run_id).tags
    if records.RUN_TAG not in tags:
        raise NotFoundError(
            f"the MLflow run {run_id} was not made by a run of a pipeline", hint=hooks.mlflow.run_url(run_id)
        )
    return Subject(Kind.RUN, tags[records.RUN_TAG], tags.get(records.PIPELINE_TAG))


def _find(graph: Graph, asked: Subject, text: str) -> Key:
    """The node that was asked for; a commit may be shortened."""
    if asked.kind is Kind.COMMIT:
        found = [key for key in graph.nodes if key[0] is Kind.COMMIT and key[2].startswith(asked.name)]
    else:
        found = [key for key in graph.nodes if key[0] is asked.kind and key[2] == asked.name]
        found = [key for key in found if asked.pipeline is None or key[1] == asked.pipeline]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(graph.nodes[key].title for key in found[:5])
        raise NotFoundError(f"{text!r} names more than one {asked.kind.value}: {listed}", hint="give more of it")
    error: type[AirloomError] = UnavailableError if graph.notes else NotFoundError
    reasons = f" ({'; '.join(dict.fromkeys(graph.notes))})" if graph.notes else ""
    raise error(f"no {asked.kind.value} {text!r} is known{reasons}", hint=f"give {EXAMPLES}")


def _of_pipeline(graph: Graph, pipeline: str) -> Lineage:
    """All that a pipeline has: its data versions, model versions, releases and deployment."""
    shown = (Kind.DATA_VERSION, Kind.MODEL_VERSION, Kind.RELEASE, Kind.DEPLOYMENT)
    keys = [key for kind in shown for key in graph.nodes if key[0] is kind and key[1] == pipeline]
    return Lineage(
        subject=LineageNode(kind=Kind.PIPELINE, title=pipeline),
        came_from=[],
        led_to=[_node(graph, key) for key in keys],
        notes=list(dict.fromkeys(graph.notes)),
    )


def _reach(start: Key, arrows: Mapping[Key, list[Key]]) -> list[Key]:
    """`start` and all that can be reached from it."""
    found, waiting = {start: None}, [start]
    while waiting:
        for key in arrows.get(waiting.pop(), []):
            if key not in found:
                found[key] = None
                waiting.append(key)
    return list(found)


def _tree(graph: Graph, start: Key, arrows: Mapping[Key, list[Key]]) -> list[LineageNode]:
    """What stands next to `start` and so on, each thing with what follows it once."""
    expanded: set[Key] = {start}

    def build(key: Key) -> LineageNode:
        node = _node(graph, key)
        if key in expanded:
            return node.model_copy(update={"repeated": bool(arrows.get(key))})
        expanded.add(key)
        return node.model_copy(update={"next": [build(other) for other in _ordered(arrows.get(key, []))]})

    return [build(key) for key in _ordered(arrows.get(start, []))]


def _ordered(keys: list[Key]) -> list[Key]:
    """By kind, the most telling first."""
    order = list(Kind)
    return sorted(keys, key=lambda key: (-order.index(key[0]), key[1:]))


def _node(graph: Graph, key: Key) -> LineageNode:
    node = graph.nodes[key]
    return LineageNode(kind=key[0], title=node.title, detail=node.detail, url=node.url)
