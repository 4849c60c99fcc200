"""Links that people follow lead to addresses of this machine, in the stack too, where programs use other ones."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, PackageLoader

from airloom.airflow_pages.monitoring import addresses
from airloom.flows.commit_report import report_result
from airloom.hooks.connect import Hooks
from airloom.hooks.gitbucket import GitBucket
from airloom.hooks.prediction_log import Prediction
from airloom.operators import links
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.plans import make_data_version, make_plan

STACK = {
    "bind_host": "0.0.0.0",
    "airflow_url": "http://airflow-api-server:8080",
    "git_url": "http://git:8081",
    "mlflow_url": "http://mlflow:5000",
    "airflow_public_url": "http://data.example:18080",
    "git_public_url": "http://data.example:18081",
    "mlflow_public_url": "http://data.example:15000",
}


@pytest.fixture
def inside(tmp_path: Path) -> Settings:
    """The settings of a container of the stack."""
    return make_settings(tmp_path / "home", **STACK)


def test_buttons_of_tasks(inside: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: dict[str, Any] = {"version": {"repo": "de_data", "tag": "digits/CV_x_DV_y"}, None: {}}
    monkeypatch.setattr(links, "get_settings", lambda: inside)
    monkeypatch.setattr(links, "_returned", lambda ti_key, task_id=None: returned[task_id])
    key: Any = type("Key", (), {"dag_id": "digits", "run_id": "manual__1", "task_id": "verify"})
    operator: Any = None
    assert links.RunPageLink().get_link(operator, ti_key=key) == (
        "http://data.example:18080/airloom/runs/digits/manual__1"
    )
    assert links.VersionTagLink().get_link(operator, ti_key=key) == (
        "http://data.example:18081/airloom/de_data/tree/digits/CV_x_DV_y"
    )
    assert links.ReceiptLink().get_link(operator, ti_key=key) == "http://data.example:18080/airloom/receipts"
    returned[None] = {"sample_prediction_ids": ["digits-1.0.0-abc", "digits-1.0.0-def"]}
    assert links.ReceiptLink().get_link(operator, ti_key=key) == (
        "http://data.example:18080/airloom/receipts/digits-1.0.0-abc"
    )


def test_hooks_and_dashboards(inside: Settings) -> None:
    hooks = Hooks(inside)
    assert hooks.gitbucket.commit_url("one", "a" * 40).startswith("http://data.example:18081/airloom/one/commit/")
    assert hooks.mlflow.version_url("digits", "3") == "http://data.example:15000/#/models/digits/versions/3"
    assert hooks.airflow.run_url("digits", "r") == "http://data.example:18080/dags/digits/runs/r"
    assert hooks.airflow.url == "http://airflow-api-server:8080", "programs go on using this one"
    assert addresses(inside) == {
        "airflow": "http://data.example:18080",
        "git": "http://data.example:18081",
        "mlflow": "http://data.example:15000",
    }


def test_statuses_of_commits(inside: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[str] = []
    monkeypatch.setattr(GitBucket, "set_status", lambda *_, target_url, **__: targets.append(target_url))
    report_result(Hooks(inside), make_plan(), make_data_version())
    (target,) = targets
    assert target.startswith("http://data.example:18081/airloom/")


@pytest.mark.parametrize(
    ("bind", "public", "host"),
    [
        ("127.0.0.1", "", "127.0.0.1"),
        ("0.0.0.0", "", "localhost"),
        ("10.0.0.7", "", "10.0.0.7"),
        ("0.0.0.0", "data.example", "data.example"),
    ],
)
def test_this_machine_in_links(tmp_path: Path, bind: str, public: str, host: str) -> None:
    settings = make_settings(tmp_path, bind_host=bind, public_host=public)
    assert settings.airflow_page_url == f"http://{host}:{settings.airflow_port}"
    assert settings.git_page_url == f"http://{host}:{settings.git_port}"
    assert settings.mlflow_page_url == f"http://{host}:{settings.mlflow_port}"


def test_latest_predictions_lead_to_their_receipts() -> None:
    one = Prediction(
        id="digits-1.0.0-abc",
        pipeline="digits",
        release="1.0.0",
        answered_at=datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp(),
        latency_ms=1.5,
        input_sha256="a" * 64,
        output={"class": "<7>"},
        batch_size=1,
        batch_index=0,
    )
    templates = Environment(loader=PackageLoader("airloom.airflow_pages"), autoescape=True)
    templates.filters["time"] = str
    html = templates.get_template("receipts.html").render(latest={"digits": [one], "quiet": []}, airflow_url="")
    assert 'href="/airloom/receipts/digits-1.0.0-abc"' in html
    assert "<7>" not in html
    assert "Nothing has been asked yet." in html
