"""Recipes of docs/how-to, followed: a repo of one's own to its served model, and a pipeline of one's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from airloom.embedded.seed import digits
from airloom.flows.build import find_build
from tests.e2e.actions import wait_for_build
from tests.e2e.conftest import ROOT, Platform
from tests.fixtures.git import git

ME = {"NAME": "Ada", "EMAIL": "ada@example.org"}
RECIPES = ROOT / "docs" / "how-to"


def steps(platform: Platform, recipe: str) -> list[str]:
    """A recipe's commands, one text for each step, with the ports of this platform."""
    _, *found = re.split(r"(?m)^\d\. ", (RECIPES / recipe).read_text())
    settings = platform.settings
    ports = {"8081": settings.git_port, "8000": settings.gateway_port, "9000": settings.s3_port}
    texts = []
    for step in found:
        text = "\n".join(re.findall(r"(?m)^ {7}(.*)$", step))
        for documented, port in ports.items():
            text = text.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{port}")
        texts.append(text)
    return texts


def follow(platform: Platform, commands: str) -> str:
    """Type commands into a shell in the project's folder, and the password where git asks for it; what they print."""
    password = platform.project.parent / "askpass"
    password.write_text('#!/bin/sh\ncat "$SECRETS/git_password"\n')
    password.chmod(0o755)
    person = {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in ME.items()}
    environment = {
        **platform.env,
        **person,
        "GIT_ASKPASS": str(password),
        "SECRETS": str(platform.settings.secrets_dir),
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands],
        cwd=platform.project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def installed(platform: Platform) -> None:
    """The folder of programs that the recipes name."""
    (platform.project / ".venv").symlink_to(Path(sys.executable).parents[1])


def pipelines_of(platform: Platform, repo: str) -> list[str]:
    listed = json.loads(platform.airloom("repos", "list", "--json").stdout)["repos"]
    pipelines: list[str] = {row["name"]: row["pipelines"] for row in listed}[repo]
    return pipelines


def wait_for_dag(platform: Platform, name: str) -> None:
    airflow = platform.hooks.airflow
    platform.wait_for(
        f"the DAG {name}", lambda: name in {dag["dag_id"] for dag in airflow.dags()}, evidence=airflow.import_errors
    )


def test_a_pipeline_is_added_and_gets_a_stage_repo_of_its_own(platform: Platform) -> None:
    """All but its run, which the recipe of a repo leads to: its data are too few."""
    for number, (_, content) in enumerate(islice(digits(), 20)):
        file = platform.project / "letters" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    data, config, check, run, make, provision, build, name = steps(platform, "add-a-pipeline.md")
    assert "airloom run letters" in run
    follow(platform, "\n".join((data, config, check)))
    written = platform.project / "dags" / "configs" / "letters.yaml"
    try:
        assert len(list(platform.hooks.store.list("raw", "letters/a/"))) == 10
        wait_for_dag(platform, "letters")
        follow(platform, "\n".join((make, provision, build, name)))
        head = platform.hooks.git.head("de_letters")
        assert find_build(platform.hooks, "de_letters", head) is not None
        assert pipelines_of(platform, "de_letters") == ["letters"]
        # One that was read while it was written is read again.
        errors = platform.hooks.airflow.import_errors
        platform.wait_for("the end of all import errors", lambda: not errors(), evidence=errors)
    finally:
        written.unlink(missing_ok=True)


def test_the_recipe_leads_from_an_empty_repository_to_a_served_model(platform: Platform) -> None:
    # What tests and editors leave there is not pushed.
    left = platform.project / "gitbucket_repos" / "ds_mlmodeling" / "modeling" / "__pycache__"
    left.mkdir(exist_ok=True)
    (left / "left.pyc").touch()
    make, fill, push, name, run = steps(platform, "bring-your-own-repo.md")
    assert "airloom repos add team_model" in make
    follow(platform, "\n".join((make, fill, push, name)))
    work = platform.project / "team_model"
    commit = git("rev-parse", "HEAD", cwd=work).stdout.strip()
    record = wait_for_build(platform, "team_model", commit)
    assert record.commit == platform.hooks.git.head("team_model")
    files = git("ls-files", cwd=work).stdout.split()
    assert "image_classifier/network.py" in files
    assert not [file for file in files if "cache" in file]
    wait_for_dag(platform, "team_digits")
    answer = json.loads(follow(platform, run).strip().splitlines()[-1])
    assert answer["label"] == next(digits())[0].split("/")[-2]
    assert pipelines_of(platform, "team_model") == ["team_digits"]


@pytest.mark.parametrize("name", ["Team", "-x", "a b", "", "../x", "x" * 101])
def test_what_is_no_name_is_refused(platform: Platform, name: str) -> None:
    refused = platform.airloom("repos", "add", "--", name, check=False)
    assert refused.returncode != 0
    assert "is no name for a stage repo" in refused.stderr
