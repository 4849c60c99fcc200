"""What a build checks, records and tells; git is real, the other systems are doubles with their real signatures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest

from airloom.contract import CodePin, Stage
from airloom.contract.assets import stage_asset
from airloom.errors import AirloomError, BuildFailedError, NotFoundError, UnavailableError
from airloom.flows import build as build_flow
from airloom.flows.build import build, find_build
from airloom.hooks.airflow_api import AirflowApi
from airloom.hooks.git_tree import export_tree
from airloom.hooks.gitbucket import GitBucket
from airloom.settings import Settings
from tests.fixtures.git import git

MAIN = "from airloom.contract import Stage, run_stage_main\nraise SystemExit(run_stage_main({Stage.TRAIN: print}))\n"
GOOD = {"stages.yaml": "stages: {train: {paths: [main.py]}}\n", "main.py": MAIN}


class LocalGit:
    """Reads one repository on disk."""

    def __init__(self, git_dir: Path) -> None:
        self._git_dir = git_dir

    def commit(self, repo: str, rev: str) -> CodePin:
        done = git("rev-parse", "--verify", f"{rev}^{{commit}}", cwd=self._git_dir, check=False)
        if done.returncode:
            raise NotFoundError(f"{repo} has no commit {rev!r}")
        return CodePin(repo=repo, commit=done.stdout.strip(), message="One", author="Ada <ada@example.org>")

    def export(self, repo: str, sha: str, dest: Path, *, read_only: bool = False) -> None:
        if not dest.exists():
            export_tree(self._git_dir, sha, dest, read_only=read_only)


class MemoryStore:
    """JSON values by bucket and key."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], str] = {}
        self.down = False

    def get_json(self, bucket: str, key: str) -> Any:
        if self.down:
            raise UnavailableError("the object store did not answer")
        try:
            return json.loads(self.values[bucket, key])
        except KeyError:
            raise NotFoundError(key) from None

    def put_json(self, bucket: str, key: str, value: Any, **_: Any) -> None:
        self.values[bucket, key] = json.dumps(value)

    def exists(self, bucket: str, key: str) -> bool:
        return (bucket, key) in self.values


class Bench:
    """One repo, and everything that a build talks to."""

    def __init__(self, settings: Settings, tmp_path: Path) -> None:
        self.work = tmp_path / "work"
        git("init", "--quiet", "-b", "main", "work", cwd=tmp_path)
        self.store = MemoryStore()
        self.airflow = create_autospec(AirflowApi, instance=True)
        self.gitbucket = create_autospec(GitBucket, instance=True)
        self.lines: list[str] = []
        self.hooks: Any = SimpleNamespace(
            settings=settings,
            git=LocalGit(self.work / ".git"),
            store=self.store,
            airflow=self.airflow,
            gitbucket=self.gitbucket,
        )

    def commit(self, files: dict[str, str]) -> str:
        for name, content in files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_text(content)
        git("add", "-A", cwd=self.work)
        git("commit", "--quiet", "-m", "One", cwd=self.work)
        return git("rev-parse", "HEAD", cwd=self.work).stdout.strip()

    def build(self, **options: Any) -> Any:
        return build(self.hooks, "ds_mlmodeling", "main", self.lines.append, **options)

    @property
    def statuses(self) -> list[tuple[str, str]]:
        return [(c.kwargs["state"], c.kwargs["description"]) for c in self.gitbucket.set_status.call_args_list]


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
    monkeypatch.setattr(build_flow, "_ANNOUNCE_SECONDS", 0.1)
    bench.airflow.create_asset_event.side_effect = UnavailableError("Airflow did not answer")
    assert not bench.build().announced
    assert bench.statuses[-1] == ("success", "built: train; Airflow could not be told: Airflow did not answer")
    bench.airflow.create_asset_event.side_effect = None
    assert bench.build().announced  # the next try tells it
    found = find_build(bench.hooks, "ds_mlmodeling", sha)
    assert found is not None
    assert found.announced


def test_a_repo_that_no_pipeline_uses_is_built(bench: Bench) -> None:
    bench.commit(GOOD)
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
    monkeypatch.setattr(build_flow, "_ENTRY_SECONDS", 2.0)
    with pytest.raises(BuildFailedError, match="did not end within 2 s"):
        bench.build()
    stat = Path(f"/proc/{int(marker.read_text())}/stat")
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] in {"Z", "X"}


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
