"""The git server's parts without a network: who may enter, what a push starts, what is kept."""

from __future__ import annotations

import base64
import sqlite3
from pathlib import Path

import pytest

from airloom.embedded.builder import decide, hook_url, signature_problem
from airloom.embedded.forge.auth import BasicAuth
from airloom.embedded.forge.events import POST_RECEIVE, RefChange, pushed_commits, read_push
from airloom.embedded.forge.metrics import Metrics
from airloom.embedded.forge.repositories import ZERO, Repositories, Repository
from airloom.embedded.forge.state import State
from airloom.errors import NotFoundError
from airloom.hooks.git_command import git_environment, run_git
from airloom.settings import Settings
from tests.fixtures.git import git

STAGES = "stages:\n  train: {paths: [main.py, ./model/, 'a b']}\n"


async def _nothing(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not reached")


def header(text: bytes) -> bytes:
    return b"Basic " + base64.b64encode(text)


@pytest.mark.parametrize(
    ("sent", "user"),
    [
        (header(b"airloom:p:w"), "airloom"),
        (header(b"admin:root"), "admin"),
        (header(b"airloom:p:w").replace(b"Basic", b"basic"), "airloom"),
        (header(b"airloom:root"), None),
        (header(b"airloom:p:w "), None),
        (header(b"airloom"), None),
        (header(b":p:w"), None),
        (header(b"airloom:"), None),
        (header(b"\xff:\xff"), None),
        (b"Basic %%%", None),
        (b"Bearer x", None),
        (b"", None),
    ],
)
def test_who_may_enter(sent: bytes, user: str | None) -> None:
    auth = BasicAuth(_nothing, passwords={"airloom": "p:w", "admin": "root"}, open_paths=frozenset())
    assert auth.user_of(sent) == user


def test_a_signature_is_checked() -> None:
    # printf 'body' | openssl dgst -sha256 -hmac key
    good = "sha256=515aae133b435d4000956731f68ae5cf5eb85d4f0dc6a546d2bfcd3595ec1ae1"
    assert signature_problem(b"body", good, "key") is None
    assert signature_problem(b"body", None, "key") == "unsigned"
    assert signature_problem(b"body", "", "key") == "unsigned"
    for bad in (good.upper(), good[:-1], "sha1=1", "ü", good + " "):
        assert signature_problem(b"body", bad, "key") == "forged"
    assert signature_problem(b"bodY", good, "key") == "forged"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    git("init", "--quiet", "-b", "main", "work", cwd=tmp_path)
    return tmp_path / "work"


def commit(work: Path, message: str = "m", **files: str) -> str:
    for name, content in files.items():
        path = work / name.replace("__", ".").replace("SLASH", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    git("add", "-A", cwd=work)
    git("commit", "--quiet", "--allow-empty", "-m", message, cwd=work)
    return git("rev-parse", "HEAD", cwd=work).stdout.strip()


def repository(work: Path) -> Repository:
    return Repository("airloom", "work", work / ".git")


@pytest.mark.parametrize(
    ("name", "builds"),
    [
        ("main__py", True),
        ("modelSLASHdeepSLASHa__py", True),
        ("a b", True),
        ("stages__yaml", True),
        ("README__md", False),
        ("modelling__py", False),
        ("testsSLASHmain__py", False),
    ],
)
def test_which_files_call_for_a_build(work: Path, name: str, builds: bool) -> None:
    before = commit(work, stages__yaml=STAGES, main__py="1", modelSLASHx="1")
    after = commit(work, **{name: STAGES + "# changed\n"})
    decision = decide(repository(work), ref="refs/heads/main", after=after, known={before})
    assert decision.commit == (after if builds else None), decision.reason


@pytest.mark.parametrize("stages", ["stages: [", "stages: {}\nmore: 1\n", ""])
def test_a_broken_stages_file_is_built_so_that_its_error_is_told(work: Path, stages: str) -> None:
    before = commit(work, stages__yaml=stages)
    after = commit(work, README__md="1")
    assert decide(repository(work), ref="refs/heads/main", after=after, known={before}).commit == after


def test_what_is_no_tip_of_main_is_not_built(work: Path) -> None:
    after = commit(work, stages__yaml=STAGES)
    for ref, to in (("refs/heads/main", ZERO), ("refs/tags/main", after), ("refs/heads/dev", after)):
        assert decide(repository(work), ref=ref, after=to, known=set()).commit is None


def test_what_a_push_brought(work: Path) -> None:
    found = repository(work)
    first = commit(work, "one", a="1")
    git("branch", "old", cwd=work)
    second, third = commit(work, "two", b="1"), commit(work, "three", a="2")

    def ids(ref: str, before: str, after: str) -> list[str]:
        return [c.id for c in pushed_commits(found, RefChange(ref, before, after))]

    assert ids("refs/heads/main", first, third) == [second, third]
    assert ids("refs/heads/main", ZERO, third) == [second, third]  # `old` had the first
    assert ids("refs/heads/old", ZERO, first) == [first]
    assert ids("refs/heads/main", first, ZERO) == []
    assert ids("refs/tags/x", ZERO, third) == []


def test_messages_with_odd_characters_do_not_mix_up_commits(work: Path) -> None:
    commit(work, "one", a="1")
    odd = 'tab\tquote"back\\slash <b>\n\nbody\nwith \x1f and lines'
    commit(work, odd, **{"b": "1", "ä ü": "2"})
    newest, oldest = repository(work).commits("refs/heads/main")
    assert newest.message == odd
    assert sorted(newest.added) == ["b", "ä ü"]
    assert (oldest.message, oldest.added) == ("one", ["a"])


def test_the_hook_script_writes_what_was_pushed(tmp_path: Path) -> None:
    root = tmp_path / 'it\'s a $HOME "folder"'
    repositories = Repositories(root / "git", root / "hooks")
    (root / "git").mkdir(parents=True)
    bare = repositories.create("airloom", "x")
    spool = root / "spool"
    spool.mkdir()
    (root / "hooks").mkdir()
    import shlex

    script = root / "hooks" / "post-receive"
    script.write_text(POST_RECEIVE.format(spool=shlex.quote(str(spool))))
    script.chmod(0o755)
    git("init", "--quiet", "-b", "main", "work", cwd=tmp_path)
    sha = commit(tmp_path / "work", a="1")
    git("tag", "-m", "t", "d/ü", cwd=tmp_path / "work")
    git("push", "--quiet", str(bare.path), "main", "d/ü", cwd=tmp_path / "work", REMOTE_USER="ada")
    (path,) = spool.iterdir()
    push = read_push(path.read_text(), path.stem, repositories)
    assert push is not None
    assert path.suffix == ".push"
    assert (push.repository, push.pusher) == (bare, "ada")
    assert RefChange("refs/heads/main", ZERO, sha) in push.changes
    assert {change.ref for change in push.changes} == {"refs/heads/main", "refs/tags/d/ü"}


@pytest.mark.parametrize("text", ["", "end", "x\ny", "/nowhere/x.git\nada\nend\n", "/a\nada\n0 1 refs/heads/x\n"])
def test_a_half_written_event_is_no_push(tmp_path: Path, text: str) -> None:
    assert read_push(text, "e", Repositories(tmp_path, tmp_path)) is None


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "x.git", "x.lock", "a b", "ü", "-x"])
def test_bad_names_of_repositories(tmp_path: Path, name: str) -> None:
    repositories = Repositories(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="name"):
        repositories.create("airloom", name)
    with pytest.raises(NotFoundError):
        repositories.get("airloom", name)


