"""The builder's queue, with real child processes that stand for `airloom build`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from airloom.embedded.builder import Builder, build_command
from airloom.embedded.forge.repositories import Repositories
from airloom.embedded.forge.state import State
from airloom.settings import Settings

# Notes its start, waits until it may go on, notes its end.
CHILD = """
import sys, time, pathlib
folder, repo, commit = sys.argv[1:4]
log = pathlib.Path(folder) / "log"
def note(word):
    with log.open("a") as file:
        file.write(f"{word} {repo} {commit}\\n")
note("start")
while not (pathlib.Path(folder) / "go").exists():
    time.sleep(0.01)
note("end")
sys.exit(1 if commit.startswith("bad") else 0)
"""


class Bench:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder = folder
        self.state = State(folder / "forge.db")
        self.ended: list[str] = []
        self.builder = self.make(settings)
        self.settings = settings

    def make(self, settings: Settings) -> Builder:
        def command(repo: str, commit: str, pusher: str) -> list[str]:
            return [sys.executable, "-I", "-S", "-c", CHILD, str(self.folder), repo, commit]

        return Builder(
            settings,
            Repositories(self.folder, self.folder),
            self.state,
            on_event=lambda outcome: None,
            on_build=self.ended.append,
            command=command,
        )

    def lines(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def wait(self, found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not found():
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.02)

    def let_go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def bench(settings: Settings, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(settings, tmp_path)
    yield bench
    bench.builder.stop()


def test_of_many_that_wait_the_newest_is_built(bench: Bench) -> None:
    bench.builder.want("x", "first", "ada")
    bench.wait(lambda: bench.lines() == ["start x first"])
    for number in range(20):
        bench.builder.want("x", f"later{number}", "ada")
    bench.let_go()
    bench.wait(lambda: len(bench.ended) == 2)
    assert bench.lines() == ["start x first", "end x first", "start x later19", "end x later19"]
    bench.wait(lambda: bench.state.wanted_builds() == [])


def test_repos_are_built_side_by_side(bench: Bench) -> None:
    bench.builder.want("x", "1", "ada")
    bench.builder.want("y", "2", "ada")
    bench.wait(lambda: set(bench.lines()) == {"start x 1", "start y 2"})
    bench.let_go()
    bench.wait(lambda: bench.ended == ["success", "success"])
    assert sorted(bench.lines()) == ["end x 1", "end y 2", "start x 1", "start y 2"]


def test_a_build_that_dies_without_a_word_is_explained(bench: Bench) -> None:
    bench.let_go()
    bench.builder.want("x", "bad1", "ada")
    bench.wait(lambda: bench.ended == ["failure"])
    (status,) = bench.state.statuses("airloom/x", "bad1")
    assert status["state"] == "error"
    assert "exit code 1" in status["description"]
    assert status["target_url"] == f"{bench.settings.git_page_url}/airloom/x/builds/bad1"
    bench.builder.want("x", "good", "ada")  # the next one works
    bench.wait(lambda: bench.ended == ["failure", "success"])


def test_its_own_word_is_kept(bench: Bench) -> None:
    bench.let_go()
    said = {"context": "airloom/build", "target_url": None, "creator": "airloom"}
    bench.state.set_status("airloom/x", "bad2", state="failure", description="a test failed", **said)
    bench.builder.want("x", "bad2", "ada")
    bench.wait(lambda: bench.ended == ["failure"])
    assert [row["description"] for row in bench.state.statuses("airloom/x", "bad2")] == ["a test failed"]


def test_a_stop_ends_builds_and_a_start_takes_them_up(bench: Bench) -> None:
    bench.builder.want("x", "1", "ada")
    bench.wait(lambda: bench.lines() == ["start x 1"])
    bench.builder.stop()
    assert bench.ended == []
    assert [row["commit"] for row in bench.state.wanted_builds()] == ["1"]
    bench.let_go()
    bench.builder = bench.make(bench.settings)
    bench.builder.start()
    bench.wait(lambda: bench.ended == ["success"])
    assert bench.lines() == ["start x 1", "start x 1", "end x 1"]


def test_the_command_is_the_one_that_people_run() -> None:
    assert build_command("x", "1f", "ada b")[3:] == ["build", "x@1f", "--once", "--pusher", "ada b"]
