"""A run's stages on a real object store: cache, adoption, failures, kills."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from airloom.contract import DataVersion, RunPlan, SourcePin, Stage, StageOutcome, StagePin
from airloom.errors import ConfigError, ContractError, NotFoundError, StageFailedError
from airloom.flows import cache, cache_lookup, stage_inputs
from airloom.flows.reap import live_in_airflow, reap, reap_run
from airloom.flows.stages import run_stage, workspace_of
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.mlflow import ModelRegistry
from airloom.hooks.mlflow_records import ModelVersionInfo
from airloom.hooks.object_store import ObjectStore
from airloom.hooks.process_runner import ProcessRunner, find_jobs
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.plans import make_data_version, make_plan, make_spec
from tests.fixtures.stage_repo import kill, processes_of, wait_until, write_stage_repo

pytest_plugins = ["tests.fixtures.s3", "tests.fixtures.stage_repo"]

MODEL = {"model_uri": "models:/m-1", "model_digest": "a" * 64}
_numbers = itertools.count(1)


class Bench:
    """Plans of one pipeline, and hooks whose git, MLflow and data versions are stand-ins."""

    def __init__(self, settings: Settings, store: ObjectStore) -> None:
        self.settings = settings
        self.pipeline = f"tiny_{next(_numbers)}"
        self.mlflow = create_autospec(ModelRegistry, instance=True)
        self.mlflow.start_run.return_value = "mlflow-run-1"
        self.mlflow.model_exists.return_value = True
        self.mlflow.alias.return_value = None
        self.mlflow.download_model.side_effect = self._download
        self.hooks: Any = SimpleNamespace(settings=settings, store=store, mlflow=self.mlflow)
        self.dataset = settings.home_dir / "dataset"
        self.dataset.mkdir(parents=True, exist_ok=True)
        for repo, letter in (("de_data", "a"), ("ds_model", "b")):
            folder = settings.checkouts_dir / repo / (letter * 40)
            if not folder.exists():
                write_stage_repo(folder)
                folder.with_name(f".{folder.name}.checked").touch()
        self.log: list[str] = []

    def plan(
        self, do: str, *, run_id: str = "manual__2026-11-21T05:00:00+00:00", force: bool = False, **params: Any
    ) -> RunPlan:
        resources = params.pop("resources", {})
        repos = {"preprocess": "de_data", "train": "ds_model", "evaluate": "ds_model", "serve": "ds_serve"}
        spec = make_spec(
            name=self.pipeline, stages={name: {"repo": repo, "resources": resources} for name, repo in repos.items()}
        )
        manifest = f"runs/{self.pipeline}/manifest.jsonl"
        self.hooks.store.put_bytes("airloom", manifest, b'{"key": "a.png"}\n')
        plan = make_plan(run_id, spec, force=force)
        pins = {
            stage: StagePin(repo=pin.repo, code_digest="d" * 64, environment="e" * 64, params={"do": do, **params})
            for stage, pin in plan.stages.items()
        }
        source = SourcePin(
            uri="s3://raw/tiny/", manifest=f"s3://airloom/{manifest}", digest="f" * 64, objects=1, size_bytes=1
        )
        return plan.model_copy(update={"stages": pins, "source": source})

    def run(self, plan: RunPlan, stage: Stage = Stage.PREPROCESS, **more: Any) -> StageOutcome:
        if stage is not Stage.PREPROCESS:
            more.setdefault("data_version", self.data_version())
        runner = ProcessRunner(poll_seconds=0.05)
        return run_stage(self.hooks, plan=plan, stage=stage, on_log=self.log.append, runner=runner, **more)

    def data_version(self) -> DataVersion:
        return make_data_version(f"{self.pipeline}/CV_first_aaaaaaaa_DV_20261121T043510123Z")

    def workspace(self, plan: RunPlan, stage: Stage = Stage.PREPROCESS) -> Path:
        return workspace_of(self.settings, plan.pipeline, plan.run_id, stage)

    def request(self, plan: RunPlan, stage: Stage) -> Any:
        return json.loads((self.workspace(plan, stage) / "request.json").read_text())

    def _download(self, model_uri: str, expected_digest: str | None = None) -> Path:
        folder = self.settings.home_dir / "models" / model_uri.rpartition("/")[2]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@pytest.fixture
def bench(tmp_path: Path, s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    settings = make_settings(tmp_path / "home", s3_url=s3_store.endpoint_url)
    found = Bench(settings, s3_store)
    monkeypatch.setattr(stage_inputs, "_materialize", lambda hooks, version: found.dataset)
    yield found
    reap(settings, is_live=lambda pipeline, run_id: False)
    assert not list(find_jobs(settings.workspaces_dir))


# What a stage is given and gives


def test_preprocess(bench: Bench, tmp_path: Path) -> None:
    plan = bench.plan("success", count=str(tmp_path / "count"))
    outcome = bench.run(plan)
    assert (outcome.stage, outcome.cache, outcome.reason) == (Stage.PREPROCESS, "miss", "first run of this stage")
    assert outcome.result.metrics == {"accuracy": 0.5}
    assert outcome.result.outputs["dataset"].files == 1
    assert outcome.key == cache.key_of(plan, Stage.PREPROCESS, {"source": "f" * 64})
    assert outcome.peak_memory_bytes > 0
    request = bench.request(plan, Stage.PREPROCESS)
    assert Path(request["inputs"]["manifest"]).read_bytes() == b'{"key": "a.png"}\n'
    assert request["facts"]["source_uri"] == "s3://raw/tiny/"
    assert request["facts"]["s3_endpoint"] == bench.settings.s3_endpoint_url
    assert request["tracking"] is None


def test_preprocess_alone_gets_the_key_of_the_store(bench: Bench) -> None:
    bench.run(bench.plan("environment"))
    bench.run(bench.plan("environment"), Stage.TRAIN)
    first, second = (json.loads(line) for line in bench.log if line.startswith("{"))
    assert first["AWS_ACCESS_KEY_ID"] == "airloom"
    assert first["AWS_SECRET_ACCESS_KEY"] == bench.settings.secret("s3_airloom_secret")
    assert "MLFLOW_TRACKING_URI" not in first
    assert second["MLFLOW_TRACKING_URI"] == bench.settings.mlflow_api_url
    assert not [name for name in second if name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    secrets = {bench.settings.secret(name) for name in ("admin_password", "git_password", "s3_admin_secret")}
    assert not secrets & ({*first.values()} | {*second.values()})


def test_train(bench: Bench) -> None:
    plan = bench.plan("success", facts=MODEL)
    outcome = bench.run(plan, Stage.TRAIN)
    assert outcome.result.facts == {**MODEL, "mlflow_run_id": "mlflow-run-1"}
    experiment, key, tags = bench.mlflow.start_run.call_args.args
    assert (experiment, key) == (bench.pipeline, f"{bench.pipeline}/{plan.run_id}")
    assert tags["airloom.data_tag"] == bench.data_version().tag
    assert tags["airloom.commit.ds_model"] == "b" * 40
    request = bench.request(plan, Stage.TRAIN)
    assert request["tracking"]["run_id"] == "mlflow-run-1"
    assert request["facts"]["data_md5"] == bench.data_version().md5
    assert set(request["outputs"]) == {"checkpoints", "model"}
    assert set(request["inputs"]) == {"dataset"}


def test_evaluate_with_and_without_a_champion(bench: Bench) -> None:
    train = bench.run(bench.plan("success", facts=MODEL), Stage.TRAIN)
    plan = bench.plan("success")
    first = bench.run(plan, Stage.EVALUATE, train=train)
    assert set(bench.request(plan, Stage.EVALUATE)["inputs"]) == {"dataset", "model"}
    assert "champion_version" not in first.result.facts
    bench.mlflow.finish_run.assert_called_once_with("mlflow-run-1", "FINISHED")

    bench.mlflow.alias.return_value = ModelVersionInfo(bench.pipeline, "3", "r", "models:/m-9", {"airloom.digest": "c"})
    second = bench.run(plan, Stage.EVALUATE, train=train)
    assert set(bench.request(plan, Stage.EVALUATE)["inputs"]) == {"dataset", "model", "champion"}
    assert second.result.facts["champion_version"] == "3"
    assert (second.cache, second.reason) == ("miss", "champion new")

    # The same model under another number: the result is used again, the number is today's.
    bench.mlflow.alias.return_value = ModelVersionInfo(bench.pipeline, "4", "r", "models:/m-9", {"airloom.digest": "c"})
    third = bench.run(plan.model_copy(update={"run_id": "later"}), Stage.EVALUATE, train=train)
    assert third.cache == "hit"
    assert third.result.facts["champion_version"] == "4"


def test_what_is_missing_is_named(bench: Bench) -> None:
    with pytest.raises(ContractError, match="needs a data version"):
        run_stage(bench.hooks, plan=bench.plan("success"), stage=Stage.TRAIN)
    with pytest.raises(ContractError, match="model_uri and model_digest"):
        bench.run(bench.plan("success"), Stage.EVALUATE, train=bench.run(bench.plan("success"), Stage.TRAIN))
    with pytest.raises(ConfigError, match="serve is no stage of a run"):
        bench.run(bench.plan("success"), Stage.SERVE)


# The cache


def test_hit_miss_and_force(bench: Bench, tmp_path: Path) -> None:
    count = tmp_path / "count"
    params = {"facts": MODEL, "count": str(count)}
    first = bench.run(bench.plan("success", run_id="run-1", **params), Stage.TRAIN)
    second = bench.run(bench.plan("success", run_id="run-2", **params), Stage.TRAIN)
    assert (second.cache, second.reason, second.seconds) == ("hit", "equal to run run-1", 0.0)
    assert second.result == first.result
    assert "cache hit: equal to run run-1" in "\n".join(bench.log)
    assert count.read_text() == "ran\n"

    changed = bench.run(bench.plan("success", run_id="run-3", value="2", **params), Stage.TRAIN)
    assert (changed.cache, changed.reason) == ("miss", "parameters changed: value 2 added")
    forced = bench.run(bench.plan("success", run_id="run-4", force=True, **params), Stage.TRAIN)
    assert (forced.cache, forced.reason) == ("forced", "the run was told to run every stage")
    assert count.read_text() == "ran\n" * 3

    bench.mlflow.model_exists.return_value = False
    lost = bench.run(bench.plan("success", run_id="run-5", **params), Stage.TRAIN)
    assert lost.cache == "miss"
    assert "models:/m-1 is gone from MLflow" in lost.reason


def test_preprocess_is_a_hit_once_its_data_has_a_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = bench.plan("success", run_id="run-1")
    outcome = bench.run(plan)
    assert bench.run(bench.plan("success", run_id="run-2")).cache == "miss"
    version = bench.data_version()
    cache.record(bench.hooks, plan, outcome.model_copy(update={"data_version": version}))
    monkeypatch.setattr(cache_lookup, "verify_remote", lambda hooks, found: None)
    hit = bench.run(bench.plan("success", run_id="run-3"))
    assert (hit.cache, hit.data_version) == ("hit", version)

    def gone(hooks: Any, found: DataVersion) -> None:
        raise NotFoundError("the object x is missing")

    monkeypatch.setattr(cache_lookup, "verify_remote", gone)
    lost = bench.run(bench.plan("success", run_id="run-4"))
    assert lost.cache == "miss"
    assert "the object x is missing" in lost.reason


# Failures


@pytest.mark.parametrize(
    ("do", "message", "retryable"),
    [
        ("bad_data", "no pictures; put some into raw/", False),
        ("temporary", "something outside did not answer: the store is away", True),
        ("unavailable", "MLflow is away", True),
        ("fault", "ValueError: a fault in the code", False),
        ("disk_full", "No space left on device", False),
        ("exit_3", "exit code 3", False),
        ("exit_137", "killed by SIGKILL", True),
        ("sigkill", "killed by SIGKILL", True),
        ("sigsegv", "crashed with SIGSEGV", False),
        ("no_result", "there is no such file", False),
        ("spoil_result", "is not a valid StageResult", False),
        ("lie", "its result says 7 files", False),
    ],
)
def test_failures(bench: Bench, do: str, message: str, retryable: bool) -> None:
    with pytest.raises(StageFailedError) as caught:
        bench.run(bench.plan(do))
    assert message in caught.value.message
    assert caught.value.retryable is retryable


def test_the_end_of_the_log_is_in_the_message(bench: Bench) -> None:
    with pytest.raises(StageFailedError, match="last words"):
        bench.run(bench.plan("exit_3"))


def test_memory_limit(bench: Bench) -> None:
    with pytest.raises(StageFailedError, match="its limit is 100 MiB") as caught:
        bench.run(bench.plan("memory", resources={"memory": "100MiB"}))
    assert "stages.preprocess.resources.memory" in (caught.value.hint or "")
    assert not caught.value.retryable


def test_time_limit(bench: Bench) -> None:
    with pytest.raises(StageFailedError, match="longer than its limit of 1 s"):
        bench.run(bench.plan("sleep", resources={"timeout": "1s"}))


def test_full_shared_memory(bench: Bench) -> None:
    with pytest.raises(StageFailedError, match="SIGBUS") as caught:
        bench.run(bench.plan("shared_memory_full"))
    assert "shared memory is full" in (caught.value.hint or "")


def test_a_failed_training_ends_its_mlflow_run(bench: Bench) -> None:
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("fault"), Stage.TRAIN)
    bench.mlflow.finish_run.assert_called_once_with("mlflow-run-1", "FAILED")


def test_a_failure_is_not_taken_twice(bench: Bench, tmp_path: Path) -> None:
    plan = bench.plan("temporary")
    with pytest.raises(StageFailedError):
        bench.run(plan)
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    with pytest.raises(StageFailedError):
        bench.run(plan)
    again = ProcessRunner().find(bench.workspace(plan))
    assert again is not None
    assert again.id != handle.id


def test_stop(bench: Bench) -> None:
    plan = bench.plan("sleep")
    with pytest.raises(StageFailedError, match="it was stopped"):
        bench.run(plan, should_stop=lambda: "ready" in bench.log)
    assert not list(find_jobs(bench.settings.workspaces_dir))


# Kills


def test_training_that_was_killed_goes_on_from_its_checkpoint(bench: Bench) -> None:
    plan = bench.plan("resume", facts=MODEL)
    with pytest.raises(StageFailedError) as caught:
        bench.run(plan, Stage.TRAIN)
    assert caught.value.retryable
    outcome = bench.run(plan, Stage.TRAIN)
    assert outcome.result.status == "ok"
    assert [line for line in bench.log if line in {"from the start", "resumed"}] == ["from the start", "resumed"]


def test_checkpoints_of_other_work_are_not_kept(bench: Bench) -> None:
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("resume"), Stage.TRAIN)
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("resume", other=1), Stage.TRAIN)
    assert "resumed" not in bench.log


WORKER = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from airloom.contract import RunPlan, Stage
from airloom.flows.stages import run_stage
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings

settings = Settings(_env_file=None, **json.loads(sys.argv[1]))
hooks = SimpleNamespace(settings=settings, store=ObjectStore.from_settings(settings))
run_stage(hooks, plan=RunPlan.model_validate_json(sys.argv[2]), stage=Stage.PREPROCESS,
          on_log=lambda line: print(line, flush=True))
"""


