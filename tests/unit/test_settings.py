"""Settings as files give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from airloom.errors import ConfigError
from airloom.settings import Settings, get_settings
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the documented settings."""
    (tmp_path / "dags" / "configs").mkdir(parents=True)
    (tmp_path / ".env").write_text((ROOT / ".env").read_text())
    monkeypatch.setenv("AIRLOOM_PROJECT", str(tmp_path))
    return tmp_path


def read() -> Settings:
    """Without the memory of the process."""
    return get_settings.__wrapped__()


def test_local_file_goes_before_the_documented_one(project: Path) -> None:
    (project / ".env.local").write_text("AIRLOOM_STAGE_SLOTS=9\nAIRLOOM_UID=4242\nREDIS_IMAGE=redis:7.2.1\n")
    assert read().stage_slots == 9


@pytest.mark.parametrize(
    ("line", "hint"),
    [("AIRLOOM_REGISTY=localhost:5050", "AIRLOOM_REGISTRY"), ("AIRLOOM_QQQ=1", ".env lists them")],
)
def test_a_misspelt_name_is_no_setting(project: Path, line: str, hint: str) -> None:
    (project / ".env.local").write_text(f"AIRLOOM_STAGE_SLOTS=9\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read()
    assert f"{project / '.env.local'}: {line.partition('=')[0]} is no setting" in str(caught.value)
    assert hint in str(caught.value)


def test_a_wrong_value_is_named(project: Path) -> None:
    (project / ".env.local").write_text("AIRLOOM_STAGE_SLOTS=many\n")
    with pytest.raises(ConfigError, match=r"AIRLOOM_STAGE_SLOTS: .*found 'many'"):
        read()


@pytest.mark.parametrize("name", ["ask?", "a$HOME", "a:b"])
def test_a_folder_whose_name_means_something_else_to_others_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name / "dags" / "configs").mkdir(parents=True)
    monkeypatch.setenv("AIRLOOM_PROJECT", str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"AIRLOOM_PROJECT: .*use another folder"):
        read()


def test_a_folder_of_any_other_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Ü's 100 % #1 [x]"
    (folder / "dags" / "configs").mkdir(parents=True)
    monkeypatch.setenv("AIRLOOM_PROJECT", str(folder))
    assert read().home_dir == folder / ".airloom"


def test_what_another_engine_builds_needs_a_registry_to_get_here(project: Path) -> None:
    (project / ".env.local").write_text("AIRLOOM_BUILD_HOST=tcp://builder:2376\n")
    with pytest.raises(ConfigError, match=r"AIRLOOM_BUILD_HOST: .*by AIRLOOM_REGISTRY, which is empty"):
        read()
    (project / ".env.local").write_text("AIRLOOM_BUILD_HOST=tcp://builder:2376\nAIRLOOM_REGISTRY=127.0.0.1:5050\n")
    assert read().build_host == "tcp://builder:2376"
