"""GitRemote against a real server: mirrors, exports and version tags."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from airloom.errors import AuthError, BuildFailedError, ConflictError, ContractError, NotFoundError, UnavailableError
from airloom.flows.build import ensure_checkout
from airloom.hooks.connect import Hooks
from airloom.hooks.git import GitRemote
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.services import free_port

WHEN = datetime(2026, 11, 21, 4, 0, tzinfo=UTC)


def write(remote: GitRemote, repo: str, parent: str, tag: str, content: bytes = b"md5: 1\n") -> str:
    return remote.write_version(
        repo,
        parent=parent,
        files={"data/dataset.dvc": content},
        tag=tag,
        message='{"rows": 5}',
        commit_message=f"Data version {tag}",
        when=WHEN,
    )


def server_refs(repo: StageRepoFixture) -> dict[str, str]:
    lines = git("ls-remote", repo.url, cwd=repo.work).stdout.splitlines()
    return {line.split("\t")[1]: line.split("\t")[0] for line in lines}


def test_a_commit_is_found_by_branch_tag_and_hash(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    sha = stage_repo.commit("Añade 🎉\n\nbody", x__txt="x")
    git("tag", "-a", "v1", "-m", "one", cwd=stage_repo.work)
    stage_repo.push("main", "v1")
    for rev in ("main", "v1", sha, sha[:10]):
        pin = git_remote.commit(stage_repo.name, rev)
        assert (pin.commit, pin.message, pin.author) == (sha, "Añade 🎉\n\nbody", "Ada <ada@example.org>")
    assert git_remote.head(stage_repo.name) == sha
    second = stage_repo.commit("Two", x__txt="y")
    stage_repo.push()
    assert git_remote.commit(stage_repo.name, "main").commit == second
    assert git_remote.read_file(stage_repo.name, sha, "x.txt") == b"x"


@pytest.mark.parametrize("rev", ["none", "0" * 40, "--all", "main^^^^", "main:x.txt"])
def test_an_unknown_commit_is_named(git_remote: GitRemote, stage_repo: StageRepoFixture, rev: str) -> None:
    stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    with pytest.raises(NotFoundError, match=stage_repo.name) as caught:
        git_remote.commit(stage_repo.name, rev)
    assert rev in str(caught.value)


def test_unknown_repo_branch_file_and_tag(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    sha = stage_repo.commit("One", x__txt="x")
    stage_repo.push()
    with pytest.raises(NotFoundError, match="no repo airloom/none"):
        git_remote.commit("none", "main")
    with pytest.raises(NotFoundError, match="no branch 'dev'"):
        git_remote.head(stage_repo.name, "dev")
    with pytest.raises(NotFoundError, match=r"no file 'y.txt'"):
        git_remote.read_file(stage_repo.name, sha, "y.txt")
    with pytest.raises(NotFoundError, match="no tag 'digits/x'"):
        git_remote.read_tag(stage_repo.name, "digits/x")


def test_several_files_of_a_commit_are_read_at_once(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    files = {"a.txt": "one\n", "b c/d.txt": "", "b c/é.bin": b"\n\0missing\n", "missing": "here"}
    first = stage_repo.commit_files("One", files)
    stage_repo.push()
    asked = ["missing", "none", "b c/é.bin", "b c", "b c/d.txt", "a.txt"]
    expected = {"a.txt": b"one\n", "b c/d.txt": b"", "b c/é.bin": b"\n\0missing\n", "missing": b"here"}
    for rev in (first, first[:10], "main"):
        assert git_remote.read_files(stage_repo.name, rev, asked) == expected
    second = stage_repo.commit_files("Two", {"a.txt": "two\n"})
    stage_repo.push()  # the mirror doesn't have it yet
    assert git_remote.read_files(stage_repo.name, second, ["a.txt"]) == {"a.txt": b"two\n"}
    assert git_remote.read_files(stage_repo.name, second, []) == {}
    with pytest.raises(NotFoundError, match="no commit"):
        git_remote.read_files(stage_repo.name, "0" * 40, ["a.txt"])
    with pytest.raises(ContractError, match="no path inside"):
        git_remote.read_files(stage_repo.name, first, ["a.txt\nb.txt"])


def test_export_gives_the_very_bytes_once(git_remote: GitRemote, stage_repo: StageRepoFixture, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        ".gitattributes": "*.txt text eol=crlf export-ignore\n",
        "a.txt": "one\ntwo\n",
        "deep/er/ä b.bin": bytes(range(256)),
        "empty": "",
    }
    sha = stage_repo.commit_files("Add", files)
    stage_repo.push()
    dest = tmp_path / "out" / "tree"
    git_remote.export(stage_repo.name, sha, dest, read_only=True)
    found = {p.relative_to(dest).as_posix(): p.read_bytes() for p in dest.rglob("*") if p.is_file()}
    assert found == {name: v.encode() if isinstance(v, str) else v for name, v in files.items()}
    assert not any(p.stat().st_mode & 0o222 for p in (dest, *dest.rglob("*")))
    assert [p.name for p in dest.parent.iterdir()] == ["tree"]
    git_remote.export(stage_repo.name, sha, dest)  # it exists: nothing happens


def test_a_link_out_of_the_folder_is_refused(
    git_remote: GitRemote, stage_repo: StageRepoFixture, tmp_path: Path
) -> None:
    (stage_repo.work / "leak").symlink_to("../../secrets")
    sha = stage_repo.commit("Add a link", x__txt="x")
    stage_repo.push()
    with pytest.raises(ContractError, match="leads out"):
        git_remote.export(stage_repo.name, sha, tmp_path / "tree")
    assert list(tmp_path.glob("tree")) == []
    assert list(tmp_path.glob(".export-*")) == []


def test_a_version_is_a_tag_on_a_commit_of_its_own(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    parent = stage_repo.commit_files("Code", {"main.py": "1", "data/old": "x"})
    stage_repo.push()
    commit = write(git_remote, stage_repo.name, parent, "digits/CV_a")
    info = git_remote.read_tag(stage_repo.name, "digits/CV_a")
    assert (info.commit, info.message, info.created_at) == (commit, '{"rows": 5}', WHEN)
    assert server_refs(stage_repo)["refs/heads/main"] == parent
    assert git_remote.read_file(stage_repo.name, commit, "data/dataset.dvc") == b"md5: 1\n"
    assert git_remote.read_file(stage_repo.name, commit, "main.py") == b"1"
    git("fetch", "--quiet", stage_repo.url, "tag", "digits/CV_a", cwd=stage_repo.work)
    shown = git("log", "-1", "--format=%P|%an <%ae>|%B", "digits/CV_a", cwd=stage_repo.work).stdout.strip()
    assert shown == f"{parent}|Airloom <airloom@localhost>|Data version digits/CV_a"
    assert [tag.name for tag in git_remote.list_tags(stage_repo.name, "digits/")] == ["digits/CV_a"]
    assert git_remote.list_tags(stage_repo.name, "other/") == []


def test_repeating_a_write_is_harmless_and_another_conflicts(
    git_remote: GitRemote, stage_repo: StageRepoFixture
) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    first = write(git_remote, stage_repo.name, parent, "d/CV_a")
    before = server_refs(stage_repo)
    assert write(git_remote, stage_repo.name, parent, "d/CV_a") == first
    assert server_refs(stage_repo) == before
    with pytest.raises(ConflictError, match="d/CV_a"):
        write(git_remote, stage_repo.name, parent, "d/CV_a", b"md5: 2\n")
    assert server_refs(stage_repo) == before


@pytest.mark.parametrize("tag", ["", "a b", "a..b", "/a", "a/", "-x", "a.lock", "a~1"])
def test_bad_tag_names_are_refused(git_remote: GitRemote, stage_repo: StageRepoFixture, tag: str) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    with pytest.raises(ContractError):
        write(git_remote, stage_repo.name, parent, tag)


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", ".git/config", "a/../../b", ""])
def test_paths_out_of_the_repo_are_refused(git_remote: GitRemote, stage_repo: StageRepoFixture, path: str) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    with pytest.raises(ContractError, match="path"):
        git_remote.write_version(
            stage_repo.name, parent=parent, files={path: b""}, tag="d/x", message="m", commit_message="m"
        )


def test_wrong_password_and_absent_server(git_settings: Settings, stage_repo: StageRepoFixture, tmp_path: Path) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    url = git_settings.git_base_url
    wrong = GitRemote(base_url=url, owner="airloom", user="airloom", password="no", mirrors=tmp_path / "m")
    with pytest.raises(AuthError, match="refused 'airloom'") as caught:
        write(wrong, stage_repo.name, parent, "d/x")
    assert "git_password" in str(caught.value)
    absent = GitRemote(
        base_url=f"http://127.0.0.1:{free_port()}", owner="airloom", user="a", password="b", mirrors=tmp_path / "n"
    )
    with pytest.raises(UnavailableError):
        absent.head(stage_repo.name)
    assert not [ref for ref in server_refs(stage_repo) if ref.startswith("refs/tags")]


def test_no_secret_shows_in_arguments_or_mirrors(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    git_remote.fetch(stage_repo.name)
    secret = stage_repo.settings.secret("git_password").encode()
    mirror = stage_repo.settings.home_dir / "mirrors" / f"{stage_repo.name}.git"
    assert all(secret not in path.read_bytes() for path in mirror.rglob("*") if path.is_file())
    assert secret.decode() not in git_remote.clone_url(stage_repo.name)


def _write_many(settings: Settings, repo: str, parent: str, worker: int, count: int) -> None:
    remote = GitRemote.from_settings(settings)
    for number in range(count):
        write(remote, repo, parent, f"digits/CV_w{worker}_n{number}", f"md5: {worker}-{number}\n".encode())


def test_a_hundred_concurrent_writes_lose_and_double_none(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=_write_many, args=(stage_repo.settings, stage_repo.name, parent, worker, 20))
        for worker in range(5)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(240)
    assert [job.exitcode for job in jobs] == [0] * 5
    tags = git_remote.list_tags(stage_repo.name)
    assert {tag.name for tag in tags} == {f"digits/CV_w{w}_n{n}" for w in range(5) for n in range(20)}
    assert len({tag.commit for tag in tags}) == 100
    for tag in tags:
        worker, number = tag.name.removeprefix("digits/CV_w").split("_n")
        content = git_remote.read_file(stage_repo.name, tag.commit, "data/dataset.dvc")
        assert content == f"md5: {worker}-{number}\n".encode()
    assert server_refs(stage_repo)["refs/heads/main"] == parent
    bare = stage_repo.settings.data_dir / "git" / "airloom" / f"{stage_repo.name}.git"
    git("fsck", "--strict", cwd=bare)


def _race(settings: Settings, repo: str, parent: str, worker: int, results: multiprocessing.Queue[str]) -> None:
    try:
        write(GitRemote.from_settings(settings), repo, parent, "d/same", f"{worker}".encode())
        results.put("written")
    except ConflictError:
        results.put("conflict")


def test_of_many_writers_of_one_tag_one_wins(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    jobs = [
        context.Process(target=_race, args=(stage_repo.settings, stage_repo.name, parent, worker, results))
        for worker in range(4)
    ]
    for job in jobs:
        job.start()
    outcomes = sorted(results.get(timeout=120) for _ in jobs)
    for job in jobs:
        job.join(60)
    assert outcomes == ["conflict"] * 3 + ["written"]
    assert len(git_remote.list_tags(stage_repo.name)) == 1


WRITER = """
import sys
from datetime import UTC, datetime
from airloom.hooks.git import GitRemote
from pathlib import Path
url, mirrors, repo, parent = sys.argv[1:]
password = sys.stdin.readline().strip()
remote = GitRemote(base_url=url, owner="airloom", user="airloom", password=password, mirrors=Path(mirrors))
remote.commit(repo, parent)
print("ready", flush=True)
remote.write_version(repo, parent=parent, files={"data/dataset.dvc": b"md5: 1\\n"}, tag="d/killed",
    message='{"rows": 5}', commit_message="Data version d/killed", when=datetime(2026, 11, 21, 4, 0, tzinfo=UTC))
