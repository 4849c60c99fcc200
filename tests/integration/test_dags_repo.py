"""What a second `airloom up` does about dags/ that changed here, at the git server, or at both."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from airloom.errors import UnavailableError
from airloom.hooks.connect import Hooks
from airloom.hooks.git_history import file_of, history
from airloom.settings import Settings
from airloom.stack.dags import push_dags
from tests.conftest import ROOT
from tests.fixtures.git import StageRepoFixture, git

CONFIG = "configs/digits.yaml"
_numbers = itertools.count(1)


class Dags:
    """A folder of DAGs, and the repo that Airflow would read."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.hooks = Hooks(settings)
        self.repo = f"dags_{next(_numbers)}"
        self.folder = folder / "dags"
        shutil.copytree(ROOT / "dags", self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.work = StageRepoFixture(settings, self.repo, folder / "clone")

    def up(self) -> str:
        return push_dags(self.hooks, self.folder, self.repo)

    def change(self, comment: str) -> None:
        path = self.folder / CONFIG
        path.write_text(f"{path.read_text()}# {comment}\n")

    def others_push(self, comment: str) -> None:
        if not self.work.work.exists():
            git("clone", "--quiet", self.work.url, str(self.work.work), cwd=self.folder)
        path = self.work.work / "dags" / CONFIG
        self.work.commit_files(comment, {f"dags/{CONFIG}": f"{path.read_text()}# {comment}\n"})
        self.work.push()

    def served(self) -> list[bytes]:
        """The configuration at each commit, newest first."""
        mirror = self.hooks.git.mirror(self.repo)
        tip = self.hooks.git.head(self.repo)
        return [file_of(mirror, commit, f"dags/{CONFIG}") or b"" for commit in history(mirror, tip)]

    @property
    def here(self) -> bytes:
        return (self.folder / CONFIG).read_bytes()


@pytest.fixture
def dags(git_settings: Settings, tmp_path: Path) -> Dags:
    return Dags(git_settings, tmp_path)


def test_each_change_here_becomes_a_commit(dags: Dags) -> None:
    first = dags.here
    assert dags.up() == f"{dags.repo} pushed for the first time"
    assert dags.up() == f"{dags.repo} is as dags/ here"
    dags.change("one")
    (dags.folder / "__pycache__").mkdir()
    (dags.folder / "__pycache__" / "x.pyc").write_bytes(b"")
    assert dags.up() == f"{dags.repo} has the changes of dags/ here: {CONFIG}"
    assert dags.up() == f"{dags.repo} is as dags/ here"
    assert dags.served() == [dags.here, first]
    (dags.folder / CONFIG).write_bytes(first)  # taken back here
    dags.up()
    assert dags.served()[0] == first
    assert len(dags.served()) == 3


def test_what_others_pushed_stays(dags: Dags) -> None:
    dags.up()
    dags.others_push("theirs")
    assert dags.up() == f"{dags.repo} has gone on from dags/ here: left as it is"
    dags.change("ours")
    assert "something else: left as it is; push there by hand" in dags.up()
    assert dags.served()[0].endswith(b"# theirs\n")
    shutil.copy(dags.work.work / "dags" / CONFIG, dags.folder / CONFIG)
    assert dags.up() == f"{dags.repo} is as dags/ here"
    assert len(dags.served()) == 2


def test_a_push_in_between_stays(dags: Dags, monkeypatch: pytest.MonkeyPatch) -> None:
    dags.up()
    dags.change("ours")
    mirror = dags.hooks.git.mirror

    def meanwhile(repo: str) -> Path:
        found = mirror(repo)
        dags.others_push("theirs")
        return found

    monkeypatch.setattr(dags.hooks.git, "mirror", meanwhile)
    assert dags.up() == f"{dags.repo} was pushed to by others meanwhile: left as it is"
    monkeypatch.undo()
    assert dags.served()[0].endswith(b"# theirs\n")


def test_what_is_not_valid_is_not_pushed_over_what_is(dags: Dags) -> None:
    dags.up()
    (dags.folder / CONFIG).write_text("name: [\n")
    assert "is not valid: not pushed" in dags.up()
    assert len(dags.served()) == 1


def test_a_git_server_that_is_away_is_said(dags: Dags) -> None:
    away = Hooks(dags.hooks.settings.model_copy(update={"git_url": "http://127.0.0.1:9"}))
    away.settings.__dict__.pop("git_base_url", None)
    with pytest.raises(UnavailableError):
        push_dags(away, dags.folder, dags.repo)
