"""What a build checks, records and tells; git is real, the other systems are doubles with their real signatures."""

from __future__ import annotations

import json
import os
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import Stage
from airloom.contract.assets import stage_asset
from airloom.errors import AirloomError, BuildFailedError, ConfigError, NotFoundError, UnavailableError
from airloom.flows import announce, build_checks
from airloom.flows.build import build, builds_of, find_build, find_failure
from airloom.flows.lease import lease
from airloom.settings import Settings
from tests.fixtures.build_bench import GOOD, MAIN, Bench
from tests.fixtures.git import git


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Bench:
    return Bench(settings, tmp_path)


def test_a_good_commit_is_recorded_told_and_not_built_again(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    record = bench.build(pusher="ada")
    assert (record.commit, record.pusher, record.announced, record.created) == (sha, "ada", True, True)
    assert set(record.stages) == {Stage.TRAIN}
    assert find_build(bench.hooks, "ds_mlmodeling", sha) == record
    assert [state for state, _ in bench.statuses] == ["pending", "success", "success"]
    extra = {"repo": "ds_mlmodeling", "commit": sha, "pusher": "ada", "message": "One"}
    bench.airflow.create_asset_event.assert_called_once_with(stage_asset("ds_mlmodeling"), extra)

    again = bench.build()
    assert (again.created, again.built_at) == (False, record.built_at)
    assert "was built already" in bench.lines[-1]
    assert bench.airflow.create_asset_event.call_count == 1


def test_a_failing_test_keeps_a_commit_from_being_used(bench: Bench) -> None:
    stages = "tests: [tests]\n" + GOOD["stages.yaml"]
    wrong = {**GOOD, "stages.yaml": stages, "tests/test_sums.py": "def test_sum():\n    assert 1 + 1 == 3\n"}
    bench.commit(wrong)
    with pytest.raises(BuildFailedError, match=r"its tests failed: .*test_sums\.py"):
        bench.build()
    assert bench.statuses[-1][0] == "failure"
    bench.airflow.create_asset_event.assert_not_called()
    sha = bench.commit({**wrong, "tests/test_sums.py": "def test_sum():\n    assert 1 + 1 == 2\n"})
    assert bench.build().commit == sha


def test_tests_that_are_not_there_are_named(bench: Bench) -> None:
    bench.commit({**GOOD, "stages.yaml": "tests: [nowhere]\n" + GOOD["stages.yaml"]})
    with pytest.raises(BuildFailedError, match="nowhere"):
        bench.build()


def test_another_environment_builds_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.commit(GOOD)
    bench.build()
    monkeypatch.setattr("airloom.flows.environment.environment_digest", lambda: "f" * 64)
    assert bench.build().created


def test_without_an_event_nothing_starts_until_it_is_wanted(bench: Bench) -> None:
    bench.commit(GOOD)
    assert not bench.build(announce=False).announced
    bench.airflow.create_asset_event.assert_not_called()
    assert bench.build().announced
    bench.airflow.create_asset_event.assert_called_once()


def test_a_build_counts_while_airflow_is_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = bench.commit(GOOD)
    monkeypatch.setattr(announce, "_SECONDS", 0.1)
    bench.airflow.create_asset_event.side_effect = UnavailableError("Airflow did not answer")
    assert not bench.build().announced
    assert bench.statuses[-1] == ("success", "built: train; Airflow could not be told: Airflow did not answer")
    bench.airflow.create_asset_event.side_effect = None
    assert bench.build().announced  # the next try tells it
    found = find_build(bench.hooks, "ds_mlmodeling", sha)
    assert found is not None
    assert found.announced


def test_commits_of_a_repo_are_told_of_one_after_the_other(bench: Bench) -> None:
    """Else an older commit's event may come after a newer one's, and it would be the older one that is served."""
    bench.commit(GOOD)
    with ThreadPoolExecutor(1) as threads:
        with lease(bench.hooks.store, "airloom", "told/ds_mlmodeling.json"):
            building = threads.submit(bench.build)
            while len(bench.statuses) < 2 and not building.done():
                time.sleep(0.01)
            assert bench.statuses[-1] == ("success", "built: train")
            time.sleep(0.3)
            bench.airflow.create_asset_event.assert_not_called()
        assert building.result(60).announced
    bench.airflow.create_asset_event.assert_called_once()


def test_what_airflow_has_heard_is_not_told_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that took effect although its answer was lost, and a kill before it was noted, look alike."""
    sha = bench.commit(GOOD)
    monkeypatch.setattr(announce, "_SECONDS", 5.0)
    events: list[dict[str, Any]] = [{"extra": {"commit": "0" * 40}}, {"extra": None}]
    bench.airflow.asset_events.side_effect = lambda *_, **__: events

    def lose_the_answer(asset: str, extra: dict[str, Any]) -> None:
        events.insert(0, {"extra": {**extra, "from_rest_api": True}})
        raise UnavailableError("Airflow did not answer in time")

    bench.airflow.create_asset_event.side_effect = lose_the_answer
    record = bench.build()
    assert (record.announced, record.airflow) == (True, "told")
    assert bench.airflow.create_asset_event.call_count == 1
    key = f"builds/ds_mlmodeling/{sha}.json"
    forgotten = json.loads(bench.store.values["airloom", key]) | {"announced": False, "airflow": "due"}
    bench.store.put_json("airloom", key, forgotten)
    assert bench.build().announced
    assert bench.airflow.create_asset_event.call_count == 1


def test_a_build_in_another_environment_starts_nothing_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.commit(GOOD)
    bench.build()
    monkeypatch.setattr("airloom.flows.environment.environment_digest", lambda: "f" * 64)
    again = bench.build()
    assert (again.created, again.announced) == (True, True)
    assert find_build(bench.hooks, "ds_mlmodeling", again.commit) == again
    assert bench.airflow.create_asset_event.call_count == 1


def nobody_uses_it(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    bench.hooks.settings = bench.hooks.settings.model_copy(update={"configs": str(tmp_path / "none")})
    bench.hooks.settings.__dict__.pop("configs_dir", None)


def test_what_is_owed_to_airflow_is_told_from_what_nobody_uses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench.commit(GOOD)
    assert bench.build(announce=False).airflow == "not asked"
    monkeypatch.setattr(announce, "_SECONDS", 0.1)
    bench.airflow.create_asset_event.side_effect = UnavailableError("Airflow did not answer")
    assert bench.build().airflow == "due"
    bench.airflow.create_asset_event.side_effect = NotFoundError("no such asset")
    assert bench.build().airflow == "due"  # digits uses it, and Airflow has not read digits
    nobody_uses_it(bench, tmp_path)
    record = bench.build()
    assert record.airflow == "no pipeline"
    assert find_build(bench.hooks, "ds_mlmodeling", record.commit).airflow == "no pipeline"  # type: ignore[union-attr]


def test_a_commit_is_left_alone_when_a_later_one_was_told(bench: Bench) -> None:
    first = bench.commit(GOOD)
    second = bench.commit({"main.py": MAIN + "# 2\n"})
    build(bench.hooks, "ds_mlmodeling", second, asked_by="push")
    late = build(bench.hooks, "ds_mlmodeling", first, asked_by="push")
    assert (late.announced, late.airflow) == (False, "superseded")
    assert bench.airflow.create_asset_event.call_count == 1
    assert build(bench.hooks, "ds_mlmodeling", first).announced  # a person decides otherwise
    git("reset", "--quiet", "--hard", first, cwd=bench.work)
    third = bench.commit({"main.py": MAIN + "# 3\n"})
    git("reset", "--quiet", "--hard", second, cwd=bench.work)
    assert build(bench.hooks, "ds_mlmodeling", third, asked_by="push").airflow == "superseded"


def test_documentation_pushed_meanwhile_does_not_keep_a_commit_back(bench: Bench) -> None:
    first = bench.commit(GOOD)
    bench.commit({"README.md": "hi"})
    assert build(bench.hooks, "ds_mlmodeling", first, asked_by="push").announced


def test_a_failed_commit_is_built_again_only_when_a_person_asks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    sha = bench.commit({**GOOD, "main.py": f"open({str(runs)!r}, 'a').write('x')\nimport no_such_package\n"})

    def fails(asked_by: Any) -> str:
        with pytest.raises(BuildFailedError, match="no_such_package"):
            bench.build(asked_by=asked_by)
        return runs.read_text()

    assert fails("push") == "x"
    assert find_failure(bench.hooks, "ds_mlmodeling", sha) is not None
    assert fails("push") == "x"
    assert fails("reconciler") == "x"
    assert bench.statuses[-1][0] == "failure"
    assert fails("person") == "xx"
    monkeypatch.setattr(build_checks, "load_entry_point", lambda *_: None)  # it was installed
    assert bench.build().created
    assert not bench.build(asked_by="push").created


def test_each_build_is_in_the_ledger_of_pushes(bench: Bench) -> None:
    sha = bench.commit(GOOD)
    bench.build(pusher="ada", asked_by="push")
    bench.build()
    bad = bench.commit({"main.py": "x ="})
    with pytest.raises(BuildFailedError):
        bench.build(asked_by="reconciler")
    started = [(e["commit"], e["asked_by"], e["pusher"], e["message"]) for e in bench.store.entries("start")]
    assert started == [
        (sha, "push", "ada", "One"),
        (sha, "person", "", "One"),
        (bad, "reconciler", "", "One"),
    ]
    ended = bench.store.entries("end")
    assert [(e["outcome"], e["airflow"]) for e in ended] == [("built", "told"), ("found", "told"), ("failed", "")]
    assert "main.py:1: invalid syntax" in ended[-1]["reason"]
    assert [e["id"] for e in ended] == [e["id"] for e in bench.store.entries("start")]


def test_a_push_before_airflow_has_read_its_pipeline_stays_owed(bench: Bench) -> None:
    bench.commit(GOOD)
    bench.airflow.create_asset_event.side_effect = NotFoundError("no such asset")
    record = bench.build(asked_by="push")
    assert (record.announced, record.airflow) == (False, "due")
    assert bench.statuses[-1] == ("success", "built: train; Airflow has not read digits yet: told when it has")


def test_a_repo_that_no_pipeline_uses_is_built(bench: Bench, tmp_path: Path) -> None:
    bench.commit(GOOD)
    nobody_uses_it(bench, tmp_path)
    bench.airflow.create_asset_event.side_effect = NotFoundError("no such asset")
    assert not bench.build().announced
    assert bench.statuses[-1] == ("success", "built: train; no pipeline uses this repo, so that none was started")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"main.py": MAIN}, "no stages.yaml in the repo"),
        ({**GOOD, "lib/a.py": "def f(:\n"}, "lib/a.py:1: invalid syntax"),
        ({**GOOD, "lib/a.py": "def f():\n    return undefined_name\n"}, "lib/a.py:2:12: F821"),
        (
            {**GOOD, "main.py": "import a_package_that_does_not_exist\n"},
            "No module named 'a_package_that_does_not_exist'",
        ),
        ({**GOOD, "main.py": "raise SystemExit(3)\n"}, "ended with 3"),
        ({"stages.yaml": "stages: {train: {paths: [x.py]}}\n", "x.py": ""}, "no main.py"),
    ],
)
def test_a_commit_that_cannot_run_fails_and_says_why(bench: Bench, files: dict[str, str], said: str) -> None:
    sha = bench.commit(files)
    for _ in range(2):
        with pytest.raises(BuildFailedError) as caught:
            bench.build()
        assert said in caught.value.message
    state, description = bench.statuses[-1]
    assert state == "failure"
    assert said in description
    assert find_build(bench.hooks, "ds_mlmodeling", sha) is None
    bench.airflow.create_asset_event.assert_not_called()


def test_the_commit_after_a_bad_one_works(bench: Bench) -> None:
    bench.commit({**GOOD, "main.py": "x ="})
    with pytest.raises(BuildFailedError):
        bench.build()
    bench.commit(GOOD)
    assert bench.build().created


def test_an_entry_point_that_hangs_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "child"
    spawn = "import subprocess, time\np = subprocess.Popen(['sleep', '600'])\n"
    tell = f"open({str(marker)!r}, 'w').write(str(p.pid))\n"
    bench.commit({**GOOD, "main.py": f"{spawn}{tell}time.sleep(600)\n"})
    monkeypatch.setattr(build_checks, "_ENTRY_SECONDS", 10.0)
    with pytest.raises(BuildFailedError, match="did not end within 10 s"):
        bench.build()
    stat = Path(f"/proc/{int(marker.read_text())}/stat")
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in {"Z", "X"}:
        assert time.monotonic() < deadline, "what the entry point started lives on"
        time.sleep(0.02)


def test_stage_code_sees_nothing_of_the_platforms_environment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    seen = tmp_path / "seen"
    bench.commit({**GOOD, "main.py": f"import os\nopen({str(seen)!r}, 'w').write(repr(dict(os.environ)))\n"})
    bench.build()
    names = set(eval(seen.read_text()))
    assert names <= {"PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
    assert "s3cr3t" not in seen.read_text()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "s3cr3t"


def test_a_store_that_does_not_answer_is_an_error_and_no_failure_of_the_commit(bench: Bench) -> None:
    bench.commit(GOOD)
    bench.store.down = True
    with pytest.raises(UnavailableError):
        bench.build()
    assert bench.statuses[-1] == ("error", "could not be built: the object store did not answer")


def test_a_record_says_where_the_log_is(bench: Bench) -> None:
    bench.hooks.settings = bench.hooks.settings.model_copy(update={"build_url": "http://jenkins/job/r/7/console"})
    sha = bench.commit(GOOD)
    record = bench.build()
    assert record.url == "http://jenkins/job/r/7/console"
    wanted = {"ds_mlmodeling": sha, "another": "0" * 40}
    assert builds_of(bench.hooks, wanted) == {"ds_mlmodeling": record}
    bench.store.down = True
    assert builds_of(bench.hooks, wanted) == {}


def test_without_the_linter_nothing_is_built(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the commit's, which is built as soon as the linter is there."""
    sha = bench.commit(GOOD)
    monkeypatch.setattr(build_checks.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="there is no ruff"):
        bench.build(asked_by="push")
    assert bench.statuses[-1] == ("error", "could not be built: there is no ruff, which builds lint with")
    assert find_build(bench.hooks, "ds_mlmodeling", sha) is None
    monkeypatch.undo()
    assert bench.build(asked_by="push").created


def test_the_platform_brings_what_builds_run() -> None:
    """Its image holds the extra `stack` and no more."""
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert "airloom[platform]" in extras["stack"]
    assert [package for package in extras["platform"] if package.startswith("ruff>=")]


def test_a_build_counts_although_its_status_cannot_be_set(bench: Bench) -> None:
    bench.commit(GOOD)
    bench.gitbucket.set_status.side_effect = UnavailableError("the git server did not answer")
    assert bench.build().announced
    assert any("status could not be set" in line for line in bench.lines)


def test_an_unknown_commit_is_an_error(bench: Bench) -> None:
    bench.commit(GOOD)
    with pytest.raises(AirloomError, match="nothing"):
        build(bench.hooks, "ds_mlmodeling", "nothing")
    bench.gitbucket.set_status.assert_not_called()
