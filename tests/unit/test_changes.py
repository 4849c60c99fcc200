"""Which tips are built, with real repositories: the same whatever became of the events before."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from airloom.flows.changes import decide_tip, is_below
from tests.fixtures.git import git

STAGES = "stages: {train: {paths: [main.py, model]}}\n"


class Repo:
    """A repository whose commits are named by what they change."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        git("init", "--quiet", "-b", "main", "work", cwd=folder)
        self.count = itertools.count()
        self.first = self.commit("stages.yaml", STAGES)

    @property
    def git_dir(self) -> Path:
        return self.work / ".git"

    def commit(self, name: str, content: str | None = None) -> str:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{next(self.count)}\n" if content is None else content)
        git("add", "-A", cwd=self.work)
        git("commit", "--quiet", "-m", name, cwd=self.work)
        return self.head()

    def head(self) -> str:
        return git("rev-parse", "HEAD", cwd=self.work).stdout.strip()

    def decide(self, tip: str, *known: str) -> str | None:
        return decide_tip(self.git_dir, tip, set(known)).commit


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path)


def test_a_change_whose_event_was_lost_is_built_with_the_next_push(repo: Repo) -> None:
    repo.commit("model/net.py")  # nobody heard of it
    docs = repo.commit("README.md")
    assert repo.decide(docs, repo.first) == docs
    assert repo.decide(docs, repo.first, docs) is None


def test_documentation_after_a_build_is_not_built(repo: Repo) -> None:
    model = repo.commit("model/net.py")
    assert repo.decide(repo.commit("README.md"), repo.first, model) is None
    assert repo.decide(repo.commit("docs/more.md"), repo.first, model) is None


@pytest.mark.parametrize("name", ["Dockerfile", "requirements.txt", "stages.yaml", "main.py"])
def test_what_a_stage_or_its_image_is_made_of_is_built(repo: Repo, name: str) -> None:
    tip = repo.commit(name, f"{STAGES}# changed\n")
    assert repo.decide(tip, repo.first) == tip


def test_without_any_build_the_tip_is_built(repo: Repo) -> None:
    tip = repo.commit("README.md")
    assert repo.decide(tip) == tip
    assert repo.decide(tip, "1" * 40) == tip


def test_a_change_that_is_taken_back_is_built_after_the_change_was(repo: Repo) -> None:
    before = repo.commit("main.py", "a = 1\n")
    changed = repo.commit("main.py", "a = 2\n")
    back = repo.commit("main.py", "a = 1\n")
    assert repo.decide(back, before, changed) == back
    assert repo.decide(back, before) is None  # nobody has seen the change


def test_commits_that_the_branch_has_left_prove_nothing(repo: Repo) -> None:
    left = repo.commit("model/net.py", "a\n")
    git("reset", "--quiet", "--hard", repo.first, cwd=repo.work)
    tip = repo.commit("model/net.py", "b\n")
    assert repo.decide(tip, repo.first, left) == tip
    git("reset", "--quiet", "--hard", repo.first, cwd=repo.work)
    docs = repo.commit("README.md")
    assert repo.decide(docs, left) == docs
    assert repo.decide(docs, repo.first, left) is None


def test_a_merge_is_compared_with_what_was_built_before_it(repo: Repo) -> None:
    git("checkout", "--quiet", "-b", "side", cwd=repo.work)
    repo.commit("model/net.py")
    git("checkout", "--quiet", "main", cwd=repo.work)
    built = repo.commit("main.py")
    git("merge", "--quiet", "--no-ff", "-m", "merge", "side", cwd=repo.work)
    assert repo.decide(repo.head(), repo.first, built) == repo.head()


def test_a_broken_stages_file_is_built_so_that_its_error_is_told(repo: Repo) -> None:
    broken = repo.commit("stages.yaml", "stages: [")
    docs = repo.commit("README.md")
    assert repo.decide(docs, repo.first, broken) == docs


def test_paths() -> None:
    assert is_below("model/a/b.py", "model/")
    assert is_below("model", "./model")
    assert is_below("anything", ".")
    assert not is_below("modelling.py", "model")
