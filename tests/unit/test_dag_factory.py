"""Every DAG of dags/ by Airflow's own parser: what is built, what policy asks, and what a wrong YAML does."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from airloom.errors import ConfigError
from airloom.settings import get_settings
from tests.conftest import ROOT

TASKS = ["resolve", "preprocess", "validate", "version", "train", "evaluate", "gate", "release", "deploy", "verify"]
HEAVY = ("torch", "docker", "dvc", "mlflow", "git", "minio")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of dags/ that a test may change."""
    shutil.copytree(ROOT / "dags", tmp_path / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("AIRLOOM_PROJECT", str(tmp_path))
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


def bag_of(project: Path) -> Any:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(dag_folder=str(project / "dags"), bundle_path=project / "dags", bundle_name="airloom")


def add_config(project: Path, name: str, *, old: str = "", new: str = "") -> Path:
    """A copy of digits.yaml under another name, with one change."""
    text = (ROOT / "dags/configs/digits.yaml").read_text().replace("name: digits", f"name: {name}")
    assert old in text
    path = project / "dags/configs" / f"{name}.yaml"
    path.write_text(text.replace(old, new, 1) if old else text)
    return path


def test_every_dag_of_this_repository_imports(project: Path) -> None:
    bag = bag_of(project)
    assert bag.import_errors == {}
    pipelines = [path.stem for path in (ROOT / "dags/configs").glob("*.yaml")]
    assert sorted(bag.dags) == sorted([*pipelines, "airloom__reconcile"])


def test_policy(project: Path) -> None:
    dags = bag_of(project).dags
    assert dags
    for dag in dags.values():
        assert dag.doc_md, dag.dag_id
        assert dag.description, dag.dag_id
        assert not dag.catchup
        if dag.dag_id != "airloom__reconcile":
            assert "airloom" in dag.tags, dag.dag_id
            assert dag.max_active_runs >= 2, "two runs at once must work"
        for task in dag.tasks:
            where = f"{dag.dag_id}.{task.task_id}"
            assert task.owner not in {"", "airflow"}, where
            assert task.doc_md, where
            assert task.retries >= 1, where
            assert task.retry_delay <= timedelta(minutes=1), where
            assert task.execution_timeout is not None, where


def test_tasks_form_one_chain(project: Path) -> None:
    dag = bag_of(project).dags["digits"]
    assert [task.task_id for task in dag.topological_sort()] == TASKS
    for earlier, later in itertools.pairwise(TASKS):
        assert dag.get_task(later).upstream_task_ids == {earlier}


def test_limits_come_from_the_configuration(project: Path) -> None:
    add_config(project, "patient", old="timeout: 30m", new="timeout: 2h")
    train = bag_of(project).dags["patient"].get_task("train")
    assert timedelta(hours=2) < train.execution_timeout <= timedelta(hours=2, minutes=10)


def test_documentation_names_stages_and_thresholds(project: Path) -> None:
    add_config(project, "told", old="steps: [10, 50, 100]", new="steps: [7, 100]")
    text = bag_of(project).dags["told"].doc_md
    assert "| train | `ds_mlmodeling` | 2 | 3 GiB | 1800 s |" in text
    assert "- `accuracy` at least 0." in text
    assert "7 % → 100 %" in text


def test_approval_is_a_task_only_where_it_is_asked_for(project: Path) -> None:
    add_config(project, "careful", old="approval: false", new="approval: true")
    bag = bag_of(project)
    assert bag.import_errors == {}
    assert "approve" not in bag.dags["digits"].task_ids
    assert bag.dags["careful"].get_task("approve").upstream_task_ids == {"gate"}
    assert bag.dags["careful"].get_task("release").upstream_task_ids == {"approve"}


def test_a_new_build_of_any_repo_starts_the_pipeline(project: Path) -> None:
    from airloom.contract.assets import stage_asset

    condition = bag_of(project).dags["digits"].timetable.asset_condition
    uris = {asset.uri for asset in condition.objects}
    assert uris == {stage_asset(repo) for repo in ("de_datapreprocessing", "ds_mlmodeling", "ds_modelserving")}


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"commits": {"ds_mlmodeling": "main"}, "force": True}, True),
        ({"reproduce": "digits/CV_first_3f2a91c0_DV_20261121T041200000Z"}, True),
        ({"reproduce": None}, True),
        ({"commits": {"no_such_repo": "main"}}, False),
        ({"commits": {"ds_mlmodeling": ""}}, False),
        ({"commits": ["ds_mlmodeling"]}, False),
        ({"force": "yes"}, False),
        ({"reproduce": 7}, False),
    ],
)
def test_parameters_follow_a_schema(project: Path, given: dict[str, Any], right: bool) -> None:
    from airflow.sdk.exceptions import ParamValidationError

    params = bag_of(project).dags["digits"].params

    def use() -> None:
        params.update(given)
        params.validate()

    if right:
        use()
    else:
        with pytest.raises((ParamValidationError, ValueError)):
            use()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "memory: 3GiB",
            "memory: lots",
            "stages.train.resources.memory: expected a size such as 512MiB",
        ),
        (
            "runner: process",
            "runner: rocket",
            "broken.yaml:8: runner: Input should be 'process' or 'docker'",
        ),
        ("owner: ds-team", "owners: ds-team", "owners: no such key"),
        ("owner: ds-team", "owner: [", "broken.yaml:"),
    ],
)
def test_an_invalid_yaml_is_an_import_error_that_names_the_place(
    project: Path, old: str, new: str, expected: str
) -> None:
    add_config(project, "broken", old=old, new=new)
    bag = bag_of(project)
    assert list(bag.import_errors) == ["check_configs.py"], "the file that holds the valid DAGs must stay clean"
    assert expected in bag.import_errors["check_configs.py"]
    assert "broken" not in bag.dags
    assert "digits" in bag.dags


