"""What `airloom lineage` and `airloom models` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from airloom.cli.main import app
from airloom.errors import NotFoundError
from airloom.flows.lineage import Lineage, LineageNode
from airloom.flows.lineage_subject import Kind
from airloom.hooks.connect import Hooks
from airloom.hooks.mlflow import ModelRegistry, ModelVersionInfo
from tests.fixtures.services import free_port

COMMIT = LineageNode(kind=Kind.COMMIT, title="de_data@" + "a" * 40, detail="Fix [bold]it[/]", url="http://git/x")
RUN = LineageNode(kind=Kind.RUN, title="run-1", next=[COMMIT])
FOUND = Lineage(
    subject=LineageNode(kind=Kind.RELEASE, title="digits-1.0.0", url="s3://airloom/x"),
    came_from=[RUN, RUN.model_copy(update={"repeated": True, "next": []})],
    led_to=[],
    notes=["MLflow could not be asked: it [sleeps]"],
)


def asked(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    subjects: list[str] = []

    def walk(_: Hooks, subject: str) -> Lineage:
        subjects.append(subject)
        if subject == "nobody":
            raise NotFoundError("nobody knows", hint="ask another")
        return FOUND

    monkeypatch.setattr("airloom.flows.lineage.lineage", walk)
    return subjects


def test_a_tree_for_people(found: list[str]) -> None:
    result = asked("lineage", "digits-1.0.0")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "release digits-1.0.0"
    assert lines[1].endswith("came from")
    assert any("de_data@" + "a" * 40 in line and "Fix [bold]it[/]" in line for line in lines)
    assert any("run-1" in line and "(see above)" in line for line in lines)
    assert "led to" not in result.stdout
    assert "not everything is shown: MLflow could not be asked: it [sleeps]" in result.stdout
    assert found == ["digits-1.0.0"]


def test_json_for_machines(found: list[str]) -> None:
    result = asked("lineage", "digits-1.0.0", "--json")
    assert Lineage.model_validate(json.loads(result.stdout)) == FOUND


def test_what_nobody_knows_ends_with_its_exit_code(found: list[str]) -> None:
    result = asked("lineage", "nobody")
    assert result.exit_code == NotFoundError.exit_code
    assert "nobody knows\n  -> ask another" in result.stderr


def test_models_are_listed_with_verdict_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"airloom.gate": "promoted", "airloom.metrics": '{"accuracy": 0.95}', "airloom.data_tag": "digits/CV_x"}
    version = ModelVersionInfo("digits", "3", "r", "models:/m-1", tags, ("candidate", "champion"))
    bare = ModelVersionInfo("digits", "2", "r", "models:/m-2", {}, ())

    def versions(_: ModelRegistry, name: str | None = None) -> list[ModelVersionInfo]:
        return [version, bare] if name in {None, "digits"} else []

    monkeypatch.setattr(ModelRegistry, "versions", versions)
    shown = asked("models").stdout
    for part in ("digits/3", "candidate, champion", "promoted", "accuracy 0.95", "digits/CV_x", "digits/2"):
        assert part in shown
    rows = json.loads(asked("models", "digits", "--json").stdout)
    assert [row["metrics"] for row in rows] == [{"accuracy": 0.95}, {}]
    missing = asked("models", "faces")
    assert missing.exit_code == NotFoundError.exit_code
    assert "'faces'" in missing.stderr


def test_mlflow_down_is_told_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("airloom.cli.lineage._PATIENCE_SECONDS", 0.1)
    port = free_port()
    registry = ModelRegistry(url=f"http://127.0.0.1:{port}", home=tmp_path)
    monkeypatch.setattr(ModelRegistry, "from_settings", lambda _: registry)
    result = asked("models")
    assert result.exit_code == 6
    assert f"127.0.0.1:{port} does not answer" in result.stderr
