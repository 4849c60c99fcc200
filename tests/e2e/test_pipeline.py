"""What a person does with a finished run, and runs of every kind: cached, forced, two at once, on bad data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from PIL import Image

from airloom.contract import DataCard, DataVersion, GateDecision, RunPlan, sha256_tree
from airloom.contract.card import REJECTED_FILE
from airloom.contract.plan import safe_run_id
from airloom.flows.deployments import TOLERANCE, reference_rows
from airloom.flows.release import release_of, releases
from airloom.hooks.serving import ServingClient
from tests.e2e.actions import RAW, STAGES, caches, picture, predicted
from tests.e2e.conftest import AIRLOOM, ROOT, Platform

DECISIONS = ("resolve", "validate", "version", "gate", "release", "deploy", "verify")


def data_version(platform: Platform, summary: dict[str, Any]) -> DataVersion:
    return DataVersion.model_validate(platform.returned(summary["run_id"], "version"))


def tags(platform: Platform) -> list[str]:
    return [tag.name for tag in platform.hooks.git.list_tags("de_datapreprocessing", "digits/")]


def model_versions(platform: Platform) -> list[str]:
    return sorted(version.version for version in platform.hooks.mlflow.versions("digits"))


def numbers(platform: Platform) -> list[str]:
    return [release.version for release in releases(platform.hooks, "digits")]


def cells(said: str, columns: int) -> list[list[str]]:
    """The rows of printed tables with so many columns."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    return [row for row in rows if len(row) == columns]


# The first run


def test_make_demo_is_the_command_that_made_the_first_run() -> None:
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == ".venv/bin/airloom demo"


def test_demo_tells_what_its_run_led_to(platform: Platform) -> None:
    run_id = platform.first["run_id"]
    plan = RunPlan.model_validate(platform.returned(run_id, "resolve"))
    version = data_version(platform, platform.first)
    decision = GateDecision.model_validate(platform.returned(run_id, "gate"))
    told = dict(cells(platform.demo_said, 2))
    assert len(plan.code) == 3
    for repo, pin in plan.code.items():
        assert told[f"code version of {repo}"].startswith(pin.commit[:12])
    assert told["data version"].startswith(f"{version.md5}, {version.files} files, ")
    assert (told["version tag"], told["Airflow run"], told["MLflow run"]) == (
        version.tag,
        run_id,
        decision.mlflow_run_id,
    )
    assert "accuracy" in decision.metrics
    for name, value in decision.metrics.items():
        assert told[f"metric {name}"] == f"{value:.4f}"
    assert (told["gate"], told["release"]) == ("promoted", "1.0.0, model digits/1")
    assert told["served at"] == platform.hooks.gateway.model_url("digits") + "/predict"
    settings = platform.settings
    addresses = {row[2] for row in cells(platform.demo_said, 4)}
    for port in (settings.airflow_port, settings.git_port, settings.mlflow_port, settings.s3_port):
        assert [address for address in addresses if f":{port}" in address], f"no address with port {port}"


def test_demo_draws_what_the_served_model_answers(platform: Platform) -> None:
    path = platform.settings.home_dir / "demo" / "predictions.png"
    assert f"Predictions, as served:      {path}" in platform.demo_said.splitlines()
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert (1000 <= picture.width <= 2000, 300 <= picture.height <= 1000) == (True, True), picture.size
        shades = picture.convert("L").getcolors()
    assert shades is not None
    assert len(shades) > 100, "next to nothing is drawn"
    (asked,) = re.findall(r"airloom receipt (\S+)", platform.demo_said)
    assert json.loads(platform.airloom("receipt", asked, "--json").stdout)["release"]["version"] == "1.0.0"


def test_first_run_leaves_a_tag_a_champion_and_a_release_that_answers(platform: Platform) -> None:
    assert {task["task"] for task in platform.first["tasks"]} == {*STAGES, *DECISIONS}
    assert caches(platform.first) == dict.fromkeys(STAGES, "miss"), platform.first
    assert platform.first["verdict"] == "promoted", platform.first

    version = data_version(platform, platform.first)
    tag = platform.hooks.git.read_tag("de_datapreprocessing", version.tag)
    said = json.loads(tag.message)
    assert (said["run_id"], said["md5"], said["digest"]) == (platform.first["run_id"], version.md5, version.digest)
    assert sum(said["rows"].values()) == 5000

    first = release_of(platform.hooks, "digits", "1.0.0")
    assert (first.run_id, first.model_version, first.data_tag) == (platform.first["run_id"], "1", version.tag)
    now = release_of(platform.hooks, "digits", platform.deployed() or "")
    champion = platform.hooks.mlflow.alias("digits", "champion")
    assert champion is not None
    assert champion.version == now.model_version


def test_gateway_gives_the_answers_of_the_evaluation(platform: Platform) -> None:
    release = release_of(platform.hooks, "digits", platform.deployed() or "")
    rows = reference_rows(platform.hooks, release)
    assert len(rows) >= 5
    with ServingClient(platform.hooks.gateway.model_url("digits")) as client:
        for row in rows:
            body = client.predict(row.content, row.media_type).body
            assert body["release"] == release.version
            assert body["label"] == row.output["label"]
            assert body["probabilities"] == pytest.approx(row.output["probabilities"], abs=TOLERANCE)


