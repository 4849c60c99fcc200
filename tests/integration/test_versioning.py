"""Data versions on a real object store and a real git server, read back by stock DVC."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from airloom.contract import CodePin, DataVersion, RunPlan, Stage, VersionTag, sha256_tree
from airloom.embedded.s3_server import service as s3_service
from airloom.errors import AuthError, ContractError, NotFoundError, StorageFullError, UnavailableError
from airloom.flows import datasets, version
from airloom.flows.cache import key_parts, source_inputs
from airloom.flows.cache_lookup import lookup
from airloom.hooks.connect import Hooks
from airloom.hooks.dvc import LIST_FROM_OBJECTS, DvcStore, object_key
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import ROOT, make_settings
from tests.fixtures.datasets import CREATED, make_dataset, make_outcome, make_plan
from tests.fixtures.git import StageRepoFixture, git
from tests.fixtures.s3 import make_buckets
from tests.fixtures.services import running

DVC = Path(sys.executable).with_name("dvc")


@pytest.fixture
def hooks(s3_store: ObjectStore, git_settings: Settings) -> Hooks:
    return Hooks(git_settings)


@pytest.fixture
def pin(stage_repo: StageRepoFixture) -> CodePin:
    """A pushed commit; the repo ignores something already, and what it ignores must stay."""
    sha = stage_repo.commit_files("Crop the digits ✂\n\nbody", {"main.py": "pass\n", "data/.gitignore": "/scratch\n"})
    stage_repo.push()
    return CodePin(repo=stage_repo.name, commit=sha, message="Crop the digits ✂\n\nbody", author="Ada <a@b>")


def pipeline_of(pin: CodePin) -> str:
    """A pipeline of its own for each test, and so a DVC remote of its own."""
    return pin.repo.replace("repo_", "digits")


def known(hooks: Hooks, plan: RunPlan) -> DataVersion | None:
    """What a later run with this plan would find."""
    found = lookup(hooks, key_parts(plan, Stage.PREPROCESS, source_inputs(plan))).entry
    return found.data_version if found else None


def tags_of(hooks: Hooks, pin: CodePin) -> list[str]:
    return [tag.name for tag in hooks.git.list_tags(pin.repo, f"{pipeline_of(pin)}/")]


def dvc(*arguments: str, cwd: Path, settings: Settings) -> None:
    """Stock DVC as a person with the key of the object store runs it."""
    done = subprocess.run(
        [DVC, *arguments],
        check=False,
        cwd=cwd,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(cwd),
            "DVC_NO_ANALYTICS": "1",
            "AWS_ACCESS_KEY_ID": "airloom",
            "AWS_SECRET_ACCESS_KEY": settings.secret("s3_airloom_secret"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "user.name",
            "GIT_CONFIG_VALUE_0": "x",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_stock_dvc_gives_the_bytes_back(
    hooks: Hooks,
    pin: CodePin,
    stage_repo: StageRepoFixture,
    tmp_path: Path,
) -> None:
    files = {
        "train-00000.parquet": os.urandom(300_000),
        "sub folder/ünï.bin": b"x",
        "empty": b"",
        "same-1": b"same",
        "same-2": b"same",
        "card.json": b'{"rows": {"train": 3}}',
    }
    folder = make_dataset(tmp_path / "dataset", files)
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    made = version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    path = f"data/{plan.pipeline}"
    assert made.tag == f"{plan.pipeline}/CV_crop-the-digits_{pin.commit[:8]}_DV_20261121T103015123Z"
    assert (made.path, made.files, made.created) == (path, 6, True)
    assert made.digest == sha256_tree(folder)
    assert known(hooks, plan) == made

    dvc(
        "get",
        stage_repo.url,
        path,
        "--rev",
        made.tag,
        "-o",
        str(tmp_path / "got"),
        cwd=tmp_path,
        settings=hooks.settings,
    )
    assert sha256_tree(tmp_path / "got") == made.digest

    clone = tmp_path / "clone"
    git("clone", "--quiet", "--branch", made.tag, stage_repo.url, str(clone), cwd=tmp_path)
    dvc("pull", cwd=clone, settings=hooks.settings)
    assert sha256_tree(clone / path) == made.digest
    # Stock DVC finds nothing to change: the pointer is the one that it would write.
    dvc("add", path, cwd=clone, settings=hooks.settings)
    assert git("status", "--porcelain", cwd=clone).stdout == ""
    assert (clone / "data" / ".gitignore").read_text().splitlines() == ["/scratch", f"/{plan.pipeline}"]
    assert json.loads((clone / "data" / "plan.json").read_text())["run_id"] == plan.run_id
    assert (clone / "data" / "card.json").read_bytes() == files["card.json"]
    assert (clone / "main.py").read_text() == "pass\n"
    assert git("rev-parse", "HEAD^", cwd=clone).stdout.strip() == pin.commit


def test_the_tag_tells_where_everything_came_from(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    made = version.version_dataset(hooks, plan=plan, outcome=make_outcome(make_dataset(tmp_path / "d"), plan))
    tag = hooks.git.read_tag(pin.repo, made.tag)
    message = json.loads(tag.message)
    assert message["run_id"] == "manual__1"
    assert message["code"] == {pin.repo: pin.commit}
    assert message["rows"] == {"train": 70, "validation": 15, "test": 15}
    assert message["source"]["digest"] == plan.source.digest
    assert message["plan"] == f"s3://airloom/{plan.prefix}/plan.json"
    names = {"code_commit", "path", "md5", "files", "size_bytes", "digest"}
    assert {name: message[name] for name in names} == made.model_dump(mode="json", include=names)
    assert tag.commit == made.commit


def test_a_second_try_finds_its_own_tag_and_moves_nothing(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    outcome = make_outcome(make_dataset(tmp_path / "d"), plan)
    first = version.version_dataset(hooks, plan=plan, outcome=outcome)
    before = list(hooks.store.list("dvc", plan.pipeline))
    assert version.version_dataset(hooks, plan=plan, outcome=outcome) == first
    assert tags_of(hooks, pin) == [first.tag]
    assert list(hooks.store.list("dvc", plan.pipeline)) == before


def test_a_cache_hit_makes_no_tag(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    plan, folder = make_plan(pin, pipeline=pipeline_of(pin)), make_dataset(tmp_path / "d")
    first = version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    later = make_plan(pin, run_id="manual__2", created_at=CREATED + timedelta(hours=1), pipeline=pipeline_of(pin))
    again = version.version_dataset(
        hooks, plan=later, outcome=make_outcome(folder, later, cache="hit", data_version=first)
    )
    assert again == first.model_copy(update={"created": False})
    assert tags_of(hooks, pin) == [first.tag]
    assert known(hooks, later) == first


def test_runs_at_once_each_get_a_tag(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    """All start in the same millisecond from the same commit, half of them with the same data."""
    pipeline = pipeline_of(pin)

    def run(number: int) -> DataVersion:
        folder = make_dataset(
            tmp_path / f"d{number}", {"train-00000.parquet": b"x" * 10_000, "n": b"%d" % (number // 2)}
        )
        plan = make_plan(pin, run_id=f"manual__{number}", pipeline=pipeline)
        return version.version_dataset(Hooks(hooks.settings), plan=plan, outcome=make_outcome(folder, plan))

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(run, range(6)))
    assert sorted(item.tag for item in made) == tags_of(hooks, pin)
    assert len({item.tag for item in made}) == 6
    first = VersionTag.make(pipeline=pipeline, commit=pin.commit, message=pin.message, time=CREATED)
    assert {VersionTag.parse(item.tag).time - first.time for item in made} == {
        timedelta(milliseconds=n) for n in range(6)
    }
    for number, item in enumerate(made):
        version.verify_remote(hooks, item)
        assert json.loads(hooks.git.read_tag(pin.repo, item.tag).message)["run_id"] == f"manual__{number}"


CHILD = """
import json, os, signal, sys
from airloom.contract import CodePin
from airloom.flows import version
from airloom.hooks.connect import Hooks
from airloom.hooks.git import GitRemote
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from pathlib import Path
from tests.fixtures.datasets import make_outcome, make_plan
settings, pin, pipeline, folder, point = json.loads(sys.argv[1])

