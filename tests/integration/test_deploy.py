"""Releases and deployments: a real store and gateway, and serving processes that behave and misbehave."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest

from airloom.contract import Deployment, Release
from airloom.embedded import gateway_server
from airloom.errors import (
    ContractError,
    NotFoundError,
    PlatformError,
    RolledBackError,
    ServiceError,
    UnavailableError,
)
from airloom.flows import deploy, deployments, verify
from airloom.flows.release import REFERENCE_FILE, _number, bundle_path, releases
from airloom.hooks.connect import Hooks
from airloom.hooks.deploy_process import ProcessTarget
from airloom.hooks.mlflow import ModelRegistry
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.fixtures.plans import make_plan, make_release, make_spec
from tests.fixtures.services import running

ROWS = [
    {
        "id": str(number),
        "image_base64": base64.b64encode(bytes([number])).decode(),
        "media_type": "image/png",
        "output": {"label": str(number), "probability": 0.9, "probabilities": {str(number): 0.9}},
    }
    for number in range(5)
]
CANARY = {"steps": [10, 50, 100], "step_time": 0.6, "max_error_rate": 0.0, "max_latency_ratio": 3.0}
SPEC = make_spec(deploy={"canary": CANARY})


class Serving:
    """Answers like a serving process; `wrong`, `failing` and `delay_seconds` say how badly.

    `client_errors_after`: so many good answers, and its counters tell of three errors that somebody else met.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.wrong = False
        self.failing = False
        self.delay_seconds = 0.0
        self.client_errors_after = 0
        self.counts = {"200": 0, "500": 0}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for an answer, or the kernel waits 40 ms between its two

            def do_POST(self) -> None:
                number = self.rfile.read(int(self.headers["Content-Length"]))[0]
                time.sleep(outer.delay_seconds)
                if outer.client_errors_after and outer.counts["200"] >= outer.client_errors_after:
                    outer.counts["500"] = 3
                label = str(number + 1 if outer.wrong else number)
                body = {"id": f"digits-{outer.version}-x", "release": outer.version, **ROWS[number]["output"]}  # type: ignore[dict-item]
                self.answer(500 if outer.failing else 200, json.dumps({**body, "label": label}).encode())

            def do_GET(self) -> None:
                lines = [
                    f'airloom_serving_requests_total{{route="/predict",status="{status}"}} {count}\n'
                    for status, count in outer.counts.items()
                ]
                self.answer(None, "".join(["# TYPE airloom_serving_requests counter\n", *lines]).encode())

            def answer(self, status: int | None, body: bytes) -> None:
                if status is not None:
                    outer.counts[str(status)] += 1
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class World:
    """Hooks on a real store and gateway, and a target that hands out `Serving`s."""

    def __init__(self, settings: Settings, store: ObjectStore, pipeline: str) -> None:
        self.hooks = Hooks(settings)
        self.hooks.store = store
        self.hooks.mlflow = mock.create_autospec(ModelRegistry, instance=True)
        self.pipeline = pipeline
        self.plan = make_plan(spec=SPEC.model_copy(update={"name": pipeline}))
        self.processes: dict[str, Serving] = {}
        self.stopped: list[str] = []
        self.steps: list[str] = []
        self.target = mock.create_autospec(ProcessTarget, instance=True)
        self.target.start.side_effect = lambda release, bundle, spec: self.processes[release.version].url
        self.target.url.side_effect = lambda pipeline, version: self.processes[version].url
        self.target.running.side_effect = lambda pipeline: [v for v in self.processes if v not in self.stopped]
        self.target.stop.side_effect = lambda pipeline, version: self.stopped.append(version)

    def release(self, version: str) -> Release:
        release = make_release(self.pipeline, version)
        bundle = bundle_path(self.hooks, release)
        bundle.mkdir(parents=True)
        (bundle / REFERENCE_FILE).write_text(json.dumps({"rows": ROWS}))
        self.processes[version] = Serving(version)
        return release

    def deploy(self, release: Release) -> Deployment:
        return deploy.deploy_release(self.hooks, plan=self.plan, release=release, on_step=self.steps.append)

    def pin_again(self, seconds: float) -> None:
        """What is deployed from now on is of another run, pinned so much later; earlier if below 0."""
        self.plan = self.plan.model_copy(update={"created_at": self.plan.created_at + timedelta(seconds=seconds)})

    def answers(self) -> set[str]:
        url = self.hooks.gateway.model_url(self.pipeline) + "/predict"
        return {httpx.post(url, content=b"\x01", trust_env=False).json()["release"] for _ in range(20)}


@pytest.fixture
def world(
    tmp_path: Path,
    session_settings: Settings,
    s3_store: ObjectStore,
    settings: Settings,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    name = "p" + format(abs(hash(request.node.name)) % 10**12)
    found = World(settings, s3_store, name)
    for module in (deploy, verify, deployments):
        monkeypatch.setattr(module, "target_of", lambda hooks, spec: found.target)
    with running(gateway_server.service(settings), settings.log_dir):
        yield found
    for process in found.processes.values():
        process.close()
    # The store outlives this test, and whoever restores deployments would find this one.
    s3_store.remove(session_settings.bucket_airloom, f"deployments/{name}.json")


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


def assert_rolled_back(world: World, reason: str) -> None:
    state = deployments.deployment(world.hooks, world.pipeline)
    assert state is not None
    assert (state.release, state.previous, state.state) == ("1.0.1", "1.0.0", "rolled_back")
    assert reason in state.detail
    assert world.answers() == {"1.0.0"}
    assert world.stopped == ["1.0.1"]
    assert deployments.answering(state) == "1.0.0"


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