def test_all_invalid_yamls_are_listed_at_once(project: Path) -> None:
    from airloom.dag_factory import check_configs

    add_config(project, "one", old="runner: process", new="runner: rocket")
    add_config(project, "two", old="owner: ds-team", new="owner: ''")
    with pytest.raises(ConfigError, match=r"(?s)2 invalid.*one\.yaml:8.*two\.yaml:5"):
        check_configs()


def test_a_task_that_starts_builds_its_own_dag_only(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from airloom.dag_factory import pipeline_dags

    add_config(project, "other")
    assert {dag.dag_id for dag in pipeline_dags()} == {"digits", "other"}
    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_DAG_ID", "other")
    assert [dag.dag_id for dag in pipeline_dags()] == ["other"]


def test_the_reconciler_runs_alone_and_now_and_then(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dag = bag_of(project).dags["airloom__reconcile"]
    assert (dag.max_active_runs, dag.is_paused_upon_creation, dag.catchup) == (1, False, False)
    assert dag.timetable.expression == "*/5 * * * *"
    assert "airloom" not in dag.tags, "the ledger would take it for a pipeline"
    monkeypatch.setenv("AIRLOOM_RECONCILE_MINUTES", "0")
    get_settings.cache_clear()
    assert bag_of(project).dags["airloom__reconcile"].timetable.can_be_scheduled is False


def test_a_task_that_starts_builds_only_the_dag_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from airloom.dag_factory import pipeline_dags, reconcile_dag

    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_DAG_ID", "airloom__reconcile")
    assert pipeline_dags() == []
    assert reconcile_dag() is not None
    monkeypatch.setenv("_AIRFLOW_PARSING_CONTEXT_DAG_ID", "digits")
    assert reconcile_dag() is None


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys; "
        "runpy.run_path('dags/pipelines.py'); runpy.run_path('dags/check_configs.py'); "
        "runpy.run_path('dags/reconcile.py'); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