def die(owner, name, at, after=False):
    real, calls = getattr(owner, name), [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] >= at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*args, **kwargs)
        if after:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(owner, name, wrapped)

if point == "first upload": die(ObjectStore, "upload", 1)
if point == "mid upload": die(ObjectStore, "upload", 30)
if point == "before .dir": die(ObjectStore, "put_bytes", 1)
if point == "after .dir": die(ObjectStore, "put_bytes", 1, after=True)
if point == "before tag": die(GitRemote, "write_version", 1)
if point == "after tag": die(GitRemote, "write_version", 1, after=True)
if point == "before the cache": die(ObjectStore, "put_json", 1)
hooks = Hooks(Settings(_env_file=None, **settings))
plan = make_plan(CodePin.model_validate(pin), pipeline=pipeline)
version.version_dataset(hooks, plan=plan, outcome=make_outcome(Path(folder), plan))
"""


@pytest.mark.parametrize(
    "point", ["first upload", "mid upload", "before .dir", "after .dir", "before tag", "after tag", "before the cache"]
)
def test_killed_anywhere_the_next_try_ends_with_one_tag(hooks: Hooks, pin: CodePin, tmp_path: Path, point: str) -> None:
    folder = make_dataset(tmp_path / "d", {f"f{n:03d}": b"%d" % n * 1000 for n in range(60)})
    arguments = [hooks.settings.model_dump(mode="json"), pin.model_dump(mode="json"), pipeline_of(pin), str(folder)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([*arguments, point])],
        check=False,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'plugins'}", "HOME": str(tmp_path)},
        capture_output=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    present = {info.key.rsplit("files/md5/", 1)[1] for info in hooks.store.list("dvc", f"{pipeline_of(pin)}/")}
    early = point in {"first upload", "mid upload", "before .dir"}
    assert any(name.endswith(".dir") for name in present) is not early
    assert len(tags_of(hooks, pin)) == (1 if point in {"after tag", "before the cache"} else 0)

    plan = make_plan(pin, pipeline=pipeline_of(pin))
    made = version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    assert tags_of(hooks, pin) == [made.tag]
    assert known(hooks, plan) == made
    assert sha256_tree(datasets.materialize(hooks, made)) == sha256_tree(folder)


def test_a_full_store_leaves_no_tag(git_settings: Settings, pin: CodePin, tmp_path: Path) -> None:

    small = make_settings(tmp_path / "home", s3_quota_mib=8, git_port=git_settings.git_port)
    hooks = Hooks(small)
    (small.secrets_dir / "git_password").write_text(git_settings.secret("git_password"))
    files = {f"train-{n:05d}.parquet": os.urandom(1_000_000) for n in range(40)}
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    outcome = make_outcome(make_dataset(tmp_path / "d", files), plan)
    with running(s3_service(small), tmp_path):
        make_buckets(small)
        with pytest.raises(StorageFullError, match="is full"):
            version.version_dataset(hooks, plan=plan, outcome=outcome)
        assert not [info for info in hooks.store.list("dvc") if info.key.endswith(".dir")]
    assert tags_of(hooks, pin) == []


def test_no_store_or_a_wrong_key_leaves_no_tag(
    git_settings: Settings, hooks: Hooks, pin: CodePin, tmp_path: Path
) -> None:
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    outcome = make_outcome(make_dataset(tmp_path / "d"), plan)
    for port, error in ((1, UnavailableError), (git_settings.s3_port, AuthError)):
        other = Hooks(make_settings(tmp_path / f"home{port}", s3_port=port, git_port=git_settings.git_port))
        other.store = ObjectStore(
            endpoint_url=other.settings.s3_endpoint_url, access_key="airloom", secret_key="wrong", retry_seconds=0.2
        )
        with pytest.raises(error, match=f"127.0.0.1:{port}"):
            version.version_dataset(other, plan=plan, outcome=outcome)
    assert tags_of(hooks, pin) == []


def test_a_dataset_that_is_not_what_the_stage_wrote_is_refused(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    plan, folder = make_plan(pin, pipeline=pipeline_of(pin)), make_dataset(tmp_path / "d")
    outcome = make_outcome(folder, plan)
    (folder / "more").write_bytes(b"more")
    with pytest.raises(ContractError, match=r"holds 5 files, .* but the stage wrote 4 files"):
        version.version_dataset(hooks, plan=plan, outcome=outcome)
    (folder / "more").unlink()
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(ContractError, match="link is no plain file"):
        version.version_dataset(hooks, plan=plan, outcome=outcome)
    assert tags_of(hooks, pin) == []


def test_a_file_that_changes_under_the_upload_is_noticed(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d")
    remote = DvcStore.from_settings(hooks.settings, hooks.store)
    listing = remote.hash_folder(folder)
    (folder / "train-00000.parquet").write_bytes(b"other" * 1000)
    with pytest.raises(Exception, match=r"train-00000.parquet did not arrive"):
        remote.push(listing, folder, pipeline_of(pin))
    assert not hooks.store.exists("dvc", object_key(pipeline_of(pin), listing.md5))


@pytest.mark.parametrize("files", [5, LIST_FROM_OBJECTS + 50], ids=["asked for each", "listed"])
def test_a_lost_object_is_found_named_and_put_back(hooks: Hooks, pin: CodePin, tmp_path: Path, files: int) -> None:
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    folder = make_dataset(tmp_path / "d", {f"f{n:03d}": b"%d" % n for n in range(files)})
    made = version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    version.verify_remote(hooks, made)
    remote = DvcStore.from_settings(hooks.settings, hooks.store)
    lost = object_key(plan.pipeline, remote.hash_folder(folder).files[-1].md5)
    hooks.store.remove("dvc", lost)
    with pytest.raises(NotFoundError, match=f"{made.tag} is not whole: s3://dvc/{lost} is missing"):
        version.verify_remote(hooks, made)
    with pytest.raises(NotFoundError, match=rf"{made.tag} is not whole: s3://dvc/{lost} does not exist"):
        datasets.materialize(hooks, made)
    # The .dir object is there still, and yet the next version of the same data brings the lost one back.
    version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    version.verify_remote(hooks, made)
    with pytest.raises(NotFoundError, match="no tag"):
        version.verify_remote(hooks, made.model_copy(update={"tag": made.tag.replace("crop", "crap")}))


def test_a_materialized_dataset_is_whole_read_only_and_shared(hooks: Hooks, pin: CodePin, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", {"a": os.urandom(5000), "sub/b": b"b"})
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    made = version.version_dataset(hooks, plan=plan, outcome=make_outcome(folder, plan))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: datasets.materialize(hooks, made), range(4)))
    [path] = set(paths)
    assert path == hooks.settings.home_dir / "datasets" / made.md5.removesuffix(".dir")
    assert sha256_tree(path) == made.digest
    assert (path / "a").stat().st_mode & 0o222 == 0
    assert path.stat().st_mode & 0o222 == 0
    assert not list(path.parent.glob(f".{path.name}.*.tmp"))
    md5s = {name: hashlib.md5((path / name).read_bytes(), usedforsecurity=False).hexdigest() for name in ("a", "sub/b")}
    assert datasets.objects_of(hooks, made) == md5s
    # Damage, in the folder and (the same inode) in the cache, is noticed and mended.
    (path / "a").chmod(0o644)
    (path / "a").write_bytes(b"damaged")
    assert sha256_tree(datasets.materialize(hooks, made)) == made.digest
    (path / "sub").chmod(0o755)
    (path / "sub" / "b").unlink()
    assert sha256_tree(datasets.materialize(hooks, made)) == made.digest


def test_a_store_that_is_killed_mid_upload_loses_nothing(git_settings: Settings, pin: CodePin, tmp_path: Path) -> None:
    own = make_settings(tmp_path / "home", git_port=git_settings.git_port)
    (own.secrets_dir / "git_password").write_text(git_settings.secret("git_password"))
    hooks = Hooks(own)
    # Beside other work, a start of the store may take longer than is waited for as a rule.
    hooks.store = ObjectStore.from_settings(own, retry_seconds=300)
    plan = make_plan(pin, pipeline=pipeline_of(pin))
    folder = make_dataset(tmp_path / "d", {f"f{n:04d}": b"%d" % n * 2000 for n in range(1500)})
    halfway = threading.Event()

    def count(bucket: str, key: str, path: Path, *, upload: Callable[..., None] = hooks.store.upload) -> None:
        upload(bucket, key, path)
        if path.name == "f0500":
            halfway.set()

    hooks.store.upload = count  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        with running(s3_service(own), tmp_path) as store:
            make_buckets(own)
            made = pool.submit(version.version_dataset, hooks, plan=plan, outcome=make_outcome(folder, plan))
            assert halfway.wait(300)
            store.kill()
            store.wait(60)
        with running(s3_service(own), tmp_path):
            version.verify_remote(hooks, made.result(timeout=400))
            assert sha256_tree(datasets.materialize(hooks, made.result())) == sha256_tree(folder)
    assert tags_of(hooks, pin) == [made.result().tag]
