"""What a command loads before it does anything: that is how long a person waits for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from airloom.cli.main import COMMAND_MODULES, app

OF_TYPER = {"annotated_doc", "shellingham"}
OWN = {
    *("airloom.cli", "airloom.errors", "airloom.cli.main", "airloom.cli.output"),
    *(f"airloom.cli.{name}" for name in COMMAND_MODULES),
}
LOADED = """
import sys
before = set(sys.modules)
from airloom.cli.main import main
sys.argv[0] = "airloom"
try:
    main()
finally:
    print("\\nloaded:", *sorted(set(sys.modules) - before))
"""


def loaded_by(*arguments: str) -> set[str]:
    """Modules that a command loads in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()[-1]
    assert said.startswith("loaded: ")
    return set(said.removeprefix("loaded: ").split())


def own_of(modules: set[str]) -> set[str]:
    return {name for name in modules if name.startswith("airloom.")}


def test_help_loads_typer_and_the_commands_alone() -> None:
    modules = loaded_by("--help")
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert packages - OF_TYPER == {"airloom", "typer"}
    assert own_of(modules) == OWN
    assert not modules & {"asyncio", "http.client", "importlib.metadata", "sqlite3", "ssl", "urllib.request"}


@pytest.mark.parametrize("command", ["run", "receipt", "pushes", "up"])
def test_help_of_a_command_loads_nothing_of_what_it_does(command: str) -> None:
    modules = loaded_by(command, "--help")
    assert not modules & {"rich", "pydantic_settings", "requests", "httpx", "sqlalchemy", "yaml", "airflow", "docker"}
    assert own_of(modules) == OWN


def test_help_names_every_command_with_a_whole_sentence() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    commands = shown.partition("Commands:\n")[2]
    names = [line.split()[0] for line in commands.splitlines() if line[2:3].strip()]
    assert {"up", "run", "receipt", "demo", "pushes"} <= set(names)
    assert "..." not in commands
    assert "the exit code says whether it is the same." in " ".join(commands.split())


@pytest.mark.parametrize(("group", "code"), [("images", 2), ("repos", 2)])
def test_a_group_without_a_command_shows_its_help(group: str, code: int) -> None:
    done = CliRunner().invoke(app, [group])
    assert done.exit_code == code
    assert "Commands:" in done.output
