"""What is found after a deployment, and whose release answers then."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from airloom.contract import Deployment, Release
from airloom.errors import RolledBackError, ServiceError, UnavailableError
from airloom.flows import deployments, verify
from tests.fixtures.deploy_world import World, assert_rolled_back


def verified(world: World, release: Release, deployed: Deployment) -> Any:
    with mock.patch.object(verify, "receipt") as receipt:
        receipt.return_value.release = release
        return verify.verify_release(world.hooks, plan=world.plan, release=release, deployment=deployed)


def test_verify_makes_the_champion_and_ends_the_old_release(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    deployed = world.deploy(second)
    report = verified(world, second, deployed)
    assert (report.checked, report.equal) == (5, 5)
    world.hooks.mlflow.set_alias.assert_called_once_with(world.pipeline, "champion", "1")  # type: ignore[attr-defined]
    assert world.stopped == ["1.0.0"]


def test_verify_rolls_back_what_answers_wrongly_at_the_gateway(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    deployed = world.deploy(second)
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError, match="5 answers through the gateway are wrong"):
        verified(world, second, deployed)
    assert_rolled_back(world, "through the gateway")
    world.hooks.mlflow.set_alias.assert_not_called()  # type: ignore[attr-defined]


@pytest.mark.parametrize("lost", [False, True])
def test_verify_leaves_what_answered_before_its_run(world: World, lost: bool) -> None:
    """A run that found all its results made, later; the release before has ended, so nobody else could answer."""
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    assert not world.deploy(second).unchanged
    world.pin_again(60)
    deployed = world.deploy(second)
    assert deployed.unchanged
    assert world.deploy(second).unchanged, "in its next try too"
    world.processes["1.0.1"].wrong = not lost
    with (
        mock.patch.object(verify, "receipt", side_effect=UnavailableError("no prediction log")),
        mock.patch.object(verify, "_PATIENCE_SECONDS", 0.1),
        pytest.raises(UnavailableError if lost else ServiceError) as raised,
    ):
        verify.verify_release(world.hooks, plan=world.plan, release=second, deployment=deployed)
    said = "no prediction log" if lost else "5 answers through the gateway are wrong"
    assert f"release 1.0.1 goes on answering as before this run, but fails: {said}" in raised.value.message
    assert raised.value.retryable is lost
    found = deployments.deployment(world.hooks, world.pipeline)
    assert found is not None
    assert (found.release, found.state) == ("1.0.1", "live")
    assert world.answers() == {"1.0.1"}
    assert world.stopped == []


def test_what_answers_after_a_roll_back_by_verify_is_of_its_own_run(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    world.pin_again(60)
    bad = world.release("1.0.1")
    deployed = world.deploy(bad)
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError):
        verified(world, bad, deployed)
    world.pin_again(-61)
    assert world.deploy(world.release("1.0.2")).state == "superseded"
    world.pin_again(31)
    assert world.deploy(world.release("1.0.3")).state == "live"
    assert world.answers() == {"1.0.3"}


def test_what_is_deployed_again_after_a_roll_back_was_there_before(world: World) -> None:
    first = world.release("1.0.0")
    world.deploy(first)
    bad = world.release("1.0.1")
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError):
        world.deploy(bad)
    world.pin_again(60)
    deployed = world.deploy(first)
    assert (deployed.release, deployed.previous, deployed.unchanged) == ("1.0.0", None, True)


def test_verify_leaves_a_later_release_alone(world: World) -> None:
    first = world.release("1.0.0")
    deployed = world.deploy(first)
    world.deploy(world.release("1.0.1"))
    report = verified(world, first, deployed)
    assert (report.superseded_by, report.checked) == ("1.0.1", 0)
    assert world.answers() == {"1.0.1"}
    world.hooks.mlflow.set_alias.assert_not_called()  # type: ignore[attr-defined]


def test_verify_finds_that_a_later_release_was_rolled_back_to_it(world: World) -> None:
    first = world.release("1.0.0")
    deployed = world.deploy(first)
    second = world.release("1.0.1")
    later = world.deploy(second)
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError):
        verified(world, second, later)
    world.processes["1.0.1"].wrong = False
    assert verified(world, first, deployed).equal == 5
    world.hooks.mlflow.set_alias.assert_called_once_with(world.pipeline, "champion", "0")  # type: ignore[attr-defined]
    with pytest.raises(RolledBackError, match=r"release 1\.0\.1 \(rolled_back\) is deployed instead"):
        verified(world, second, later)


def test_a_run_that_was_pinned_earlier_takes_no_traffic_from_a_later_one(world: World) -> None:
    """It had more to do, or was tried again: what people pushed last is served nevertheless."""
    world.deploy(world.release("1.0.0"))
    world.pin_again(60)
    world.deploy(world.release("1.0.1"))
    stored = deployments.deployment(world.hooks, world.pipeline)
    world.pin_again(-30)
    late = world.release("1.0.2")
    deployed = world.deploy(late)
    assert (deployed.state, deployed.release, deployed.previous) == ("superseded", "1.0.2", "1.0.1")
    assert deployed.detail.startswith("release 1.0.1 answers, whose run was pinned later: at ")
    assert world.steps[-1].startswith("release 1.0.2 is superseded: release 1.0.1 answers")
    assert deployments.deployment(world.hooks, world.pipeline) == stored
    assert world.answers() == {"1.0.1"}
    assert "1.0.2" not in {call.args[0].version for call in world.target.start.call_args_list}
    report = verified(world, late, deployed)
    assert (report.superseded_by, report.checked) == ("1.0.1", 0)
    world.hooks.mlflow.set_alias.assert_not_called()  # type: ignore[attr-defined]


def test_a_run_that_brings_back_what_answers_counts_as_the_later_one(world: World) -> None:
    """A revert has the release that it had before, and nothing to move."""
    first = world.release("1.0.0")
    world.deploy(first)
    world.pin_again(60)
    assert world.deploy(first).state == "live"
    world.pin_again(-30)
    assert world.deploy(world.release("1.0.1")).state == "superseded"
    world.pin_again(60)
    assert world.deploy(world.release("1.0.2")).state == "live"
    world.pin_again(-60)
    assert world.deploy(world.release("1.0.3")).state == "superseded"
    assert world.answers() == {"1.0.2"}


def test_a_later_run_that_was_rolled_back_supersedes_nothing(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    world.pin_again(60)
    bad = world.release("1.0.1")
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError):
        world.deploy(bad)
    world.pin_again(-30)
    assert world.deploy(world.release("1.0.2")).state == "live"
    assert world.answers() == {"1.0.2"}


def test_the_champion_is_what_answers_after_a_roll_back(world: World) -> None:
    """The run of 1.0.1 left the champion to that of 1.0.2, which then gave the traffic back."""
    first = world.release("1.0.1")
    deployed = world.deploy(first)
    second = world.release("1.0.2")
    later = world.deploy(second)
    assert verified(world, first, deployed).superseded_by == "1.0.2"
    store, bucket = world.hooks.store, world.hooks.settings.bucket_airloom
    store.put_json(bucket, f"releases/{world.pipeline}/1.0.1.json", first.model_dump(mode="json"))
    world.processes["1.0.2"].wrong = True
    with pytest.raises(RolledBackError):
        verified(world, second, later)
    world.hooks.mlflow.set_alias.assert_called_once_with(world.pipeline, "champion", "1")  # type: ignore[attr-defined]
    assert world.answers() == {"1.0.1"}