def killed_worker(bench: Bench, plan: RunPlan, until: str) -> list[str]:
    """Run a stage in a worker of its own and kill the worker when a line has come: what it had logged."""
    values = json.dumps({name: str(value) for name, value in bench.settings.model_dump().items()})
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, values, plan.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    lines = []
    for line in worker.stdout:
        lines.append(line.rstrip("\n"))
        if line.strip() == until:
            break
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    return lines


def test_killed_worker(bench: Bench, tmp_path: Path) -> None:
    """Kill the worker while its stage runs: the next try adopts it, and the stage has run once."""
    count = tmp_path / "count"
    plan = bench.plan("lines", lines=60, pause=0.05, count=str(count))
    seen = killed_worker(bench, plan, "line 3")
    outcome = bench.run(plan)
    assert (outcome.cache, outcome.reason) == ("miss", "first run of this stage")
    assert any("adopting process" in line for line in bench.log)
    numbers = {int(line.split()[1]) for line in [*seen, *bench.log] if line.startswith("line ")}
    assert numbers == set(range(60))
    assert count.read_text() == "ran\n"


def test_stage_that_ended_after_its_worker_was_killed(bench: Bench, tmp_path: Path) -> None:
    go, count = tmp_path / "go", tmp_path / "count"
    plan = bench.plan("wait_for_file", file=str(go), count=str(count))
    killed_worker(bench, plan, "waiting")
    go.touch()
    wait_until((bench.workspace(plan) / "exit.json").exists, "end of the stage")
    assert bench.run(plan).result.status == "ok"
    assert count.read_text() == "ran\n"


