"""Lineage over the traces of a small history: two runs, one rejected, one served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from airloom.contract import Deployment, Release
from airloom.errors import NotFoundError, UnavailableError
from airloom.flows.lineage import Lineage, LineageNode, lineage
from airloom.flows.lineage_subject import Kind, parse_subject
from airloom.hooks.mlflow_records import ModelVersionInfo, RunInfo
from tests.fixtures.plans import NOW, TAG, MemoryStore, make_plan, make_spec

OTHER_TAG = TAG.replace("first", "second").replace("aaaaaaaa", "dddddddd")
MLFLOW_RUNS = {"1": "1" * 32, "2": "2" * 32}
MODEL_URIS = {"1": f"models:/m-{'a' * 32}", "2": f"models:/m-{'b' * 32}"}


@dataclass(frozen=True)
class Tag:
    name: str
    commit: str
    message: str


class Git:
    def __init__(self, tags: list[Tag]) -> None:
        self.tags = tags

    def list_tags(self, repo: str, prefix: str = "") -> list[Tag]:
        assert repo == "de_data"
        return [tag for tag in self.tags if tag.name.startswith(prefix)]


class Registry:
    def __init__(self, versions: list[ModelVersionInfo]) -> None:
        self.all = versions
        self.error: Exception | None = None

    def versions(self, name: str | None = None, *, run_id: str | None = None) -> list[ModelVersionInfo]:
        if self.error:
            raise self.error
        return [v for v in self.all if name in {None, v.name} and run_id in {None, v.run_id}]

    def source_run(self, model_uri: str) -> str:
        for version in self.all:
            if version.model_uri == model_uri:
                return version.run_id
        raise NotFoundError(f"MLflow has no model {model_uri}")

    def run_info(self, run_id: str) -> RunInfo:
        if run_id != "3" * 32:
            raise NotFoundError(f"MLflow has no run {run_id!r}")
        tags = {"airloom.run_id": "run-3", "airloom.pipeline": "digits"}
        return RunInfo(run_id, "", "1", "FAILED", "", 0.0, {}, {}, tags)

    def run_url(self, run_id: str) -> str:
        return f"http://mlflow/runs/{run_id}"

    def version_url(self, name: str, version: str) -> str:
        return f"http://mlflow/{name}/{version}"


def version(number: str, run_id: str, tag: str, verdict: str, aliases: tuple[str, ...]) -> ModelVersionInfo:
    tags = {
        "airloom.pipeline": "digits",
        "airloom.run_id": run_id,
        "airloom.data_tag": tag,
        "airloom.gate": verdict,
        "airloom.metrics": '{"accuracy": 0.95}',
        "airloom.commit.ds_model": "b" * 40,
    }
    return ModelVersionInfo("digits", number, MLFLOW_RUNS[number], MODEL_URIS[number], tags, aliases)


@pytest.fixture
def hooks(tmp_path: Path) -> Any:
    """Run 1 made data, a model and release 1.0.0, which is served; run 2 made data and a model that was rejected;
    run 3 failed."""
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "digits.yaml").write_text(yaml.safe_dump(make_spec().model_dump(mode="json", exclude_none=True)))
    store = MemoryStore()
    for run_id in ("run-1", "run-2", "run-3"):
        store.put_json("airloom", f"runs/digits/{run_id}/plan.json", make_plan(run_id).model_dump(mode="json"))
    release = Release(
        pipeline="digits",
        version="1.0.0",
        created_at=NOW,
        run_id="run-1",
        model_name="digits",
        model_version="1",
        model_uri=MODEL_URIS["1"],
        model_digest="9" * 64,
        mlflow_run_id=MLFLOW_RUNS["1"],
        data_tag=TAG,
        data_md5="0" * 32 + ".dir",
        serving_repo="ds_serve",
        serving_commit="c" * 40,
        environment="e" * 64,
        plan="s3://airloom/runs/digits/run-1/plan.json",
        lineage={"de_data": "a" * 40, "ds_model": "b" * 40},
        metrics={"accuracy": 0.95},
    )
    store.put_json("airloom", "releases/digits/1.0.0.json", release.model_dump(mode="json"))
    deployment = Deployment(
        pipeline="digits", release="1.0.0", previous=None, url="http://x", state="live", updated_at=NOW
    )
    store.put_json("airloom", "deployments/digits.json", deployment.model_dump(mode="json"))
    tags = [
        Tag(name, "1" * 40, json.dumps({"run_id": run_id, "code": {"de_data": "a" * 40}, "rows": {"train": 70}}))
        for name, run_id in ((TAG, "run-1"), (OTHER_TAG, "run-2"))
    ]
    return SimpleNamespace(
        settings=SimpleNamespace(
            bucket_airloom="airloom",
            configs_dir=configs,
            gateway_base_url="http://gateway",
            airflow_page_url="http://airflow",
        ),
        store=store,
        git=Git(tags),
        gitbucket=SimpleNamespace(
            commit_url=lambda repo, sha: f"http://git/{repo}/commit/{sha}",
            tag_url=lambda repo, tag: f"http://git/{tag}",
        ),
        mlflow=Registry(
            [
                version("2", "run-2", OTHER_TAG, "rejected", ("candidate",)),
                version("1", "run-1", TAG, "promoted", ("champion",)),
            ]
        ),
    )


def titles(nodes: list[LineageNode]) -> set[tuple[str, str]]:
    """(kind, title) of a whole tree."""
    return {(node.kind.value, node.title) for node in nodes} | {pair for node in nodes for pair in titles(node.next)}


FROM_RUN_1 = {
    ("commit", f"de_data@{'a' * 40}"),
    ("commit", f"ds_model@{'b' * 40}"),
    ("commit", f"ds_serve@{'c' * 40}"),
    ("source", "s3://raw/digits/"),
    ("environment", "e" * 64),
}
RUN_1, DATA_1, MODEL_1 = ("run", "run-1"), ("data version", TAG), ("model version", "digits/1")
RELEASE, DEPLOYMENT = ("release", "digits-1.0.0"), ("deployment", "digits")
RUN_2, DATA_2, MODEL_2 = ("run", "run-2"), ("data version", OTHER_TAG), ("model version", "digits/2")


@pytest.mark.parametrize(
    ("subject", "came_from", "led_to"),
    [
        (TAG, {RUN_1, *FROM_RUN_1}, {MODEL_1, RELEASE, DEPLOYMENT}),
        ("run-1", FROM_RUN_1, {DATA_1, MODEL_1, RELEASE, DEPLOYMENT}),
        ("digits/1", {DATA_1, RUN_1, *FROM_RUN_1}, {RELEASE, DEPLOYMENT}),
        ("models:/digits/1", {DATA_1, RUN_1, *FROM_RUN_1}, {RELEASE, DEPLOYMENT}),
        (MODEL_URIS["1"], {DATA_1, RUN_1, *FROM_RUN_1}, {RELEASE, DEPLOYMENT}),
        (MLFLOW_RUNS["1"], {DATA_1, RUN_1, *FROM_RUN_1}, {RELEASE, DEPLOYMENT}),
        ("digits-1.0.0", {MODEL_1, DATA_1, RUN_1, *FROM_RUN_1}, {DEPLOYMENT}),
        ("digits 1.0.0", {MODEL_1, DATA_1, RUN_1, *FROM_RUN_1}, {DEPLOYMENT}),
        (f"digits-1.0.0-{'0' * 26}", {MODEL_1, DATA_1, RUN_1, *FROM_RUN_1}, {DEPLOYMENT}),
        ("digits/2", {DATA_2, RUN_2, *FROM_RUN_1}, set()),
        ("run-3", FROM_RUN_1, set()),
        ("3" * 32, FROM_RUN_1, set()),
        (
            "aaaaaaa",
            set(),
            {RUN_1, RUN_2, ("run", "run-3"), DATA_1, DATA_2, MODEL_1, MODEL_2, RELEASE, DEPLOYMENT},
        ),
        ("digits", set(), {DATA_1, DATA_2, MODEL_1, MODEL_2, RELEASE, DEPLOYMENT}),
    ],
)
def test_the_walk_goes_both_ways(
    hooks: Any, subject: str, came_from: set[tuple[str, str]], led_to: set[tuple[str, str]]
) -> None:
    found = lineage(hooks, subject)
    assert titles(found.came_from) == came_from
    assert titles(found.led_to) == led_to
    assert found.notes == []
    assert Lineage.model_validate_json(found.model_dump_json()) == found


def test_every_title_can_be_asked_for_again(hooks: Any) -> None:
    whole = lineage(hooks, "digits-1.0.0")
    for kind, title in titles(whole.came_from):
        if kind in {"run", "data version", "model version"}:
            again = lineage(hooks, title)
            assert (again.subject.kind.value, again.subject.title) == (kind, title)
            assert RELEASE in titles(again.led_to)


def test_each_thing_is_told_once_with_what_follows(hooks: Any) -> None:
    found = lineage(hooks, "digits-1.0.0")

    def opened(nodes: list[LineageNode]) -> list[str]:
        return [node.title for node in nodes if node.next] + [title for node in nodes for title in opened(node.next)]

    assert len(opened(found.came_from)) == len(set(opened(found.came_from)))
    run = next(node for node in found.came_from if node.kind is Kind.RUN)
    assert run.url == "http://airflow/dags/digits/runs/run-1"


def test_details_say_what_people_ask_first(hooks: Any) -> None:
    found = lineage(hooks, "digits/2")
    assert "rejected (candidate), accuracy 0.95" in found.subject.detail
    assert found.subject.url == "http://mlflow/digits/2"
    data = next(node for node in found.came_from if node.kind is Kind.DATA_VERSION)
    assert "train 70" in data.detail


@pytest.mark.parametrize(
    "subject",
    ["digits/99", "digits-9.9.9", "fffffff", "no-such-run", TAG.replace("first", "none"), "f" * 32, "models:/m-1", " "],
)
def test_what_nobody_knows_is_named(hooks: Any, subject: str) -> None:
    with pytest.raises(NotFoundError, match=subject.strip() or "nothing was named"):
        lineage(hooks, subject)


def test_a_short_hash_of_two_commits_is_refused(hooks: Any) -> None:
    plan = make_plan("run-4")
    commit = "a" * 8 + "0" * 32
    code = {**plan.code, "ds_model": plan.code["ds_model"].model_copy(update={"commit": commit})}
    value = plan.model_copy(update={"code": code}).model_dump(mode="json")
    hooks.store.put_json("airloom", "runs/digits/run-4/plan.json", value)
    with pytest.raises(NotFoundError, match="more than one commit") as caught:
        lineage(hooks, "aaaaaaaa")
    assert commit in str(caught.value)


def test_a_service_that_is_down_leaves_a_note_and_no_false_answer(hooks: Any) -> None:
    hooks.mlflow.error = UnavailableError("MLflow at http://x does not answer")
    found = lineage(hooks, TAG)
    assert found.notes == ["MLflow could not be asked: MLflow at http://x does not answer"]
    assert RELEASE in titles(found.led_to)  # the store knows it too
    with pytest.raises(UnavailableError, match="no model version 'digits/2' is known"):
        lineage(hooks, "digits/2")


def test_after_a_return_the_earlier_release_is_what_answers(hooks: Any) -> None:
    deployment = Deployment(
        pipeline="digits", release="1.0.1", previous="1.0.0", url="http://x", state="rolled_back", updated_at=NOW
    )
    hooks.store.put_json("airloom", "deployments/digits.json", deployment.model_dump(mode="json"))
    assert titles(lineage(hooks, "digits-1.0.0").led_to) == {DEPLOYMENT}


def test_files_of_another_version_of_airloom_are_passed_over(hooks: Any) -> None:
    hooks.store.put_json("airloom", "releases/digits/0.9.0.json", {"schema_version": 0})
    hooks.git.tags.append(Tag(OTHER_TAG.replace("second", "by-hand"), "1" * 40, "by hand"))
    assert DEPLOYMENT in titles(lineage(hooks, "digits").led_to)


@pytest.mark.parametrize(
    ("text", "kind", "pipeline", "name"),
    [
        (TAG, Kind.DATA_VERSION, "digits", TAG),
        (f"  {TAG}\n", Kind.DATA_VERSION, "digits", TAG),
        ("digits/3", Kind.MODEL_VERSION, "digits", "3"),
        ("models:/digits/3", Kind.MODEL_VERSION, "digits", "3"),
        ("digits/1.0.4", Kind.RELEASE, "digits", "1.0.4"),
        ("digits-1.0.4", Kind.RELEASE, "digits", "1.0.4"),
        ("digits 1.0.4", Kind.RELEASE, "digits", "1.0.4"),
        ("models:/m-abc", Kind.MODEL, None, "models:/m-abc"),
        ("digits", Kind.PIPELINE, "digits", "digits"),
        ("faces", Kind.RUN, None, "faces"),
        ("manual__2026-11-21T04:35:10+00:00", Kind.RUN, None, "manual__2026-11-21T04:35:10+00:00"),
        ("0123456", Kind.COMMIT, None, "0123456"),
        ("a" * 40, Kind.COMMIT, None, "a" * 40),
        ("a" * 32, Kind.MLFLOW_RUN, None, "a" * 32),
        ("a" * 41, Kind.RUN, None, "a" * 41),
    ],
)
def test_subjects_are_told_apart(text: str, kind: Kind, pipeline: str | None, name: str) -> None:
    subject = parse_subject(text, frozenset({"digits"}))
    assert (subject.kind, subject.pipeline, subject.name) == (kind, pipeline, name)
