"""Whether a branch's tip calls for a build: decided from the repository and from what was built, never from an event.

An event may be lost, doubled, late or out of order; what it says of the commit before it proves nothing.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from airloom.hooks.connect import Hooks
from airloom.hooks.git_history import changed_paths, file_of, history
from airloom.spec.stage_repo import STAGES_FILE, StageRepo

# What a stage's image is made of, beside the paths of its stages.
IMAGE_FILES = ("Dockerfile", ".dockerignore", "requirements.txt")


@dataclass(frozen=True)
class Decision:
    """A commit to build, or the reason why there is none; `base` is the known commit that was compared with."""

    commit: str | None
    reason: str
    base: str | None = None
    changes_nothing: bool = False


def decide_tip(git_dir: Path, tip: str, known: Container[str]) -> Decision:
    """Whether a tip is to be built: unless its newest known ancestor has the same files of stages.

    Args:
        git_dir: a repository that has the tip and its past.
        known: commits whose build has ended, well or badly, or is under way.
    """
    if tip in known:
        return Decision(None, "the commit has been built", tip)
    base = next((commit for commit in history(git_dir, tip) if commit in known), None)
    if base is None:
        return Decision(tip, "nothing before it has been built")
    changed = changed_paths(git_dir, base, tip)
    paths = stage_paths(git_dir, tip)
    # Without a readable stages.yaml the build says what is wrong with it.
    if changed is None or paths is None or any(is_below(name, path) for name in changed for path in paths):
        return Decision(tip, f"a stage's files have changed since {base[:8]}", base)
    return Decision(None, "nothing that a stage is made of has changed", base, changes_nothing=True)


def decide_commit(hooks: Hooks, repo: str, rev: str) -> Decision:
    """`decide_tip` of a commit on the git server, by what the store knows of builds.

    Raises:
        NotFoundError: no such repo or commit.
        ServiceError: the git server or the store did not answer.
    """
    from airloom.flows.build import built_commits

    commit = hooks.git.commit(repo, rev).commit
    return decide_tip(hooks.git.mirror(repo), commit, built_commits(hooks, repo))


def stage_paths(git_dir: Path, commit: str) -> list[str] | None:
    """Files and folders that the stages of a commit are made of; None without a readable stages.yaml."""
    content = file_of(git_dir, commit, STAGES_FILE)
    if content is None:
        return None
    try:
        stages = StageRepo.model_validate(yaml.safe_load(content)).stages
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError):
        return None
    return [STAGES_FILE, *IMAGE_FILES, *(path for source in stages.values() for path in source.paths)]


def is_below(name: str, path: str) -> bool:
    """Whether a file is the path itself or stands below it."""
    path = path.strip("/").removeprefix("./")
    return path in {"", "."} or name == path or name.startswith(f"{path}/")
