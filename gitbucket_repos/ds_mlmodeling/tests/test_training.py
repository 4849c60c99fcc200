"""The train stage: same in, same out; killed and gone on with."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch
from modeling_samples import PARAMS, request_for, start_stage, write_dataset

from airloom.contract import ExitCode, Stage, StageInputError, StageResult, sha256_file, sha256_tree
from modeling.checkpoint import CHECKPOINT_FILE
from modeling.params import TrainParams
from modeling.schedule import Schedule
from modeling.train import train

WEIGHTS = "weights/network.pt"
LONG = {**PARAMS, "epochs": 30}


def test_it_learns(trained: StageResult) -> None:
    assert trained.metrics["validation_accuracy"] > 0.8
    assert trained.facts["model_digest"] == sha256_tree(trained.outputs["model"].path)


def test_the_same_training_gives_the_same_artifact(trained: StageResult, dataset: Path, tmp_path: Path) -> None:
    again = train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path))
    assert again.facts["model_digest"] == trained.facts["model_digest"]
    timings = {"seconds_per_epoch"}
    assert {k: v for k, v in again.metrics.items() if k not in timings} == {
        k: v for k, v in trained.metrics.items() if k not in timings
    }


def test_another_seed_gives_other_weights(trained: StageResult, dataset: Path, tmp_path: Path) -> None:
    other = train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, seed=8))
    ours, theirs = (result.outputs["model"].path / WEIGHTS for result in (trained, other))
    assert sha256_file(ours) != sha256_file(theirs)


def test_a_killed_training_resumes_and_ends_with_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    undisturbed = train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path / "whole", params=LONG))

    request = request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, params=LONG)
    process = start_stage(request, tmp_path)
    checkpoint = request.outputs["checkpoints"] / CHECKPOINT_FILE
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "result.json").exists()
    stopped_after = torch.load(checkpoint, weights_only=True)["epoch"]
    assert 1 <= stopped_after < LONG["epochs"]

    process = start_stage(request, tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == ExitCode.OK, output
    assert f"resuming after epoch {stopped_after} of {LONG['epochs']}" in output
    resumed = StageResult.read(tmp_path / "result.json")
    assert resumed.facts["model_digest"] == undisturbed.facts["model_digest"]
    assert resumed.metrics["validation_loss"] == undisturbed.metrics["validation_loss"]


def test_a_checkpoint_of_another_training_is_not_resumed(
    trained: StageResult, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, params={**PARAMS, "epochs": 1}, seed=99))
    after = train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path))
    assert "starting afresh" in capsys.readouterr().out
    assert after.facts["model_digest"] == trained.facts["model_digest"]


def test_the_kept_epoch_has_the_lowest_validation_loss(trained: StageResult) -> None:
    state = torch.load(trained.outputs["checkpoints"].path / CHECKPOINT_FILE, weights_only=True)
    losses = [row["validation_loss"] for row in state["history"]]
    assert trained.metrics["best_epoch"] == losses.index(min(losses)) + 1
    assert trained.metrics["validation_loss"] == min(losses)


@pytest.mark.parametrize(
    ("params", "said"), [({"epochs": 0}, "epochs.*found 0"), ({"epoch": 3}, "stages.train.params.epoch:")]
)
def test_a_wrong_parameter_is_named(dataset: Path, tmp_path: Path, params: dict[str, int], said: str) -> None:
    with pytest.raises(StageInputError, match=said):
        train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path, params=params))


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", rows=4)  # 4 // 6 rows for validation
    with pytest.raises(StageInputError, match=r"'validation' .* has no rows"):
        train(request_for(Stage.TRAIN, {"dataset": dataset}, tmp_path))


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    params = TrainParams()
    schedule = Schedule(rows=1000, batch_size=128, epochs=10, peak=params.learning_rate, warmup=0.1)
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (8, 80, 8)
    rates = [schedule.learning_rate(step) for step in range(schedule.steps)]
    assert rates[7] == max(rates) == params.learning_rate
    assert rates[:8] == sorted(rates[:8])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[-1] < 0.01 * max(rates)
