"""A build in steps: each call goes on where the one before ended, and does nothing twice."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from airloom.cli import build as command
from airloom.cli.main import app
from airloom.contract import ImageRef
from airloom.errors import AirloomError, BuildFailedError, UnavailableError
from airloom.flows import build_checks, build_steps, images
from airloom.flows.build import build_until, built_commits, find_build, find_failure
from airloom.flows.pushes import list_pushes
from airloom.flows.reconcile import BUILD_LIMIT, reconcile
from airloom.settings import Settings
from tests.fixtures.build_bench import GOOD, MAIN, Bench

REPO = "ds_mlmodeling"
STEPS: tuple[build_steps.Step, ...] = get_args(build_steps.Step)


class Images:
    """The engine and the registry, as far as a build asks them.

    Attributes:
        calls: what was done, in order.
        broken: what is not built, tested or pushed, and what is raised instead.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.there: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.runtime = "1"

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if name in self.broken:
            raise self.broken[name]

    def build_stage_image(self, settings: Settings, pin: Any, *_: Any) -> ImageRef:
        self._do("build")
        digest = f"sha256:{len(self.there):064x}"
        self.there.add(digest)
        return ImageRef(name=REPO, tag=pin.commit, digest=digest, pushed=False, runtime=self.runtime)

    def push_stage_image(self, settings: Settings, image: ImageRef) -> ImageRef:
        self._do("push")
        digest = f"sha256:f{image.digest[8:]}"
        self.there.add(digest)
        return image.model_copy(update={"digest": digest, "pushed": True})

    def is_current(self, settings: Settings, image: ImageRef | None, checkout: Path) -> bool:
        return image is not None and image.digest in self.there and image.runtime == self.runtime

    def load_entry_point(self, settings: Settings, what: str, folder: Path, image: str) -> None:
        assert image.removeprefix(f"{REPO}@") in self.there

    def run_tests(self, settings: Settings, what: str, folder: Path, tests: list[str], image: str) -> None:
        self._do("test")


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Bench:
    return Bench(settings, tmp_path)


