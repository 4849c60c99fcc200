"""The files of a commit, ready to run, and what can be told of them without running anything."""

from __future__ import annotations

import ast
from pathlib import Path

from airloom.errors import BuildFailedError, ConfigError
from airloom.hooks.connect import Hooks
from airloom.spec.stage_repo import StageRepo


def ensure_checkout(hooks: Hooks, repo: str, commit: str) -> Path:
    """The read-only folder with a commit's files, `checkouts_dir/<repo>/<commit>`; made if it isn't there.

    It appears whole or not at all, and only if the commit can be a build: its `stages.yaml` is valid and every
    Python file compiles.

    Args:
        commit: full hash.

    Raises:
        NotFoundError: no such repo or commit.
        BuildFailedError: the commit holds what can't be run.
    """
    folder = hooks.settings.checkouts_dir / repo / commit
    passed = folder.with_name(f".{commit}.checked")
    if not (folder.is_dir() and passed.exists()):
        hooks.git.export(repo, commit, folder, read_only=True)
        check_sources(repo, commit, folder)
        passed.touch()
    return folder


def check_sources(repo: str, commit: str, folder: Path) -> StageRepo:
    """Read `stages.yaml` and compile every Python file.

    Raises:
        BuildFailedError: names the file, the line and what is wrong.
    """
    what = f"{repo}@{commit[:8]}"
    try:
        stages = StageRepo.load(folder)
    except ConfigError as error:
        said = error.message.replace(str(folder) + "/", "").replace(f"{folder.name}: ", "")
        raise BuildFailedError(f"{what}: {said}", hint=error.hint) from error
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        try:
            ast.parse(path.read_bytes(), filename=name)
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            raise BuildFailedError(f"{what}: {name}{line}: {getattr(error, 'msg', error)}") from error
    return stages
