"""The repo that the stack's Airflow takes its DAGs from.

Its first commit is dags/ as it is here, and so is its next one, as long as nobody else pushes there.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from airloom.embedded.provision import EXCLUDED, push_template
from airloom.errors import ServiceError
from airloom.hooks.connect import Hooks
from airloom.hooks.git_command import git_environment, run_git
from airloom.hooks.git_history import HISTORY_AT_MOST, changed_paths
from airloom.spec.load import load_pipelines
from airloom.stack.container import DAGS_REPO

_EMAIL = "airloom@localhost"
_MESSAGE = "Take over dags/"
_SHOWN = 3


def push_dags(hooks: Hooks, folder: Path, repo: str = DAGS_REPO) -> str:
    """Push dags/ to the repo if that adds to what this command pushed before; what became of it, for people.

    What people have pushed there is never undone: from then on it is theirs.

    Raises:
        ServiceError: the git server refused or did not answer.
    """
    hooks.gitbucket.ensure_repo(repo, "DAGs and their configurations")
    with tempfile.TemporaryDirectory(prefix="airloom-dags-") as temporary:
        tree = Path(temporary) / "tree"
        shutil.copytree(folder, tree / "dags", ignore=shutil.ignore_patterns("__pycache__"))
        if push_template(hooks, repo, tree):
            return f"{repo} pushed for the first time"
        return _push_change(hooks, repo, tree, Path(temporary))


def _push_change(hooks: Hooks, repo: str, tree: Path, temporary: Path) -> str:
    tip = hooks.git.head(repo)
    mirror = hooks.git.mirror(repo)
    excluded = temporary / "exclude"
    excluded.write_text("\n".join(EXCLUDED) + "\n")
    environment = git_environment(
        {"user.name": "Airloom", "user.email": _EMAIL, "core.excludesFile": str(excluded)},
        GIT_INDEX_FILE=str(temporary / "index"),
    )

    def git(*arguments: str) -> str:
        return run_git(arguments, git_dir=mirror, environment=environment).stdout.decode().strip()

    git("-C", str(tree), f"--work-tree={tree}", "add", "--all", ".")
    wanted = git("write-tree")
    if git("rev-parse", f"{tip}^{{tree}}") == wanted:
        return f"{repo} is as dags/ here"
    if git("log", "-1", "--format=%ce", tip) != _EMAIL:
        if wanted in git("log", "--format=%T", f"--max-count={HISTORY_AT_MOST}", tip).split():
            return f"{repo} has gone on from dags/ here: left as it is"
        return f"{repo} was pushed to by others, and dags/ here is something else: left as it is; push there by hand"
    _, errors = load_pipelines(tree / "dags" / "configs")
    if errors:
        return f"dags/ has changed here, but is not valid: not pushed to {repo}; see: airloom check"
    changed = changed_paths(mirror, tip, wanted) or []
    commit = git("commit-tree", wanted, "-p", tip, "-m", _MESSAGE)
    try:
        hooks.git.push(repo, mirror, f"{commit}:refs/heads/main")
    except ServiceError:
        if hooks.git.head(repo) != tip:  # somebody was faster, and theirs stays
            return f"{repo} was pushed to by others meanwhile: left as it is"
        raise
    names = ", ".join(name.removeprefix("dags/") for name in changed[:_SHOWN])
    more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return f"{repo} has the changes of dags/ here: {names}{more}"
