"""What a repository on disk says of its own past; nothing here talks to a server."""

from __future__ import annotations

from pathlib import Path

from airloom.hooks.git_command import run_git

HISTORY_AT_MOST = 1000


def history(git_dir: Path, tip: str, *, limit: int = HISTORY_AT_MOST) -> list[str]:
    """A commit and its ancestors, each before its parents; empty where there is no such commit."""
    arguments = ("rev-list", "--topo-order", f"--max-count={limit}", "--end-of-options", tip)
    done = run_git(arguments, git_dir=git_dir, check=False)
    return done.stdout.decode().split() if done.returncode == 0 else []


def changed_paths(git_dir: Path, before: str, after: str) -> list[str] | None:
    """Names of the files that differ between two commits; None when that cannot be told."""
    arguments = ("diff-tree", "-r", "-z", "--name-only", "--no-renames", "--end-of-options", before, after)
    done = run_git(arguments, git_dir=git_dir, check=False)
    if done.returncode != 0:
        return None
    return [name for name in done.stdout.decode(errors="replace").split("\0") if name]


def file_of(git_dir: Path, commit: str, path: str) -> bytes | None:
    """A file of a commit, if it is there."""
    done = run_git(("cat-file", "blob", f"{commit}:{path}"), git_dir=git_dir, check=False)
    return done.stdout if done.returncode == 0 else None
