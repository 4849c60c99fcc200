"""Plans, pinned against a real git server and a real object store."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from airloom.contract import ImageRef, RunPlan, Trigger
from airloom.contract.build import BuildRecord
from airloom.contract.enums import Runner, Stage
from airloom.errors import ConfigError, ContractError, DataRejectedError, NotFoundError
from airloom.flows.environment import environment, environment_digest
from airloom.flows.resolve import RunParams, load_plan, plan_uri, resolve
from airloom.hooks.connect import Hooks
from airloom.spec import PipelineSpec
from tests.fixtures.plans import NOW, make_spec

if TYPE_CHECKING:
    from airloom.hooks.object_store import ObjectStore
    from tests.fixtures.git import StageRepoFixture

STAGES = {stage: {"paths": ["main.py", f"{stage}_code"]} for stage in ("preprocess", "train", "evaluate", "serve")}
FILES = {
    "stages.yaml": json.dumps({"stages": STAGES}),
    "main.py": "print('stage')\n",
    **{f"{stage}_code/work.py": f"# {stage}\n" for stage in STAGES},
}


@dataclass
class Project:
    """A pipeline whose four stages live in one repo, and raw data of its own."""

    hooks: Hooks
    repo: StageRepoFixture
    store: ObjectStore
    first: str

    def spec(self, **changes: Any) -> PipelineSpec:
        stages = {stage: {"repo": self.repo.name, "params": {"stage": stage}, "seed": 7} for stage in STAGES}
        source = {"uri": f"s3://raw/{self.repo.name}/"}
        return make_spec(**{"name": self.repo.name, "source": source, "stages": stages, **changes})

    def resolve(self, run_id: str = "run-1", spec: PipelineSpec | None = None, **params: Any) -> RunPlan:
        return resolve(
            self.hooks,
            spec=spec or self.spec(),
            run_id=run_id,
            params=RunParams.parse(params),
            trigger=Trigger(kind="manual", by="ada"),
            now=NOW,
        )

    def put(self, name: str, content: bytes) -> None:
        self.store.put_bytes("raw", f"{self.repo.name}/{name}", content)

    def tag(self, name: str, message: str, **files: str) -> str:
        tag = f"{self.repo.name}/CV_{name}_{self.first[:8]}_DV_20261121T043510123Z"
        self.hooks.git.write_version(
            self.repo.name,
            parent=self.first,
            files={"data/x.dvc": b"x", **{f"data/{name}.json": text.encode() for name, text in files.items()}},
            tag=tag,
            message=message,
            commit_message="Data",
        )
        return tag


@pytest.fixture
def project(stage_repo: StageRepoFixture, s3_store: ObjectStore) -> Project:
    first = stage_repo.commit_files("First: größer ✨", FILES)
    stage_repo.push()
    made = Project(Hooks(stage_repo.settings), stage_repo, s3_store, first)
    made.put("a.png", b"one")
    made.put("b.png", b"two!")
    return made


def test_a_run_is_pinned_once(project: Project) -> None:
    plan = project.resolve("manual__2026-11-21T04:35:10+00:00")
    assert {repo: pin.commit for repo, pin in plan.code.items()} == {project.repo.name: project.first}
    assert plan.code[project.repo.name].message == "First: größer ✨"
    assert (plan.source.objects, plan.source.size_bytes) == (2, 7)
    assert {stage: pin.params for stage, pin in plan.stages.items()} == {s: {"stage": s.value} for s in plan.stages}
    assert {pin.seed for pin in plan.stages.values()} == {7}
    assert len({pin.code_digest for pin in plan.stages.values()}) == 4
    assert {pin.environment for pin in plan.stages.values()} == {environment_digest()}
    assert project.store.get_json("airloom", f"environments/{environment_digest()}.json") == environment()
    assert load_plan(project.hooks, plan_uri(project.hooks, plan)) == plan

    project.repo.commit("Second", more="x")
    project.repo.push()
    project.put("c.png", b"three")
    assert project.resolve("manual__2026-11-21T04:35:10+00:00") == plan
    later = project.resolve("run-2")
    assert later.code != plan.code
    assert later.source.objects == 3
    # The new commit changed no stage's files.
    assert {s: pin.code_digest for s, pin in later.stages.items()} == {
        s: pin.code_digest for s, pin in plan.stages.items()
    }


def test_a_change_of_one_stage_changes_its_digest_alone(project: Project) -> None:
    before = project.resolve("run-1")
    project.repo.commit_files("Train longer", {"train_code/work.py": "# longer\n"})
    project.repo.push()
    after = project.resolve("run-2")
    changed = [stage for stage in Stage if stage in before.stages and before.stages[stage] != after.stages[stage]]
    assert changed == [Stage.TRAIN]


def test_tries_of_one_run_at_once_agree(project: Project) -> None:
    barrier = threading.Barrier(6)

    def one(number: int) -> RunPlan:
        hooks = Hooks(project.repo.settings)
        barrier.wait()
        return resolve(
            hooks,
            spec=project.spec(),
            run_id="same",
            params=RunParams(),
            trigger=Trigger(kind="manual", by=str(number)),
            now=NOW,
        )

    with ThreadPoolExecutor(6) as pool:
        plans = list(pool.map(one, range(6)))
    assert all(plan == plans[0] for plan in plans)


def test_an_older_commit_can_be_named(project: Project) -> None:
    second = project.repo.commit_files("Second", {"main.py": "print(2)\n"})
    project.repo.push("main", "main:refs/heads/feature/wider")
    for number, (revision, expected) in enumerate(
        [
            (project.first, project.first),
            (project.first[:9], project.first),
            ("feature/wider", second),
            ("main", second),
        ]
    ):
        plan = project.resolve(f"run-{number}", commits={project.repo.name: revision})
        assert plan.code[project.repo.name].commit == expected


@pytest.mark.parametrize("revision", ["0" * 40, "nowhere", "feature/none"])
def test_a_commit_that_is_not_there_is_named_with_its_repo(project: Project, revision: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        project.resolve(commits={project.repo.name: revision})
    assert revision in str(caught.value)
    assert project.repo.name in str(caught.value)


def test_an_empty_repo_says_what_to_do(project: Project, stage_repo: StageRepoFixture) -> None:
    project.hooks.gitbucket.ensure_repo("empty_repo", "nothing in it")
    spec = project.spec(stages={stage: {"repo": "empty_repo"} for stage in STAGES})
    with pytest.raises(NotFoundError, match="empty_repo has no branch 'main'") as caught:
        project.resolve(spec=spec)
    assert "push" in str(caught.value)


def test_a_repo_that_is_not_there_is_named(project: Project) -> None:
    spec = project.spec(stages={stage: {"repo": "no_such_repo"} for stage in STAGES})
    with pytest.raises(NotFoundError, match="no_such_repo"):
        project.resolve(spec=spec)


def test_a_repo_without_the_stage_is_named(project: Project) -> None:
    stages = {stage: paths for stage, paths in STAGES.items() if stage != "train"}
    commit = project.repo.commit_files("No training", {"stages.yaml": json.dumps({"stages": stages})})
    project.repo.push()
    with pytest.raises(ConfigError, match="no stage 'train'") as caught:
        project.resolve()
    assert f"{project.repo.name}@{commit[:8]}" in str(caught.value)
    assert "preprocess, evaluate, serve" in str(caught.value)


def test_no_raw_data_is_named_with_its_address(project: Project) -> None:
    spec = project.spec(source={"uri": "s3://raw/nothing-here/"})
    with pytest.raises(DataRejectedError, match="s3://raw/nothing-here/"):
        project.resolve(spec=spec)
    assert not project.store.exists("airloom", f"runs/{project.repo.name}/run-1/plan.json")


def test_a_plan_of_another_version_of_airloom_is_refused(project: Project) -> None:
    project.store.put_json("airloom", f"runs/{project.repo.name}/old/plan.json", {"schema_version": 0})
    with pytest.raises(ContractError, match="cannot be read by this version"):
        project.resolve("old")


# Reproducing


def test_a_tag_is_reproduced_with_code_parameters_and_data_of_then(project: Project) -> None:
    then = project.resolve("then")
    tag = project.tag("then", json.dumps({"plan": plan_uri(project.hooks, then)}))
    project.put("a.png", b"replaced")
    project.put("z.png", b"new")
    project.repo.commit_files("Later", {"train_code/work.py": "# later\n"})
    project.repo.push()
    stages = {stage: {"repo": project.repo.name, "params": {"changed": True}, "seed": 8} for stage in STAGES}
    today = project.spec(stages=stages, gate={"thresholds": {"accuracy": {"min": 0.99}}}, owner="somebody-else")

    again = project.resolve("again", today, reproduce=tag, force=True)
    assert again.reproduces == tag
    assert again.force
    assert (again.code, again.stages, again.source) == (then.code, then.stages, then.source)
    assert again.spec["gate"] == today.model_dump(mode="json")["gate"]
    assert again.spec["owner"] == then.spec["owner"]
    assert again.run_id == "again"
    assert "differs" not in again.trigger.detail
    # What it reads are the bytes of then.
    manifest = project.store.get_bytes(*project.store.split_uri(again.source.manifest))
    rows = [json.loads(line) for line in manifest.splitlines()]
    contents = [project.store.get_bytes("raw", row["key"], version_id=row["version_id"]) for row in rows]
    assert contents == [b"one", b"two!"]


def test_a_tag_whose_plan_left_the_store_is_reproduced_from_the_copy_in_its_commit(project: Project) -> None:
    then = project.resolve("then")
    uri = plan_uri(project.hooks, then)
    tag = project.tag("copy", json.dumps({"plan": uri}), plan=then.model_dump_json())
    project.store.remove(*project.store.split_uri(uri))
    again = project.resolve("again", reproduce=tag)
    assert (again.code, again.stages, again.source) == (then.code, then.stages, then.source)


def test_another_environment_than_then_is_told(project: Project) -> None:
    then = project.resolve("then")
    stages = {stage: pin.model_copy(update={"environment": "0" * 64}) for stage, pin in then.stages.items()}
    other = then.model_copy(update={"run_id": "elsewhere", "stages": stages})
    uri = plan_uri(project.hooks, other)
    project.store.put_json(*project.store.split_uri(uri), other.model_dump(mode="json"))
    again = project.resolve("again", reproduce=project.tag("elsewhere", json.dumps({"plan": uri})))
    names = ", ".join(stage.value for stage in again.stages)
    assert f"the environment of {names} differs from then (000000000000" in again.trigger.detail
    assert {pin.environment for pin in again.stages.values()} == {environment_digest()}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("made by hand", "no JSON with a plan, found 'made by hand'"),
        ("[1]", "no JSON with a plan"),
        ('{"no": "plan"}', "no JSON with a plan"),
    ],
)
def test_a_tag_that_airloom_did_not_write_is_refused(project: Project, message: str, said: str) -> None:
    with pytest.raises(ContractError, match=said.replace("[", r"\[")):
        project.resolve(reproduce=project.tag("by-hand", message))


def test_what_a_tag_needs_and_is_gone_is_named(project: Project) -> None:
    gone = f"{project.repo.name}/CV_gone_{project.first[:8]}_DV_20261121T043510123Z"
    with pytest.raises(NotFoundError, match="CV_gone"):
        project.resolve(reproduce=gone)
    without_plan = project.tag("no-plan", '{"plan": "s3://airloom/runs/none/plan.json"}')
    with pytest.raises(NotFoundError, match=r"s3://airloom/runs/none/plan\.json"):
        project.resolve(reproduce=without_plan)
    then = project.resolve("then")
    tag = project.tag("no-manifest", json.dumps({"plan": plan_uri(project.hooks, then)}))
    project.store.remove(*project.store.split_uri(then.source.manifest))
    with pytest.raises(NotFoundError, match="list of raw data of run then is gone"):
        project.resolve("again", reproduce=tag)


def test_containers_run_the_image_of_the_commits_build(project: Project) -> None:
    """The runtime, and not the image, is what a stage's cached result depends on."""
    settings = project.hooks.settings.model_copy(update={"runner": "docker"})
    project.hooks.settings = settings
    with pytest.raises(NotFoundError, match=f"no image of {project.repo.name}@{project.first[:8]}") as raised:
        project.resolve()
    assert f"airloom build {project.repo.name}@{project.first[:8]}" in str(raised.value.hint)
    image = ImageRef(
        name=f"airloom/{project.repo.name}", tag=project.first, digest=f"sha256:{'1' * 64}", pushed=False, runtime="r1"
    )
    record = BuildRecord(
        repo=project.repo.name, commit=project.first, message="m", author="a", environment="e",
        stages={}, image=image, built_at=NOW, seconds=1,
    )  # fmt: skip
    key = f"builds/{project.repo.name}/{project.first}.json"
    project.store.put_json("airloom", key, record.model_dump(mode="json"))
    plan = project.resolve()
    assert plan.runner is Runner.DOCKER
    train, serve = plan.stages[Stage.TRAIN], plan.stages[Stage.SERVE]
    assert (train.image, train.environment) == (image, "r1")
    assert (serve.image, serve.environment) == (None, environment_digest())
    # Releases answer from containers where the deployment's target says so.
    project.hooks.settings = settings.model_copy(update={"deploy_target": "docker"})
    assert project.resolve("served").stages[Stage.SERVE].image == image


def test_a_runner_that_there_is_not_is_named(project: Project) -> None:
    project.hooks.settings = project.hooks.settings.model_copy(update={"runner": "podman"})
    with pytest.raises(ConfigError, match="AIRLOOM_RUNNER is 'podman'"):
        project.resolve()


def test_a_target_that_there_is_not_or_does_not_go_with_the_runner_is_named(project: Project) -> None:
    settings = project.hooks.settings
    project.hooks.settings = settings.model_copy(update={"deploy_target": "nomad"})
    with pytest.raises(ConfigError, match="AIRLOOM_DEPLOY_TARGET is 'nomad'"):
        project.resolve()
    project.hooks.settings = settings.model_copy(update={"runner": "process", "deploy_target": "docker"})
    with pytest.raises(ConfigError, match="needs images"):
        project.resolve()