def test_receipt_and_replay_of_a_prediction(platform: Platform) -> None:
    answer = predicted(platform)

    def noted() -> str | None:  # it reaches the prediction log a moment after its client
        done = platform.airloom("receipt", answer["id"], "--json", check=False)
        return None if done.returncode else done.stdout

    receipt = json.loads(platform.wait_for(f"the receipt of {answer['id']}", noted, 60))
    release = release_of(platform.hooks, "digits", answer["release"])
    assert receipt["release"] == release.model_dump(mode="json")
    assert receipt["output"]["label"] == answer["label"]
    heads = {repo: platform.hooks.git.commit(repo, sha).commit for repo, sha in receipt["release"]["lineage"].items()}
    assert heads == receipt["release"]["lineage"]
    assert set(heads) == {"de_datapreprocessing", "ds_mlmodeling", "ds_modelserving"}
    platform.hooks.git.read_tag("de_datapreprocessing", receipt["release"]["data_tag"])

    done = subprocess.run(
        [sys.executable, "-X", "importtime", AIRLOOM, "receipt", answer["id"]],
        cwd=platform.project,
        env=platform.env,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    for part in (release.run_id, release.data_tag, release.model_uri, *heads.values()):
        assert part in done.stdout
    # A receipt is there at once: nothing is loaded for it that takes long.
    imported = {line.split("|")[2].split(".")[0].strip() for line in done.stderr.splitlines() if line.count("|") == 2}
    assert {"airloom", "typer"} <= imported
    assert not imported & {"airflow", "docker", "dvc", "fastapi", "git", "mlflow", "numpy", "pandas", "PIL", "torch"}

    replayed = json.loads(platform.airloom("replay", answer["id"], "--json").stdout)
    assert replayed["same"], replayed["differences"]
    assert replayed["repeated"]["label"] == answer["label"]
    assert platform.airloom("receipt", answer["id"][:-1] + "!", check=False).returncode != 0


def test_lineage_from_each_end_names_the_others(platform: Platform) -> None:
    first = release_of(platform.hooks, "digits", "1.0.0")
    names = {first.data_tag, first.run_id, "digits/1", "digits-1.0.0"}
    for subject in sorted(names):
        shown = platform.airloom("lineage", subject).stdout
        missing = [name for name in names if name not in shown]
        assert not missing, f"lineage {subject} does not name {missing}\n{shown}"
        assert "not everything is shown" not in shown


def test_every_address_for_metrics_gives_prometheus_text(platform: Platform) -> None:
    settings = platform.settings
    serving = platform.hooks.gateway.upstreams("digits")[0].url
    addresses = {
        f"{settings.gateway_base_url}/-/metrics": "caddy_http_requests",
        f"{settings.git_base_url}/metrics": "airloom_",
        f"{settings.airflow_api_url}/airloom/metrics": "airloom_",
        f"{serving}/metrics": "airloom_serving_",
        f"{settings.mlflow_api_url}/metrics": "mlflow_",
    }
    for address, name in addresses.items():
        answer = httpx.get(address, timeout=90, trust_env=False, follow_redirects=True)
        assert answer.status_code == 200, address
        samples = [line for line in answer.text.splitlines() if line and not line.startswith("#")]
        assert all(re.match(r"[a-zA-Z_:][\w:]*(\{.*\})? \S+( \d+)?$", line) for line in samples), address
        assert any(line.startswith(name) for line in samples), f"{address} has no {name}…"


def test_stock_dvc_gets_the_data_of_a_tag(platform: Platform, tmp_path: Path) -> None:
    version = data_version(platform, platform.first)
    url = urlsplit(platform.hooks.git.clone_url(version.repo))
    user = f"{platform.settings.git_user}:{quote(platform.settings.secret('git_password'), safe='')}"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DVC_NO_ANALYTICS": "1",
        "AWS_ACCESS_KEY_ID": "airloom",
        "AWS_SECRET_ACCESS_KEY": platform.settings.secret("s3_airloom_secret"),
    }
    address = url._replace(netloc=f"{user}@{url.netloc}").geturl()
    command = ["get", address, version.path, "--rev", version.tag, "-o", "got"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("dvc")), *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sha256_tree(tmp_path / "got") == version.digest


# Runs of other kinds


def test_second_run_reuses_everything(platform: Platform) -> None:
    said = platform.airloom("demo").stdout
    assert "The platform is running already." in said.splitlines()
    told = {row[0]: (row[3], row[4]) for row in cells(said, 5)}
    assert {stage: told[stage][0] for stage in STAGES} == dict.fromkeys(STAGES, "hit")
    assert all(told[stage][1] for stage in STAGES), told
    again = platform.latest()
    before = (tags(platform), model_versions(platform), numbers(platform), platform.deployed())
    summary = platform.run()
    assert summary["state"] == "success", summary
    assert caches(summary) == dict.fromkeys(STAGES, "hit")
    assert all(task["reason"] for task in summary["tasks"] if task["task"] in STAGES)
    assert data_version(platform, summary).tag == data_version(platform, again).tag
    assert (tags(platform), model_versions(platform), numbers(platform), platform.deployed()) == before


