"""Releases and their deployment, to serving processes that behave and misbehave."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from airloom.contract import Release
from airloom.errors import ContractError, NotFoundError, PlatformError, RolledBackError
from airloom.flows import deploy, deployments
from airloom.flows.release import _number, releases
from tests.fixtures.deploy_world import ROWS, World, assert_rolled_back
from tests.fixtures.plans import make_release


def test_the_first_release_gets_all_traffic(world: World) -> None:
    deployed = world.deploy(world.release("1.0.0"))
    assert (deployed.state, deployed.previous) == ("live", None)
    assert world.answers() == {"1.0.0"}


def test_a_good_release_takes_over_in_steps_and_the_old_one_waits_for_verify(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    deployed = world.deploy(world.release("1.0.1"))
    assert (deployed.release, deployed.previous, deployed.state) == ("1.0.1", "1.0.0", "live")
    assert world.answers() == {"1.0.1"}
    assert [step.split("%")[0] for step in world.steps[-3:]] == ["10", "50", "100"]
    assert world.stopped == []


def test_deploying_again_changes_nothing(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    world.deploy(second)
    again = world.deploy(second)
    assert (again.release, again.previous, again.state) == ("1.0.1", "1.0.0", "live")
    assert not again.unchanged, "the same run's: what it moved can be given back"
    assert world.answers() == {"1.0.1"}


def test_wrong_answers_never_get_traffic(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    bad = world.release("1.0.1")
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError, match=r"1\.0\.1 was rolled back, release 1\.0\.0 answers: 5 reference answers"):
        world.deploy(bad)
    assert_rolled_back(world, "label is '1', the evaluation had '0'")


def test_errors_under_traffic_roll_back(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    bad = world.release("1.0.1")
    threading.Timer(1.0, lambda: setattr(world.processes["1.0.1"], "failing", True)).start()
    with pytest.raises(RolledBackError, match="500"):
        world.deploy(bad)
    assert_rolled_back(world, "500")


def test_errors_that_only_clients_meet_roll_back(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    bad = world.release("1.0.1")
    # More than the reference rows of the first check, fewer than a step's probes.
    world.processes["1.0.1"].client_errors_after = len(ROWS) + 4
    with pytest.raises(RolledBackError, match=r"3 of its \d+ answers failed"):
        world.deploy(bad)
    assert_rolled_back(world, "allowed are 0.00%")


def test_slowness_rolls_back_with_both_figures(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    slow = world.release("1.0.1")
    world.processes["1.0.1"].delay_seconds = 0.3
    with pytest.raises(RolledBackError, match="times the earlier release's"):
        world.deploy(slow)
    assert_rolled_back(world, "median latency")


def test_a_release_may_be_as_slow_with_the_traffic_as_the_earlier_one_was(world: World) -> None:
    """At the last step the earlier release has none of it left."""
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    world.processes["1.0.0"].delay_seconds, world.processes["1.0.1"].delay_seconds = 0.05, 0.08

    def on_step(text: str) -> None:
        if text.startswith("10%"):
            world.processes["1.0.0"].delay_seconds = 0

    deployed = deploy.deploy_release(world.hooks, plan=world.plan, release=second, on_step=on_step)
    assert deployed.state == "live"


def unready(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers is not ready, for a moment or for good; it is on record."""
    first = world.release("1.0.0")
    world.deploy(first)
    store, bucket = world.hooks.store, world.hooks.settings.bucket_airloom
    store.put_json(bucket, f"releases/{world.pipeline}/1.0.0.json", first.model_dump(mode="json"))
    monkeypatch.setattr(deployments, "load_plan", lambda hooks, uri: world.plan)
    world.target.url.side_effect = lambda pipeline, version: None


