"""Each stage repo's own suite, and what holds between the repos."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from airloom.contract import Output, Stage, StageRequest, StageResult
from airloom.spec.stage_repo import StageRepo

ROOT = Path(__file__).parents[2]
REPOS = ROOT / "gitbucket_repos"
NAMES = sorted(path.parent.name for path in REPOS.glob("*/stages.yaml"))


@pytest.mark.parametrize("repo", NAMES)
def test_the_repos_own_tests_pass(repo: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", str(REPOS / repo / "tests")]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("repo", NAMES)
def test_stages_yaml_names_files_that_exist(repo: str) -> None:
    loaded = StageRepo.load(REPOS / repo)
    for stage in loaded.stages:
        assert len(loaded.code_digest(REPOS / repo, stage)) == 64


@pytest.mark.parametrize("repo", NAMES)
def test_the_files_that_every_repo_has(repo: str) -> None:
    for name in ("main.py", "requirements.txt", "Dockerfile", "Jenkinsfile", "README.md", "tests"):
        assert (REPOS / repo / name).exists(), name
    dockerfile = (REPOS / repo / "Dockerfile").read_text()
    assert "ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}" in dockerfile
    assert "\nUSER 10001" in dockerfile
    copied = {word for line in dockerfile.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    packages = {path.parent.name for path in (REPOS / repo).glob("*/__init__.py")} - {"tests"}
    assert packages <= {name.removeprefix("./") for name in copied}


@pytest.mark.parametrize("repo", NAMES)
def test_stage_code_imports_the_contract_and_nothing_else_of_airloom(repo: str) -> None:
    for path in (REPOS / repo).rglob("*.py"):
        if "tests" in path.parts:
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in {"from", "import"} and words[1].split(".")[0] in {"airloom", "airflow"}:
                assert words[1].startswith("airloom.contract"), f"{path}: {line}"


def test_raw_pictures_become_a_model_that_treats_them_as_training_did(tmp_path: Path) -> None:
    """Colour JPEGs of several sizes through all three stages: the raw file and its packed row are one tensor."""
    raw = tmp_path / "raw"
    for number in range(240):
        label = ("dark", "light")[number % 2]
        path = raw / label / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_photo(number, light=label == "light"))
    dataset = _run(
        "de_datapreprocessing", Stage.PREPROCESS, tmp_path, {"folder": raw}, ("dataset",), {"image_size": 16}
    )
    assert dataset.metrics["rows"] == 240
    inputs = {"dataset": dataset.outputs["dataset"].path}
    params = {"epochs": 3, "batch_size": 16, "width": 4}
    trained = _run("ds_mlmodeling", Stage.TRAIN, tmp_path, inputs, ("checkpoints", "model"), params)
    inputs["model"] = trained.outputs["model"].path
    evaluated = _run("ds_mlmodeling", Stage.EVALUATE, tmp_path, inputs, ("report",), {})
    assert evaluated.metrics["accuracy"] > 0.9
    for result in (dataset, trained, evaluated):
        for name, output in result.outputs.items():
            assert Output.of(output.path) == output, name

    from airloom.contract.model import load_predictor
    from airloom.contract.shards import read_split

    _, predictor = load_predictor(trained.outputs["model"].path)
    for row in read_split(dataset.outputs["dataset"].path, "test").to_pylist():
        served = predictor.transform(predictor.decode((raw / row["source"]).read_bytes()))
        assert np.array_equal(served, predictor.transform(predictor.decode(row["image"])))


def _photo(seed: int, *, light: bool) -> bytes:
    random = np.random.default_rng(seed)
    height, width = random.integers(12, 60, 2)
    pixels = random.integers(130, 256, (height, width, 3)) if light else random.integers(0, 126, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _run(
    repo: str, stage: Stage, folder: Path, inputs: dict[str, Path], outputs: tuple[str, ...], params: dict[str, Any]
) -> StageResult:
    """Run a stage as the runner does: a process in its checkout, a request file in, a result file out."""
    place = folder / stage.value
    request = StageRequest(
        pipeline="light",
        run_id="run",
        stage=stage,
        commit="0" * 40,
        params=params,
        inputs=inputs,
        outputs={name: place / name for name in outputs},
        seed=3,
    )
    request.write(place / "request.json")
    command = [sys.executable, "main.py", stage.value, "--request", str(place / "request.json")]
    done = subprocess.run(
        [*command, "--result", str(place / "result.json")],
        cwd=REPOS / repo,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((place / "result.json").read_text())["status"] == "ok"
    return StageResult.read(place / "result.json")
