"""Stage repos on the git server, through bare mirrors that all processes of this machine share."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from airloom.contract import CodePin
from airloom.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    ContractError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from airloom.hooks.git_command import git_environment, git_error, run_git
from airloom.hooks.git_mirror import ensure_mirror, last_fetch, locked, note_fetch, scratch
from airloom.hooks.git_tags import TagInfo, check_tag, read_tags
from airloom.hooks.git_tree import checked_path, export_tree, read_blobs
from airloom.settings import Settings

T = TypeVar("T")

NAME = "Airloom"
EMAIL = "airloom@localhost"
REPO_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA = re.compile(r"[0-9a-f]{40}")
_ATTEMPTS = 5


class GitRemote:
    """Reads commits and writes version tags.

    Every method may be called from many processes at once, and may be killed at any moment: only a fetch
    takes a lock, which the kernel frees with its holder.

    Args:
        base_url: of the git server; repos are at `<base_url>/git/<owner>/<repo>.git`.
        mirrors: folder of the bare mirrors.
    """

    def __init__(self, *, base_url: str, owner: str, user: str, password: str, mirrors: Path) -> None:
        self._base_url = base_url.rstrip("/")
        self._owner = owner
        self._user = user
        self._mirrors = mirrors
        # In the environment, for this server alone: neither arguments nor URLs show it.
        credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._config = {f"http.{self._base_url}/.extraHeader": f"Authorization: Basic {credentials}"}

    @classmethod
    def from_settings(cls, settings: Settings) -> GitRemote:
        """A client of this installation's git server, as the user who writes version tags."""
        return cls(
            base_url=settings.git_base_url,
            owner=settings.git_owner,
            user=settings.git_user,
            password=settings.secret("git_password"),
            mirrors=settings.home_dir / "mirrors",
        )

    def clone_url(self, repo: str) -> str:
        """Where `git clone` finds a repo; without credentials.

        Raises:
            ConfigError: that is no name for a repo.
        """
        if not REPO_PATTERN.fullmatch(repo) or repo.endswith(".git"):
            raise ConfigError(f"{repo!r} is not a repo's name", hint="letters, digits, `_`, `-` and `.`; no slash")
        return f"{self._base_url}/git/{self._owner}/{repo}.git"

    def push(self, repo: str, git_dir: Path, refspec: str) -> None:
        """Push from a repository of the caller's; never over what is there.

        Raises:
            ServiceError: the server refused, for instance because the branch has moved; UnavailableError, AuthError.
        """
        self._remote(repo, ("push", "--quiet", self.clone_url(repo), refspec), git_dir)

    # Reading

    def fetch(self, repo: str) -> None:
        """Bring the mirror up to date with all branches and tags.

        Raises:
            NotFoundError: no such repo.
            AuthError, UnavailableError: the server refused or did not answer.
        """
        asked = time.clock_gettime(time.CLOCK_MONOTONIC)  # one clock for all processes of the machine
        mirror = self._mirror(repo)
        with locked(mirror) as lock:
            # Who waited for another's fetch that began later than the question has its answer already.
            if last_fetch(lock) >= asked:
                return
            started = time.clock_gettime(time.CLOCK_MONOTONIC)
            refspecs = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
            arguments = ("fetch", "--quiet", "--prune", "--no-write-fetch-head", self.clone_url(repo), *refspecs)
            self._remote(repo, arguments, mirror, lock)
            note_fetch(lock, started)

    def mirror(self, repo: str) -> Path:
        """The bare repository on this machine with all that the server has now; see `fetch` for what it raises."""
        self.fetch(repo)
        return self._mirror(repo)

    def head(self, repo: str, branch: str = "main") -> str:
        """The commit that a branch of the server points at now.

        Raises:
            NotFoundError: no such repo or branch.
        """
        ref = f"refs/heads/{branch}"
        found = self._remote(repo, ("ls-remote", self.clone_url(repo), ref), None)
        for line in found.decode().splitlines():
            sha, _, name = line.partition("\t")
            if name == ref:
                return sha
        raise NotFoundError(f"{repo} has no branch {branch!r}", hint="push to it first")

    def commit(self, repo: str, rev: str) -> CodePin:
        """The commit that a branch, tag or (short) hash names; of a branch, where it is now.

        Raises:
            NotFoundError: no such repo, or no such commit in it.
        """
        mirror = self._mirror(repo)
        if not (_SHA.fullmatch(rev) and self._has_commit(mirror, rev)):
            self.fetch(repo)
        shown = run_git(
            ("log", "-1", "--no-show-signature", "--format=%H%x00%an <%ae>%x00%B", "--end-of-options", rev, "--"),
            git_dir=mirror,
            check=False,
        )
        if shown.returncode != 0 or not shown.stdout.strip():
            raise NotFoundError(
                f"{repo} has no commit {rev!r}", hint="give a branch, a tag or a hash that was pushed to the git server"
            )
        sha, author, message = shown.stdout.decode(errors="replace").split("\0", 2)
        return CodePin(repo=repo, commit=sha, author=author, message=message.strip())

    def export(self, repo: str, sha: str, dest: Path, *, read_only: bool = False) -> None:
        """Write a commit's files to the folder `dest`, whole or not at all; nothing happens where it exists.

        Files get the very bytes that git holds: no line ends are turned, no attributes applied.

        Raises:
            NotFoundError: no such repo or commit.
        """
        if dest.exists():
            return
        mirror = self._mirror(repo)
        commit = self._commit_id(repo, sha)
        export_tree(mirror, commit, dest, read_only=read_only)

    def read_file(self, repo: str, sha: str, path: str) -> bytes:
        """One file of a commit.

        Raises:
            NotFoundError: no such repo, commit or file.
        """
        found = self.read_files(repo, sha, [path])
        if path not in found:
            raise NotFoundError(f"{repo}@{sha[:12]} has no file {path!r}")
        return found[path]

    def read_files(self, repo: str, sha: str, paths: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that a commit has.

        Raises:
            NotFoundError: no such repo or commit.
        """
        mirror, names = self._mirror(repo), [checked_path(path) for path in paths]
        found = read_blobs(mirror, sha, names) if _SHA.fullmatch(sha) else None
        if found is None:
            found = read_blobs(mirror, self.commit(repo, sha).commit, names) or {}
        return found

    def read_tag(self, repo: str, tag: str) -> TagInfo:
        """One tag; asks the server only when the mirror doesn't have it.

        Raises:
            NotFoundError: no such repo or tag.
        """
        check_tag(tag)
        mirror = self._mirror(repo)
        found = read_tags(mirror, f"refs/tags/{tag}")
        if not found:
            self.fetch(repo)
            found = read_tags(mirror, f"refs/tags/{tag}")
        for info in found:
            if info.name == tag:
                return info
        raise NotFoundError(f"{repo} has no tag {tag!r}", hint="list the version tags with: airloom lineage")

    def list_tags(self, repo: str, prefix: str = "") -> list[TagInfo]:
        """All tags of the server whose name starts with `prefix`, by name.

        Raises:
            NotFoundError: no such repo.
        """
        self.fetch(repo)
        folder = prefix.rpartition("/")[0]
        found = read_tags(self._mirror(repo), f"refs/tags/{folder}" if folder else "refs/tags")
        return [info for info in found if info.name.startswith(prefix)]

    # Writing

    def write_version(
        self,
        repo: str,
        *,
        parent: str,
        files: Mapping[str, bytes],
        tag: str,
        message: str,
        commit_message: str,
        when: datetime | None = None,
    ) -> str:
        """Push a tag onto a new commit: the parent's files with `files` added or replaced.

        The commit is reachable by the tag alone, and both arrive in one push or not at all. Equal arguments,
        `when` included, make the same commit and tag, so that repeating a call that was cut off is harmless.

        Args:
            parent: full hash of the commit that it stands on.
            message: of the tag.
            when: date of commit and tag; now when not given.

        Returns:
            The commit's hash.

        Raises:
            ConflictError: another tag of that name exists on the server.
            NotFoundError: no such repo or parent.
            AuthError, UnavailableError, StorageFullError: the server refused or did not answer.
        """
        check_tag(tag)
        mirror = self._mirror(repo)
        parent = self._commit_id(repo, parent)
        stamp = f"{int((when or datetime.now(UTC)).timestamp())} +0000"
        commit = self._make_commit(mirror, parent, files, commit_message, stamp)
        content = f"object {commit}\ntype commit\ntag {tag}\ntagger {NAME} <{EMAIL}> {stamp}\n\n{_text(message)}"
        made = run_git(("mktag",), git_dir=mirror, stdin=content.encode(), check=False)
        if made.returncode != 0:
            raise ContractError(f"{tag!r} cannot be a tag: {made.stderr.decode(errors='replace').strip()}")
        self._push_tag(repo, mirror, made.stdout.decode().strip(), tag)
        return commit

    def _make_commit(
        self, mirror: Path, parent: str, files: Mapping[str, bytes], commit_message: str, stamp: str
    ) -> str:
        names = [checked_path(name) for name in files]
        with scratch(mirror) as folder:
            # An index of its own: no lock is shared with anyone.
            environment = git_environment(
                GIT_INDEX_FILE=str(folder / "index"),
                GIT_AUTHOR_NAME=NAME,
                GIT_AUTHOR_EMAIL=EMAIL,
                GIT_AUTHOR_DATE=stamp,
                GIT_COMMITTER_NAME=NAME,
                GIT_COMMITTER_EMAIL=EMAIL,
                GIT_COMMITTER_DATE=stamp,
            )

            def git(*arguments: str, stdin: bytes = b"") -> str:
                return run_git(arguments, git_dir=mirror, environment=environment, stdin=stdin).stdout.decode().strip()

            git("read-tree", parent)
            paths = [folder / f"blob{number}" for number in range(len(names))]
            for path, content in zip(paths, files.values(), strict=True):
                path.write_bytes(content)
            listed = "".join(f"{path}\n" for path in paths).encode()
            blobs = git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=listed).split()
            entries = "".join(f"100644 {blob}\t{name}\0" for blob, name in zip(blobs, names, strict=True))
            git("update-index", "--add", "--replace", "-z", "--index-info", stdin=entries.encode())
            return git("commit-tree", git("write-tree"), "-p", parent, stdin=_text(commit_message).encode())

    def _push_tag(self, repo: str, mirror: Path, object_id: str, tag: str) -> None:
        ref = f"refs/tags/{tag}"
        url = self.clone_url(repo)

        def push() -> None:
            done = run_git(
                ("push", "--porcelain", "--no-verify", url, f"{object_id}:{ref}"),
                git_dir=mirror,
                environment=git_environment(self._config),
                check=False,
            )
            if done.returncode == 0:  # made now, or there already with this very content
                return
            refused = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("!")]
            if not refused:
                raise self._named(repo, git_error("push", done.stderr.decode(errors="replace"), done.returncode))
            listed = self._remote(repo, ("ls-remote", url, ref), mirror).decode().split()
            if not listed:
                reason = refused[0].split("\t")[-1]
                kind = UnavailableError if "lock" in reason else ServiceError
                raise kind(f"the git server refused the tag {tag!r} of {repo}: {reason}")
            if listed[0] != object_id:
                raise ConflictError(f"the tag {tag!r} of {repo} exists already, with other content")

        _retried(push)

    # The mirror

    def _mirror(self, repo: str) -> Path:
        self.clone_url(repo)  # refuses what is no name
        return ensure_mirror(self._mirrors, repo)

    def _commit_id(self, repo: str, sha: str) -> str:
        """The full hash of a commit; `commit` tells more, and takes longer."""
        if _SHA.fullmatch(sha):
            arguments = ("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}")
            found = run_git(arguments, git_dir=self._mirror(repo), check=False)
            if found.returncode == 0:
                return found.stdout.decode().strip()
        return self.commit(repo, sha).commit

    def _has_commit(self, mirror: Path, sha: str) -> bool:
        return run_git(("cat-file", "-e", f"{sha}^{{commit}}"), git_dir=mirror, check=False).returncode == 0

    def _remote(self, repo: str, arguments: Sequence[str], mirror: Path | None, lock: int | None = None) -> bytes:
        """A command that talks to the server; tried again while it does not answer."""

        def call() -> bytes:
            try:
                return run_git(
                    arguments,
                    git_dir=mirror,
                    environment=git_environment(self._config),
                    # The git process holds the lock too: it may outlive this one.
                    pass_fds=() if lock is None else (lock,),
                ).stdout
            except (ServiceError, NotFoundError) as error:
                raise self._named(repo, error) from error

        return _retried(call)

    def _named(self, repo: str, error: ServiceError | NotFoundError) -> ServiceError | NotFoundError:
        if isinstance(error, NotFoundError):
            return NotFoundError(
                f"the git server has no repo {self._owner}/{repo}", hint="make it with: airloom provision"
            )
        if isinstance(error, AuthError):
            return AuthError(f"the git server refused {self._user!r} for repo {repo}: {error.message}", hint=error.hint)
        return type(error)(f"repo {repo}: {error.message}", hint=error.hint)


def _retried(call: Callable[[], T]) -> T:
    import tenacity

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(UnavailableError),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=4),
        reraise=True,
    )(call)


def _text(message: str) -> str:
    return message.replace("\0", "").strip("\n") + "\n"