def test_worker_and_shim_killed(bench: Bench, tmp_path: Path) -> None:
    """Nobody is left: the next try starts afresh, with empty outputs, and no process of the first remains."""
    count = tmp_path / "count"
    plan = bench.plan("lines", lines=40, pause=0.05, count=str(count))
    killed_worker(bench, plan, "line 1")
    (bench.workspace(plan) / "outputs" / "dataset" / "half").write_text("half")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    kill(handle.pid)
    outcome = bench.run(plan)
    assert outcome.result.outputs["dataset"].files == 1
    assert not processes_of(handle.id)
    assert count.read_text() == "ran\n"


def test_running_stage_with_other_inputs_is_stopped(bench: Bench) -> None:
    killed_worker(bench, bench.plan("sleep"), "ready")
    plan = bench.plan("success")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    assert bench.run(plan).result.status == "ok"
    assert not processes_of(handle.id)


# The reaper


def test_reaper_ends_stages_of_dead_runs_only(bench: Bench) -> None:
    dead, live = bench.plan("family", run_id="dead:1"), bench.plan("family", run_id="live:1")
    killed_worker(bench, dead, "ready")
    killed_worker(bench, live, "ready")
    handles = {run: ProcessRunner().find(bench.workspace(plan)) for run, plan in (("dead", dead), ("live", live))}
    ended = reap(bench.settings, is_live=lambda pipeline, run_id: run_id == "live:1")
    assert [(item.pipeline, item.run_id, item.stage) for item in ended] == [(bench.pipeline, "dead:1", "preprocess")]
    assert handles["dead"]
    assert handles["live"]
    assert not processes_of(handles["dead"].id)
    assert len(processes_of(handles["live"].id)) == 4
    assert reap_run(bench.settings, bench.pipeline, "other") == []
    assert len(reap_run(bench.settings, bench.pipeline, "live:1")) == 1
    assert not processes_of(handles["live"].id)


def test_reaper_ends_what_a_killed_shim_has_left(bench: Bench) -> None:
    plan = bench.plan("family")
    killed_worker(bench, plan, "ready")
    handle = ProcessRunner().find(bench.workspace(plan))
    assert handle is not None
    kill(handle.pid)
    assert len(reap(bench.settings, is_live=lambda pipeline, run_id: True)) == 1
    assert not processes_of(handle.id)


def test_whether_a_run_is_live(bench: Bench) -> None:
    bench.hooks.airflow = create_autospec(AirflowApi, instance=True)
    is_live = live_in_airflow(bench.hooks)
    for state, live in (("running", True), ("queued", True), ("failed", False), ("success", False)):
        bench.hooks.airflow.run.return_value = {"state": state}
        assert is_live("digits", "run-1") is live
    bench.hooks.airflow.run.side_effect = NotFoundError("no such run")
    assert not is_live("digits", "run-1")