"""


@pytest.mark.parametrize("delay_seconds", [0.0, 0.02, 0.05, 0.08, 0.12, 0.2])
def test_a_killed_writer_blocks_nobody_and_its_retry_makes_the_same(
    git_remote: GitRemote, stage_repo: StageRepoFixture, delay_seconds: float
) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    settings = stage_repo.settings
    arguments = (settings.git_base_url, str(settings.home_dir / "mirrors"), stage_repo.name, parent)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(settings.secret("git_password") + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay_seconds)  # where in its work it is hit is the point
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    commit = git_remote.write_version(
        stage_repo.name,
        parent=parent,
        files={"data/dataset.dvc": b"md5: 1\n"},
        tag="d/killed",
        message='{"rows": 5}',
        commit_message="Data version d/killed",
        when=WHEN,
    )
    assert [tag.commit for tag in git_remote.list_tags(stage_repo.name)] == [commit]


def test_locks_of_the_dead_are_removed(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    write(git_remote, stage_repo.name, parent, "d/first")
    git_remote.fetch(stage_repo.name)
    settings = stage_repo.settings
    bare = settings.data_dir / "git" / "airloom" / f"{stage_repo.name}.git"
    mirror = settings.home_dir / "mirrors" / f"{stage_repo.name}.git"
    for folder in (bare, mirror):
        for name in ("packed-refs.lock", "refs/heads/main.lock", "refs/tags/d/second.lock", "HEAD.lock"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    write(git_remote, stage_repo.name, parent, "d/second")
    second = stage_repo.commit("More", x__txt="y")
    stage_repo.push()
    assert git_remote.commit(stage_repo.name, "main").commit == second
    assert {tag.name for tag in git_remote.list_tags(stage_repo.name)} == {"d/first", "d/second"}


def test_a_rejected_tag_leaves_no_commit_behind(git_remote: GitRemote, stage_repo: StageRepoFixture) -> None:
    parent = stage_repo.commit("Code", x__txt="x")
    stage_repo.push()
    write(git_remote, stage_repo.name, parent, "d/CV_a")
    with pytest.raises(ConflictError):
        write(git_remote, stage_repo.name, parent, "d/CV_a", b"other\n")
    bare = stage_repo.settings.data_dir / "git" / "airloom" / f"{stage_repo.name}.git"
    reachable = git("rev-list", "--all", cwd=bare).stdout.split()
    assert len(reachable) == 2  # the code and the first version


def test_checkout_is_whole_checked_and_read_only(stage_repo: StageRepoFixture) -> None:
    hooks = Hooks(stage_repo.settings)
    good = stage_repo.commit_files(
        "Good", {"stages.yaml": "stages: {train: {paths: [main.py]}}\n", "main.py": "print('hi')\n"}
    )
    stage_repo.push()
    folder = ensure_checkout(hooks, stage_repo.name, good)
    assert folder == stage_repo.settings.checkouts_dir / stage_repo.name / good
    assert (folder / "main.py").read_text() == "print('hi')\n"
    assert ensure_checkout(hooks, stage_repo.name, good) == folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"main.py": "x"}, "no stages.yaml"),
        ({"stages.yaml": "stages: {train: {paths: [gone.py]}}\n"}, "'gone.py' is not in the repo"),
        ({"stages.yaml": "stages: {fly: {paths: [main.py]}}\n", "main.py": ""}, "fly"),
        ({"stages.yaml": "stages: [\n"}, "stages.yaml"),
        ({"stages.yaml": "stages: {train: {paths: [m]}}\n", "m/a.py": "def f(:\n"}, "m/a.py:1: invalid syntax"),
        ({"stages.yaml": "stages: {train: {paths: [m]}}\n", "m/a.py": b"\xff\xfe"}, "m/a.py"),
    ],
)
def test_an_unusable_commit_says_why(stage_repo: StageRepoFixture, files: dict[str, str], said: str) -> None:
    commit = stage_repo.commit_files("Bad", dict(files))
    stage_repo.push()
    for _ in range(2):  # a second look is no kinder
        with pytest.raises(BuildFailedError, match=commit[:8]) as caught:
            ensure_checkout(Hooks(stage_repo.settings), stage_repo.name, commit)
        assert said in str(caught.value)


def test_a_mirror_is_made_by_whoever_comes_first(git_settings: Settings, tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "other", git_port=git_settings.git_port)
    assert GitRemote.from_settings(settings).clone_url("a_b-c.d").endswith("/git/airloom/a_b-c.d.git")
