"""A run's stages on a real object store: cache, adoption, failures, kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import DataVersion, Stage
from airloom.errors import ConfigError, ContractError, NotFoundError, StageFailedError
from airloom.flows import cache, cache_lookup
from airloom.flows.stages import run_stage
from airloom.hooks.mlflow_records import ModelVersionInfo
from airloom.hooks.process_runner import ProcessRunner, find_jobs
from tests.fixtures.stage_flow import StageFlow

MODEL = {"model_uri": "models:/m-1", "model_digest": "a" * 64}


@pytest.fixture
def bench(stage_flow: StageFlow) -> StageFlow:
    return stage_flow


# What a stage is given and gives


def test_preprocess(bench: StageFlow, tmp_path: Path) -> None:
    plan = bench.plan("success", count=str(tmp_path / "count"))
    outcome = bench.run(plan)
    assert (outcome.stage, outcome.cache, outcome.reason) == (Stage.PREPROCESS, "miss", "first run of this stage")
    assert outcome.result.metrics == {"accuracy": 0.5}
    assert outcome.result.outputs["dataset"].files == 1
    assert outcome.key == cache.key_parts(plan, Stage.PREPROCESS, {"source": "f" * 64}).key
    assert outcome.peak_memory_bytes > 0
    request = bench.request(plan, Stage.PREPROCESS)
    assert Path(request["inputs"]["manifest"]).read_bytes() == b'{"key": "a.png"}\n'
    assert request["facts"]["source_uri"] == "s3://raw/tiny/"
    assert request["facts"]["s3_endpoint"] == bench.settings.s3_endpoint_url
    assert request["tracking"] is None


def test_preprocess_alone_gets_the_key_of_the_store(bench: StageFlow) -> None:
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


def test_train(bench: StageFlow) -> None:
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


def test_evaluate_with_and_without_a_champion(bench: StageFlow) -> None:
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


def test_a_promoted_candidate_is_not_evaluated_again(bench: StageFlow) -> None:
    train = bench.run(bench.plan("success", facts=MODEL), Stage.TRAIN)
    plan = bench.plan("success")
    before = ModelVersionInfo(bench.pipeline, "3", "r", "models:/m-9", {"airloom.digest": "c"})
    bench.mlflow.alias.return_value = before
    assert bench.run(plan, Stage.EVALUATE, train=train).cache == "miss"

    tags = {"airloom.digest": MODEL["model_digest"], "airloom.gate.champion": "3"}
    bench.mlflow.alias.return_value = ModelVersionInfo(bench.pipeline, "4", "r", MODEL["model_uri"], tags)
    bench.mlflow.version.return_value = before
    again = bench.run(plan.model_copy(update={"run_id": "later"}), Stage.EVALUATE, train=train)
    bench.mlflow.version.assert_called_once_with(bench.pipeline, "3")
    assert (again.cache, again.result.facts["champion_version"]) == ("hit", "3")


def test_what_is_missing_is_named(bench: StageFlow) -> None:
    with pytest.raises(ContractError, match="needs a data version"):
        run_stage(bench.hooks, plan=bench.plan("success"), stage=Stage.TRAIN)
    with pytest.raises(ContractError, match="model_uri and model_digest"):
        bench.run(bench.plan("success"), Stage.EVALUATE, train=bench.run(bench.plan("success"), Stage.TRAIN))
    with pytest.raises(ConfigError, match="serve is no stage of a run"):
        bench.run(bench.plan("success"), Stage.SERVE)


# The cache


def test_hit_miss_and_force(bench: StageFlow, tmp_path: Path) -> None:
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


def test_preprocess_is_a_hit_once_its_data_has_a_version(bench: StageFlow, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_failures(bench: StageFlow, do: str, message: str, retryable: bool) -> None:
    with pytest.raises(StageFailedError) as caught:
        bench.run(bench.plan(do))
    assert message in caught.value.message
    assert caught.value.retryable is retryable


def test_the_end_of_the_log_is_in_the_message(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError, match="last words"):
        bench.run(bench.plan("exit_3"))


def test_memory_limit(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError, match="its limit is 100 MiB") as caught:
        bench.run(bench.plan("memory", resources={"memory": "100MiB"}))
    assert "stages.preprocess.resources.memory" in (caught.value.hint or "")
    assert not caught.value.retryable


def test_time_limit(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError, match="longer than its limit of 1 s"):
        bench.run(bench.plan("sleep", resources={"timeout": "1s"}))


def test_full_shared_memory(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError, match="SIGBUS") as caught:
        bench.run(bench.plan("shared_memory_full"))
    assert "shared memory is full" in (caught.value.hint or "")


def test_a_failed_training_ends_its_mlflow_run(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("fault"), Stage.TRAIN)
    bench.mlflow.finish_run.assert_called_once_with("mlflow-run-1", "FAILED")


def test_a_failure_is_not_taken_twice(bench: StageFlow, tmp_path: Path) -> None:
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


def test_stop(bench: StageFlow) -> None:
    plan = bench.plan("sleep")
    with pytest.raises(StageFailedError, match="it was stopped"):
        bench.run(plan, should_stop=lambda: "ready" in bench.log)
    assert not list(find_jobs(bench.settings.workspaces_dir))


# Kills


def test_training_that_was_killed_goes_on_from_its_checkpoint(bench: StageFlow) -> None:
    plan = bench.plan("resume", facts=MODEL)
    with pytest.raises(StageFailedError) as caught:
        bench.run(plan, Stage.TRAIN)
    assert caught.value.retryable
    outcome = bench.run(plan, Stage.TRAIN)
    assert outcome.result.status == "ok"
    assert [line for line in bench.log if line in {"from the start", "resumed"}] == ["from the start", "resumed"]


def test_checkpoints_of_other_work_are_not_kept(bench: StageFlow) -> None:
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("resume"), Stage.TRAIN)
    with pytest.raises(StageFailedError):
        bench.run(bench.plan("resume", other=1), Stage.TRAIN)
    assert "resumed" not in bench.log