@pytest.fixture
def made(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Images:
    """Builds make images, and push them."""
    found = Images()
    bench.hooks.settings = bench.hooks.settings.model_copy(update={"registry": "registry.lan"})
    monkeypatch.setattr(images, "makes_images", lambda settings: True)
    for name in ("build_stage_image", "push_stage_image", "is_current"):
        monkeypatch.setattr(images, name, getattr(found, name))
    for name in ("load_entry_point", "run_tests"):
        monkeypatch.setattr(build_checks, name, getattr(found, name))
    return found


def until(bench: Bench, step: build_steps.Step, **options: Any) -> Any:
    """What one stage of a Jenkinsfile calls."""
    del bench.lines[:]
    options = {"asked_by": "push", "pusher": "ada", **options}
    return build_until(bench.hooks, REPO, "main", step, bench.lines.append, **options)


def notes(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(value) for (_, key), value in bench.store.values.items() if key.startswith("building/")]


def ledger(bench: Bench) -> tuple[list[str], list[str]]:
    """Ids of the builds that were begun, and how they ended."""
    return [e["id"] for e in bench.store.entries("start")], [e["outcome"] for e in bench.store.entries("end")]


def test_each_call_does_one_more_step(bench: Bench, made: Images) -> None:
    sha = bench.commit(GOOD)
    seen = []
    for step in STEPS:
        record = until(bench, step)
        assert (record is None) == (step != "report")
        seen.append(list(made.calls))
        assert built_commits(bench.hooks, REPO) == ({sha} if record else set()), "nothing is built before its end"
    assert seen == [[], ["build"], ["build", "test"], ["build", "test", "push"], ["build", "test", "push"]]
    assert bench.statuses == [
        *(("pending", step) for step in STEPS[:-1]),
        ("success", "built: train"),
        ("success", "built: train; Airflow has been told"),
    ]
    assert (record.image.pushed, record.created, record.pusher, record.airflow) == (True, True, "ada", "told")
    assert notes(bench) == []
    (start,), (end,) = bench.store.entries("start"), bench.store.entries("end")
    assert (start["id"], start["asked_by"], end["outcome"]) == (end["id"], "push", "built")
    whole = datetime.fromisoformat(end["at"]) - datetime.fromisoformat(start["at"])
    assert end["seconds"] == round(whole.total_seconds(), 3)
    (push,) = list_pushes(bench.hooks, repo=REPO).pushes
    assert (push.build, push.builds, push.image) == ("built", 1, record.image.pull_ref)


@pytest.mark.parametrize("last", STEPS[:-1])
def test_one_call_goes_on_from_anywhere(bench: Bench, made: Images, last: build_steps.Step) -> None:
    bench.commit(GOOD)
    until(bench, last)
    until(bench, last)
    assert all("already" in line for line in bench.lines)
    assert bench.build().created
    assert made.calls == ["build", "test", "push"]
    started, ended = ledger(bench)
    assert (len(started), ended) == (1, ["built"])


def test_what_is_built_is_said_at_each_step_and_nothing_is_done(bench: Bench, made: Images) -> None:
    bench.commit(GOOD)
    built = bench.build()
    before, said = len(bench.store.values), bench.statuses
    for step in STEPS[:-1]:
        assert until(bench, step).built_at == built.built_at
        (line,) = bench.lines
        assert "was built already" in line
    assert (len(bench.store.values), bench.statuses) == (before, said)
    assert not until(bench, "report").created
    assert made.calls == ["build", "test", "push"]
    assert ledger(bench)[1] == ["built", "found"]
    assert bench.airflow.create_asset_event.call_count == 1


FAILURES = [
    ("inspect", {"main.py": "x ="}, None, "invalid syntax"),
    ("inspect", {"main.py": f"{MAIN}nowhere\n"}, None, "F821"),
    ("build", {}, BuildFailedError("docker build ended with 1"), "docker build ended"),
    ("build", {}, UnavailableError("the engine does not answer"), "the engine"),
    ("test", {}, BuildFailedError("its tests failed"), "its tests failed"),
    ("push", {}, UnavailableError("the registry refuses"), "the registry refuses"),
]


@pytest.mark.parametrize(("step", "files", "error", "said"), FAILURES)
def test_the_step_that_fails_ends_the_build(
    bench: Bench, made: Images, step: build_steps.Step, files: dict[str, str], error: AirloomError | None, said: str
) -> None:
    sha = bench.commit({**GOOD, **files})
    if error:
        made.broken[step] = error
    for earlier in STEPS[: STEPS.index(step)]:
        until(bench, earlier)
        assert ledger(bench)[1] == []
    with pytest.raises(AirloomError, match=said) as caught:
        until(bench, step)
    commits_fault = isinstance(caught.value, BuildFailedError)
    state, description = bench.statuses[-1]
    assert state == ("failure" if commits_fault else "error")
    assert said in description
    (started,), (ended,) = ledger(bench)
    assert ended == ("failed" if commits_fault else "error")
    assert bench.store.entries("end")[0]["id"] == started
    assert said in bench.store.entries("end")[0]["reason"]
    assert (find_failure(bench.hooks, REPO, sha) is not None) == commits_fault
    assert find_build(bench.hooks, REPO, sha) is None
    # What comes after a failure meets it again, and does nothing.
    calls = list(made.calls)
    if commits_fault:
        with pytest.raises(BuildFailedError, match=said):
            until(bench, "report")
        assert made.calls == calls
        assert notes(bench) == []
    bench.commit({**GOOD, "main.py": f"{MAIN}# better\n"})
    made.broken.clear()
    assert until(bench, "report").created


def test_after_an_error_nothing_that_went_well_is_done_again(bench: Bench, made: Images) -> None:
    bench.commit(GOOD)
    made.broken["push"] = UnavailableError("the registry does not answer")
    for _ in range(2):
        with pytest.raises(UnavailableError):
            until(bench, "push")
    del made.broken["push"]
    assert until(bench, "report").created
    assert made.calls == ["build", "test", "push", "push", "push"]
    started, ended = ledger(bench)
    assert (len(set(started)), ended) == (3, ["error", "error", "built"])


def test_tests_count_for_the_image_that_they_ran_in(bench: Bench, made: Images) -> None:
    bench.commit(GOOD)
    until(bench, "test")
    made.there.clear()  # somebody has removed it
    until(bench, "build")
    assert made.calls == ["build", "test", "build"]
    made.runtime = "2"
    until(bench, "test")
    assert made.calls == ["build", "test", "build", "build", "test"]
    assert until(bench, "report").image.runtime == "2"
    assert made.calls[5:] == ["push"]


def test_tests_count_for_the_environment_that_they_ran_in(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    bench.commit({**GOOD, "main.py": f"open({str(runs)!r}, 'a').write('x')\n{MAIN}"})
    for step in ("inspect", "build", "test", "test", "push"):
        until(bench, step)
    assert runs.read_text() == "x"
    monkeypatch.setattr("airloom.flows.environment.environment_digest", lambda: "f" * 64)
    assert until(bench, "report").environment == "f" * 64
    assert runs.read_text() == "xx"


def test_without_images_there_is_nothing_to_build_or_push(bench: Bench) -> None:
    bench.commit(GOOD)
    until(bench, "test")
    said = bench.statuses
    until(bench, "build")
    assert "no image is built" in bench.lines[-1]
    until(bench, "push")
    assert "no image is pushed" in bench.lines[-1]
    assert bench.statuses == said
    assert until(bench, "report").image is None


def test_without_a_registry_the_image_stays_where_it_is(bench: Bench, made: Images) -> None:
    bench.hooks.settings = bench.hooks.settings.model_copy(update={"registry": ""})
    bench.commit(GOOD)
    until(bench, "push")
    assert "stays in the engine" in bench.lines[-1]
    assert not until(bench, "report").image.pushed
    assert made.calls == ["build", "test"]


@pytest.mark.parametrize("step", ["build", "test", "push"])
def test_killed_in_a_step_it_is_done_again_and_no_other(bench: Bench, made: Images, step: str) -> None:
    class KilledError(BaseException):
        pass

    bench.commit(GOOD)
    made.broken[step] = KilledError()  # type: ignore[assignment]
    with pytest.raises(KilledError):
        until(bench, "report")
    made.broken.clear()
    assert until(bench, "report").created
    assert sorted(made.calls) == sorted(["build", "test", "push", step])
    started, ended = ledger(bench)
    assert (len(started), ended) == (1, ["built"])


def test_killed_after_the_record_it_is_this_builds_all_the_same(bench: Bench, made: Images) -> None:
    class KilledError(BaseException):
        pass

    bench.commit(GOOD)
    bench.airflow.create_asset_event.side_effect = KilledError()
    with pytest.raises(KilledError):
        until(bench, "report")
    bench.airflow.create_asset_event.side_effect = None
    assert until(bench, "report").announced
    assert (len(ledger(bench)[0]), ledger(bench)[1]) == (1, ["built"])
    assert notes(bench) == []


def test_a_person_may_finish_what_jenkins_has_begun(bench: Bench, made: Images) -> None:
    bench.commit(GOOD)
    until(bench, "build")
    assert bench.build().created
    for step in ("test", "push"):
        assert until(bench, step) is not None
    assert not until(bench, "report").created
    assert made.calls == ["build", "test", "push"]
    assert ledger(bench)[1] == ["built", "found"]
    (push,) = list_pushes(bench.hooks, repo=REPO).pushes
    assert (push.build, push.asked_by) == ("built", "push")


def test_the_reconciler_takes_up_what_was_left(bench: Bench, made: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)
    until(bench, "test")
    assert [action.did for action in reconcile(bench.hooks, repos=[REPO])] == ["left"]
    later = datetime.now().astimezone() + BUILD_LIMIT * 2
    clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz: later)})
    monkeypatch.setattr("airloom.flows.reconcile.datetime", clock)
    assert [(action.commit, action.did) for action in reconcile(bench.hooks, repos=[REPO])] == [(sha, "built")]
    assert made.calls == ["build", "test", "push"]
    assert (len(ledger(bench)[0]), ledger(bench)[1]) == (1, ["built"])