def test_reproducing_a_tag_gives_the_same_data_and_figures(platform: Platform) -> None:
    """Forced, so that every stage runs anew."""
    then = data_version(platform, platform.first)
    summary = platform.run("--reproduce", then.tag, "--force")
    assert summary["state"] == "success", summary
    assert caches(summary) == dict.fromkeys(STAGES, "forced")
    now = data_version(platform, summary)
    assert now.tag != then.tag
    assert (now.md5, now.digest) == (then.md5, then.digest)
    metrics, digest = platform.evaluated(platform.first["run_id"])
    assert platform.evaluated(summary["run_id"]) == (metrics, digest)
    assert "accuracy" in metrics


def test_two_runs_at_once_write_two_tags(platform: Platform) -> None:
    before = set(tags(platform))
    started = [
        json.loads(platform.airloom("run", "digits", "--no-wait", "--force", "--json").stdout)["run_id"]
        for _ in range(2)
    ]
    assert started[0] != started[1]
    ended = [platform.ended(run_id) for run_id in started]
    reasons = "\n".join(platform.reasons(run_id) for run_id in started)
    assert [run["state"] for run in ended] == ["success", "success"], reasons
    written = {platform.returned(run_id, "version")["tag"] for run_id in started}
    assert len(written) == 2
    assert set(tags(platform)) - before == written
    assert platform.deployed() in {platform.returned(run_id, "release")["version"] for run_id in started}


# Bad data


@pytest.fixture
def raw_files(platform: Platform) -> Iterator[dict[str, bytes]]:
    """Files to put among the raw ones; removed again after the test."""
    added: dict[str, bytes] = {}
    yield added
    for key in added:
        platform.hooks.store.remove(RAW, key)


def upload(platform: Platform, folder: Path, files: dict[str, bytes]) -> None:
    pairs = []
    for number, (key, content) in enumerate(files.items()):
        path = folder / str(number)
        path.write_bytes(content)
        pairs.append((key, path))
    platform.hooks.store.upload_many(RAW, pairs)


def test_a_few_bad_files_are_listed_and_left_out(
    platform: Platform, raw_files: dict[str, bytes], tmp_path: Path
) -> None:
    good = picture(platform)
    raw_files |= {
        "digits/0/empty.png": b"",
        "digits/0/truncated.png": good[: len(good) // 2],
        "digits/0/text.png": b"This is no picture.\n" * 20,
        "digits/8/mislabelled.png": good,
    }
    upload(platform, tmp_path, raw_files)
    summary = platform.run()
    assert summary["state"] == "success", summary
    assert caches(summary)["preprocess"] == "miss", summary
    version = data_version(platform, summary)
    content = platform.hooks.git.read_file(version.repo, version.commit, "data/card.json")
    card = DataCard.model_validate_json(content)
    assert card.rejected == {"empty": 1, "truncated": 1, "not_an_image": 1, "conflicting_label": 2}
    assert card.total_rows == 4999
    folder = Path(platform.returned(summary["run_id"], "preprocess")["result"]["outputs"]["dataset"]["path"])
    listed = {json.loads(line)["name"] for line in (folder / REJECTED_FILE).read_text().splitlines()}
    assert set(raw_files) <= listed


def test_too_many_bad_files_end_the_run_and_change_nothing(
    platform: Platform, raw_files: dict[str, bytes], tmp_path: Path
) -> None:
    raw_files |= {f"digits/0/broken-{number}.png": f"no picture {number}".encode() for number in range(300)}
    upload(platform, tmp_path, raw_files)
    before = (tags(platform), model_versions(platform), numbers(platform), platform.deployed())
    done = platform.airloom("run", "digits", "--json", check=False)
    assert done.returncode == 7, done.stderr
    summary = json.loads(done.stdout)
    states = {task["task"]: task["state"] for task in summary["tasks"]}
    assert summary["state"] == "failed", summary
    assert states["validate"] == "failed", summary
    assert "300 of 5,300 files rejected (5.66%), at most 5.00%" in done.stderr
    assert not {"success", "failed"} & {states[task] for task in ("version", "train", "deploy")}, states
    assert (tags(platform), model_versions(platform), numbers(platform), platform.deployed()) == before
    assert predicted(platform)["release"] == before[3]


def test_room_of_ended_runs_is_named_and_left_alone_until_asked(platform: Platform) -> None:
    said = json.loads(platform.airloom("gc", "--keep-days", "0", "--dry-run", "--json").stdout)
    folder = safe_run_id(platform.first["run_id"])
    assert folder in {item["run"] for item in said["removed"]}
    assert (platform.settings.workspaces_dir / "digits" / folder).is_dir()
    # What was written within the days to keep stays.
    assert json.loads(platform.airloom("gc", "--json").stdout)["removed"] == []
