"""The recipe docs/how-to/bring-your-own-repo.md, followed: from an empty repository to a served model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from airloom.flows.build import find_build
from airloom.hooks.serving import ServingClient
from tests.e2e.conftest import ROOT, Platform


def test_own_repo_is_built_and_its_model_served(platform: Platform, tmp_path: Path) -> None:
    assert "pushes are built" in platform.airloom("repos", "add", "team_model").stdout
    work = platform.clone("team_model", tmp_path / "team_model")
    assert {path.name for path in work.iterdir()} == {".git"}
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    shutil.copytree(ROOT / "gitbucket_repos" / "ds_mlmodeling", work, dirs_exist_ok=True, ignore=ignored)
    network = work / "image_classifier" / "network.py"
    network.write_text(network.read_text().replace("bias=False", "bias=True"))
    git = ["git", "-C", str(work)]
    subprocess.run([*git, "checkout", "-q", "-B", "main"], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    commit = platform.push(work, "Train our own network")
    platform.wait_for("the build", lambda: find_build(platform.hooks, "team_model", commit))

    config = yaml.safe_load(platform.config.read_text())
    config["name"] = "team_digits"
    for stage in ("train", "evaluate"):
        config["stages"][stage]["repo"] = "team_model"
    platform.config.with_name("team_digits.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    platform.airloom("check")
    platform.wait_for("the DAG", lambda: "team_digits" in {dag["dag_id"] for dag in platform.hooks.airflow.dags()})
    summary = json.loads(platform.airloom("run", "team_digits", "--json").stdout)
    assert (summary["state"], summary["verdict"]) == ("success", "promoted"), summary
    store = platform.hooks.store
    picture = store.get_bytes("raw", next(iter(store.list("raw", "digits/3/"))).key)
    with ServingClient(platform.hooks.gateway.model_url("team_digits")) as client:
        assert client.predict(picture, "image/png").body["label"] == "3"
    listed = json.loads(platform.airloom("repos", "list", "--json").stdout)["repos"]
    assert {row["name"]: row["pipelines"] for row in listed}["team_model"] == ["team_digits"]


@pytest.mark.parametrize("name", ["Team", "-x", "a b", "", "../x", "x" * 101])
def test_what_is_no_name_is_refused(platform: Platform, name: str) -> None:
    refused = platform.airloom("repos", "add", "--", name, check=False)
    assert refused.returncode != 0
    assert "is no name for a stage repo" in refused.stderr