def test_what_is_not_ready_for_a_moment_keeps_its_traffic(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    unready(world, monkeypatch)
    bad = world.release("1.0.1")
    world.processes["1.0.1"].wrong = True
    with pytest.raises(RolledBackError, match=r"1\.0\.1 was rolled back, release 1\.0\.0 answers: 5 reference answers"):
        world.deploy(bad)
    assert_rolled_back(world, "label is '1', the evaluation had '0'")
    world.processes["1.0.1"].wrong = False
    assert world.deploy(bad).state == "live"
    assert [step.split("%")[0] for step in world.steps[-3:]] == ["10", "50", "100"]


def test_what_cannot_answer_any_more_is_replaced_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    unready(world, monkeypatch)
    start = world.target.start.side_effect

    def only_the_new(release: Release, bundle: Path, spec: Any) -> Any:
        if release.version == "1.0.0":
            raise PlatformError("serving-1.0.0 is not ready but backoff")
        return start(release, bundle, spec)

    world.target.start.side_effect = only_the_new
    assert world.deploy(world.release("1.0.1")).state == "live"
    assert world.steps[-1] == "100% of the traffic: release 1.0.0 answers no more"
    assert world.answers() == {"1.0.1"}


def test_a_process_that_does_not_start_rolls_back(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    bad = world.release("1.0.1")
    start = world.target.start.side_effect
    world.target.start.side_effect = PlatformError("serving-1.0.1 is not ready but backoff: no module named x")
    with pytest.raises(RolledBackError, match="no module named x"):
        world.deploy(bad)
    world.target.start.side_effect = start
    assert_rolled_back(world, "no module named x")


def test_a_first_release_that_fails_leaves_nothing_served(world: World) -> None:
    bad = world.release("1.0.0")
    world.processes["1.0.0"].wrong = True
    with pytest.raises(RolledBackError, match="nothing is served"):
        world.deploy(bad)
    assert world.hooks.gateway.upstreams(world.pipeline) == []


def test_a_deploy_killed_in_its_canary_starts_over_from_the_old_release(world: World) -> None:
    world.deploy(world.release("1.0.0"))
    second = world.release("1.0.1")
    with (
        mock.patch.object(deploy, "_watch", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        world.deploy(second)
    state = deployments.deployment(world.hooks, world.pipeline)
    assert state is not None
    assert state.state == "canary"
    assert deployments.answering(state) == "1.0.0"
    deployed = world.deploy(second)
    assert (deployed.previous, deployed.state) == ("1.0.0", "live")
    assert world.answers() == {"1.0.1"}


def test_numbers_are_given_once_under_a_race(world: World) -> None:
    def number(index: int) -> str:
        wanted = make_release(world.pipeline, "1.0.0", model_digest=format(index, "064d"), run_id=f"run-{index}")
        return _number(world.hooks, wanted).version

    with ThreadPoolExecutor(8) as pool:
        versions = sorted(pool.map(number, range(8)))
    assert versions == [f"1.0.{patch}" for patch in range(8)]
    assert [release.version for release in releases(world.hooks, world.pipeline)] == versions


def test_the_same_model_and_code_is_the_same_release_and_a_new_line_starts_at_zero(world: World) -> None:
    first = _number(world.hooks, make_release(world.pipeline, "1.0.0"))
    assert _number(world.hooks, make_release(world.pipeline, "1.0.0", run_id="later")) == first
    assert _number(world.hooks, make_release(world.pipeline, "1.0.0", serving_commit="d" * 40)).version == "1.0.1"
    assert _number(world.hooks, make_release(world.pipeline, "2.1.0")).version == "2.1.0"


def test_a_release_needs_a_promoted_candidate() -> None:
    from airloom.contract import GateDecision, Verdict
    from airloom.flows.release import make_release as make

    decision = GateDecision(
        verdict=Verdict.REJECTED,
        reasons=[],
        metrics={},
        model_name="digits",
        model_version="3",
        mlflow_run_id="r",
        data_tag="t",
    )
    unused: Any = None
    with pytest.raises(ContractError, match="model 3 was rejected"):
        make(unused, plan=unused, decision=decision, train=unused, evaluate=unused, data_version=unused)


def test_nothing_deployed_is_not_an_error(world: World) -> None:
    assert deployments.deployment(world.hooks, world.pipeline) is None
    assert deployments.answering(None) is None
    with pytest.raises(NotFoundError):
        deployments.release_of(world.hooks, world.pipeline, "1.0.0")


def test_one_lost_release_keeps_no_other_pipeline_from_answering(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a platform that starts does: the release that is on record answers, the one that isn't is named."""
    release = world.release("1.0.0")
    world.deploy(release)
    gone, odd = f"{world.pipeline}-gone", f"{world.pipeline}-odd"
    store, bucket = world.hooks.store, world.hooks.settings.bucket_airloom
    deployments.save(
        world.hooks, pipeline=gone, release="1.0.0", previous=None, url="http://x", state="live", pinned_at=None
    )
    store.put_json(bucket, f"deployments/{odd}.json", {"pipeline": odd, "release": 1})
    # Written by another version of Airloom, which knows more of a release.
    kept = {**release.model_dump(mode="json"), "of_another_version": True}
    store.put_json(bucket, f"releases/{world.pipeline}/1.0.0.json", kept)
    monkeypatch.setattr(deployments, "load_plan", lambda hooks, uri: world.plan)
    world.hooks.gateway.remove(world.pipeline)
    try:
        restored, failed = deployments.restore_routes(world.hooks)
    finally:
        for name in (gone, odd):
            store.remove(bucket, f"deployments/{name}.json")
    assert f"{world.pipeline} 1.0.0" in restored
    assert any(line.startswith(f"{gone}: ") and "does not exist" in line for line in failed)
    assert any(line.startswith(f"{odd}: ") and "cannot be read by this version" in line for line in failed)
    assert world.answers() == {"1.0.0"}
