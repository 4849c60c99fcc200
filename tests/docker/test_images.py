"""Runtimes and stage images, listed and copied to a registry, and what can be wrong with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from airloom.contract import CodePin
from airloom.errors import BuildFailedError, ConfigError, UnavailableError
from airloom.flows import images
from airloom.flows.mirror import external_images, mirror, mirrored_name
from airloom.hooks.image_builder import ImageBuilder
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.stage_image import BASE

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIN = CodePin(repo="some_repo", commit=COMMIT, message="m", author="a")
DOCKERFILE = "ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}\nCOPY main.py ./\n"
NAMESPACE = "airloom-images-test"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Settings]:
    """Settings whose runtimes are the plain base under another name: what is tested is what stands on them."""
    settings = make_settings(
        tmp_path / "home", image_namespace=NAMESPACE, python_image=BASE, runner="docker", torch_backend=""
    )
    name, tag = images.runtime_reference(settings, "preprocessing")
    subprocess.run(["docker", "tag", BASE, f"{name}:{tag}"], check=True)
    yield settings
    for row in images.images_here(settings):
        subprocess.run(["docker", "rmi", "-f", f"{row['name']}:{row['tag']}"], capture_output=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "main.py").write_text("print('hello')\n")
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "stages.yaml").write_text("runtime: preprocessing\nstages: {preprocess: {paths: [main.py]}}\n")
    return folder


def build(settings: Settings, checkout: Path) -> images.ImageRef:
    return images.build_stage_image(settings, PIN, checkout, lambda line: None)


def test_image_of_a_commit(here: Settings, checkout: Path) -> None:
    here = here.model_copy(update={"build_url": "http://jenkins/job/some_repo/7/", "git_public_url": "http://git.lan"})
    image = build(here, checkout)
    assert (image.name, image.tag, image.pushed) == (f"{NAMESPACE}/some_repo", COMMIT, False)
    facts = json.loads(subprocess.run(["docker", "inspect", image.pull_ref], capture_output=True, check=True).stdout)[0]
    labels = {
        key.rpartition(".")[2]: value for key, value in facts["Config"]["Labels"].items() if "opencontainers" in key
    }
    assert labels["revision"] == COMMIT
    assert labels["source"] == "http://git.lan/airloom/some_repo"
    assert labels["url"] == "http://jenkins/job/some_repo/7/"
    assert images.is_current(here, image, checkout)
    assert build(here, checkout) == image
    listed = {(row["name"], row["tag"]) for row in images.images_here(here)}
    assert (image.name, COMMIT) in listed
    (checkout / "Dockerfile").write_text(DOCKERFILE + "RUN true\n")
    assert not images.is_current(here, image, checkout), "another Dockerfile makes another image"
    assert build(here, checkout).runtime != image.runtime


def test_runtime_depends_on_what_it_is_made_from(here: Settings, tmp_path: Path) -> None:
    other = make_settings(tmp_path / "other", python_image="python:3.12-slim")
    assert images.runtime_digest(here, "training") != images.runtime_digest(other, "training")
    assert images.runtime_digest(here, "training") != images.runtime_digest(here, "serving")
    gpu = make_settings(tmp_path / "gpu", python_image=BASE, torch_backend="cu130")
    assert images.runtime_digest(here, "training") != images.runtime_digest(gpu, "training")
    assert images.runtime_digest(here, "preprocessing") == images.runtime_digest(gpu, "preprocessing")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("stages.yaml", "stages: {preprocess: {paths: [main.py]}}\n", "names no runtime"),
        ("Dockerfile", None, "no Dockerfile"),
        ("Dockerfile", "ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}\nCOPY nowhere ./\n", "nowhere"),
        ("Dockerfile", "ARG RUNTIME_IMAGE\nFROM ${RUNTIME_IMAGE}\nRUN echo it broke && exit 3\n", "it broke"),
        ("Dockerfile", "NOT A DOCKERFILE\n", "(?i)unknown instruction"),
    ],
)
def test_what_is_wrong_is_said(here: Settings, checkout: Path, file: str, content: str | None, said: str) -> None:
    (checkout / file).unlink()
    if content is not None:
        (checkout / file).write_text(content)
    with pytest.raises(BuildFailedError, match=said) as caught:
        build(here, checkout)
    assert "some_repo@01234567" in caught.value.message


def test_a_command_runs_in_an_image(here: Settings, checkout: Path) -> None:
    (checkout / "say.py").write_text("import os; print(os.getuid(), os.listdir('.')); raise SystemExit(3)\n")
    builder = ImageBuilder(here)
    code, output = builder.run(BASE, checkout, ["python3", "say.py"], limit_seconds=300)
    assert code == 3
    assert output.startswith("10001 ")
    assert "stages.yaml" in output
    (checkout / "say.py").write_text("import time; time.sleep(600)\n")
    assert builder.run(BASE, checkout, ["python3", "say.py"], limit_seconds=1)[0] is None


def test_engine_that_is_down_is_no_fault_of_the_commit(tmp_path: Path, checkout: Path) -> None:
    nowhere = make_settings(tmp_path / "home", docker_host=f"unix://{tmp_path}/none.sock", python_image=BASE)
    with pytest.raises(UnavailableError, match="does not answer"):
        build(nowhere, checkout)


def test_folder_of_wheels_must_be_one(tmp_path: Path) -> None:
    settings = make_settings(
        tmp_path / "home", image_namespace=NAMESPACE, python_image=BASE, wheels=str(tmp_path / "no")
    )
    with pytest.raises(ConfigError, match="AIRLOOM_WHEELS"):
        images.ensure_runtime(settings, "base", lambda line: None)


def test_mirror_needs_a_registry_and_says_what_it_could_not_copy(here: Settings) -> None:
    with pytest.raises(ConfigError, match="AIRLOOM_REGISTRY"):
        mirror(here, {"X_IMAGE": BASE}, print)
    # Nobody listens there.
    away = here.model_copy(update={"registry": "127.0.0.1:9"})
    copied, failed = mirror(away, {"X_IMAGE": BASE}, lambda line: None)
    assert copied == {}
    assert len(failed) == 1
    assert failed[0].startswith("X_IMAGE: ")
    subprocess.run(["docker", "rmi", mirrored_name("127.0.0.1:9", BASE)], capture_output=True, check=False)


def test_external_images_are_those_of_others(here: Settings) -> None:
    found = external_images(here)
    assert found["MYSQL_IMAGE"].startswith("mysql:")
    assert "AIRLOOM_PLATFORM_IMAGE" not in found
    assert mirrored_name("r:5000", "quay.io/minio/minio:1") == "r:5000/minio/minio:1"
    assert mirrored_name("r:5000", "mysql:8.4.11") == "r:5000/library/mysql:8.4.11"


def test_command_line_lists_images(here: Settings, checkout: Path) -> None:
    (checkout / "main.py").write_text(f"print({time.time()})\n")  # made now, not found
    image = build(here, checkout)
    environment = {**os.environ, "AIRLOOM_IMAGE_NAMESPACE": NAMESPACE, "AIRLOOM_HOME": str(here.home_dir)}
    program = "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()"

    def listed(*options: str) -> str:
        command = [sys.executable, "-c", program, "images", "list", *options]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    (row,) = [row for row in json.loads(listed("--json"))["images"] if row["tag"] == COMMIT]
    assert (row["name"], row["digest"], row["pushed"]) == (image.name, image.digest, False)
    assert row["size_bytes"] == image.size_bytes > 2**20
    assert time.time() - 600 < row["created"] <= time.time()
    table = " ".join(listed().replace("│", " ").split())
    assert f"{image.name} {COMMIT} {image.digest[7:19]} {image.size_bytes / 1e6:.0f} MB" in table
    assert re.search(r" MB \d+ (s|min)\b", table)