def test_statuses_hooks_and_deliveries_are_kept_once(tmp_path: Path) -> None:
    state = State(tmp_path / "forge.db")
    hook = state.add_hook("airloom/x", url="http://h", content_type="json", secret="s", events="push")
    with pytest.raises(sqlite3.IntegrityError):
        state.add_hook("airloom/x", url="http://h", content_type="json", secret="s", events="push")
    for guid in ("a", "b"):  # the same event, read again after a kill
        state.add_delivery(guid=guid, event="e1", ref="refs/heads/main", hook=hook, payload="{}")
    row = state.next_delivery()
    assert row is not None
    assert (row["guid"], row["secret"], len(state.deliveries("airloom/x"))) == ("a", "s", 1)
    state.postpone_delivery(row["id"], seconds=60, answer="503")
    assert state.next_delivery() is None
    state.end_delivery(row["id"], state="failed", answer="gone")
    assert state.next_due() is None
    state.want_build("x", "1", "ada")
    state.want_build("x", "2", "bob")
    state.build_ended("x", "1")  # the newer wish stays
    wanted = state.wanted_build("x")
    assert wanted is not None
    assert (wanted["commit"], wanted["pusher"]) == ("2", "bob")
    state.build_ended("x", "2")
    assert state.wanted_builds() == []
    assert (tmp_path / "forge.db").stat().st_mode & 0o077 == 0


def test_git_takes_nothing_from_the_callers_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".gitconfig").write_text("[user]\n\tname = Mallory\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_ASKPASS", "/bin/false")
    environment = git_environment({"http.x.extraHeader": "Authorization: y"})
    assert {"HOME", "GIT_DIR", "GIT_ASKPASS"}.isdisjoint(environment)
    assert "127.0.0.1" in environment["no_proxy"]
    assert run_git(("config", "user.name"), check=False).stdout == b""


def test_where_push_events_go(settings: Settings) -> None:
    assert hook_url(settings) == f"http://127.0.0.1:{settings.git_port}/-/hooks/push"


def test_refused_events_are_counted_from_zero() -> None:
    """The first one would be no increase else, and no alert."""
    lines = Metrics().text().decode().splitlines()
    for outcome in ("accepted", "ignored", "unsigned", "forged", "malformed"):
        assert f'airloom_git_push_events_total{{outcome="{outcome}"}} 0.0' in lines