def test_a_note_of_another_version_begins_anew(bench: Bench, made: Images) -> None:
    sha = bench.commit(GOOD)
    until(bench, "test")
    bench.store.put_json("airloom", f"building/{REPO}/{sha}.json", {"schema_version": 2})
    assert until(bench, "report").created
    assert made.calls == ["build", "test", "build", "test", "push"]


def test_a_store_that_goes_away_between_steps_is_an_error(bench: Bench, made: Images) -> None:
    bench.commit(GOOD)
    until(bench, "build")
    bench.store.down = True
    with pytest.raises(UnavailableError):
        until(bench, "test")
    assert bench.statuses[-1][0] == "error"
    bench.store.down = False
    assert until(bench, "report").created
    assert made.calls == ["build", "test", "push"]


def test_the_command_line_names_the_same_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_args(command.Step) == STEPS
    monkeypatch.setattr("airloom.hooks.connect.Hooks", lambda: bench.hooks)
    bench.commit(GOOD)
    push = ["--once", "--pusher", "ada", "--delivery", "d-1"]
    for step in STEPS:
        done = CliRunner().invoke(app, ["build", REPO, "--json", "--until", step, *push])
        assert done.exit_code == 0, done.output
        assert (json.loads(done.stdout) is None) == (step != "report")
    (delivery,) = bench.store.entries("delivery")
    assert (delivery["id"], delivery["pusher"]) == ("d-1", "ada")
    (found,) = list_pushes(bench.hooks, repo=REPO).pushes
    assert (found.deliveries, found.build, found.asked_by) == (["d-1"], "built", "push")
    assert CliRunner().invoke(app, ["build", REPO, "--until", "nowhere"]).exit_code == 2
