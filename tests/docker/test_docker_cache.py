"""The cache volume of a real engine: a data version is sent there once, and every stage reads it as files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError

from airloom.contract import Stage, StageRequest
from airloom.contract.digest import sha256_tree
from airloom.embedded.environment import base_environment
from airloom.flows.gc import free_room, remove_from_engine
from airloom.hooks.docker_cache import CACHE, CacheVolume
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import ExitReason, JobExit, StageJob
from airloom.settings import Settings
from tests.conftest import ROOT, make_settings

MAIN = """
import json, os, time
from airloom.contract import Stage, StageResult, run_stage_main
from airloom.contract.digest import sha256_tree

def train(request):
    folder = request.inputs["dataset"]
    if request.params["do"] == "sleep":
        print("ready", flush=True)
        time.sleep(600)
    if request.params["do"] == "write":
        (folder / "a b.txt").write_text("mine")
    if request.params["do"] == "remove":
        os.remove(os.path.realpath(folder / "a b.txt"))
    found = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    walked = [os.path.relpath(path, folder) for path in found]
    assert all((folder / name).is_file() for name in walked)
    now = time.time()
    facts = {"tree": sha256_tree(folder), "walked": json.dumps(sorted(walked))}
    return StageResult(stage=request.stage, status="ok", facts=facts, started_at=now, finished_at=now)

raise SystemExit(run_stage_main({Stage.TRAIN: train}))
"""
FILES = {
    "a b.txt": b"one" * 1000,
    "größe/ß – 数据.bin": bytes(range(256)) * 5000,
    "größe/deeper/twice.txt": b"one" * 1000,  # one object under two names
    "empty": b"",
    "card.json": b"{}",
    f"{'long' * 40}/{'name' * 50}": b"long",
}
_numbers = itertools.count(1)


def md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture(scope="module")
def reading_image(stage_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of an image whose stage reads its dataset."""
    folder = tmp_path_factory.mktemp("reading")
    (folder / "main.py").write_text(MAIN)
    (folder / "Dockerfile").write_text(f"FROM {stage_image}\nCOPY main.py /app/main.py\n")
    built = subprocess.run(
        ["docker", "build", "-q", str(folder)],
        env={"PATH": "/usr/bin:/bin", "DOCKER_BUILDKIT": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    image = built.stdout.strip().splitlines()[-1]
    yield image
    subprocess.run(["docker", "rmi", "-f", image], capture_output=True, check=False)


class Bench:
    """Stages of one machine that read datasets."""

    def __init__(self, settings: Settings, image: str) -> None:
        self.settings, self.image = settings, image
        self.runner = DockerRunner(settings, poll_seconds=0.05)
        self.api = self.runner._api
        self.sent: list[int] = []  # bytes of each batch and index
        put_archive = self.api.put_archive

        def counted(container: str, path: str, data: Any) -> bool:
            if path != str(CACHE):
                return bool(put_archive(container, path, data))
            pieces = [data] if isinstance(data, bytes) else list(data)
            self.sent.append(sum(map(len, pieces)))
            return bool(put_archive(container, path, iter(pieces)))

        self.api.put_archive = counted

    def job(self, do: str = "read", files: Mapping[str, bytes] = FILES, workspace: Path | None = None) -> StageJob:
        number = next(_numbers)
        dataset = self.settings.home_dir / "datasets" / f"{number}"
        for name, content in files.items():
            (dataset / name).parent.mkdir(parents=True, exist_ok=True)
            (dataset / name).write_bytes(content)
        workspace = workspace or self.settings.workspaces_dir / "digits" / f"run-{number}" / "train"
        StageRequest(
            pipeline="digits", run_id="run", stage=Stage.TRAIN, commit="c" * 40, params={"do": do},
            inputs={"dataset": dataset}, outputs={},
        ).write(workspace / "request.json")  # fmt: skip
        return StageJob(
            pipeline="digits", run_id="run", stage=Stage.TRAIN, key="key", workspace=workspace, checkout=workspace,
            image=self.image, memory_bytes=2**28, timeout_seconds=600.0,
            objects={"dataset": {name: md5_of(content) for name, content in files.items()}},
        )  # fmt: skip

    def run(self, job: StageJob) -> JobExit:
        handle = self.runner.start(job)
        found = self.runner.wait(handle, lambda line: None, lambda: False)
        self.runner.mark_collected(handle)
        return found

    def read(self, job: StageJob) -> None:
        """Run it, and hold what it read against the dataset here."""
        found = self.run(job)
        assert (found.reason, found.exit_code) == (ExitReason.EXITED, 0), (found, self.said(job))
        facts = json.loads((job.workspace / "result.json").read_text())["facts"]
        dataset = StageRequest.read(job.request_file).inputs["dataset"]
        assert facts["tree"] == sha256_tree(dataset)
        assert json.loads(facts["walked"]) == sorted(job.objects["dataset"])

    def said(self, job: StageJob) -> str:
        return (job.workspace / "log.txt").read_text()

    @property
    def volume(self) -> str:
        return f"airloom-{self.settings.instance_id}-dvc-cache"

    def things(self) -> tuple[list[str], list[str]]:
        """Names of this installation's containers and volumes."""
        label = {"label": f"airloom.instance={self.settings.instance_id}"}
        containers = [item["Names"][0] for item in self.api.containers(all=True, filters=label)]
        return containers, [item["Name"] for item in self.api.volumes(filters=label)["Volumes"] or []]

    def spoil(self, path: str, content: bytes) -> None:
        """Have other bytes in the volume."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        with CacheVolume(self.api, self.settings)._sender("airloom-test", self.image) as sender:
            self.api.put_archive(sender, str(CACHE), iter([file.getvalue()]))
        self.sent.clear()


@pytest.fixture
def bench(settings: Settings, reading_image: str) -> Iterator[Bench]:
    found = Bench(settings, reading_image)
    yield found
    remove_from_engine(settings)
    assert found.things() == ([], [])


def test_the_second_stage_reads_the_same_and_is_sent_nothing(bench: Bench) -> None:
    bench.read(bench.job())
    assert len(bench.sent) == 2
    assert bench.sent[0] > sum(len(content) for content in set(FILES.values()))
    assert bench.things() == ([], [bench.volume])
    bench.sent.clear()
    bench.read(bench.job())
    assert bench.sent == []


def test_of_a_new_data_version_only_what_is_new_is_sent(bench: Bench) -> None:
    bench.read(bench.job())
    bench.sent.clear()
    bench.read(bench.job(files={**FILES, "card.json": b"{ }"}))
    assert len(bench.sent) == 2
    assert max(bench.sent) < 10_000


@pytest.mark.parametrize("do", ["write", "remove"])
def test_a_stage_cannot_change_it(bench: Bench, do: str) -> None:
    job = bench.job(do)
    assert bench.run(job).exit_code == 1
    said = bench.said(job)
    assert "Read-only file system: '/airloom" in said, said
    bench.read(bench.job())


def test_files_that_are_no_data_version_travel_by_themselves(bench: Bench) -> None:
    job = dataclasses.replace(bench.job(), objects={})
    assert bench.run(job).exit_code == 0
    assert bench.things() == ([], [])


SENDER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from airloom.hooks import docker_cache
from airloom.hooks.docker_runner import DockerRunner
from airloom.hooks.runner import StageJob
from airloom.contract import Stage
from airloom.settings import Settings
import json
settings = Settings.model_validate_json(sys.stdin.readline())
workspace, image, objects, where = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
whole, index = docker_cache._objects, docker_cache._index

def stuck():
    print("stuck", flush=True)
    time.sleep(600)

def half(batch, files):
    pieces = list(whole(batch, files))
    yield b"".join(pieces)[:8000]
    stuck()

if where == "objects":
    docker_cache._objects = half
else:
    docker_cache._index = lambda batch, hashes: stuck()
DockerRunner(settings).start(StageJob(
    pipeline="digits", run_id="run", stage=Stage.TRAIN, key="key", workspace=workspace, checkout=workspace,
    image=image, memory_bytes=2**28, timeout_seconds=600.0, objects=objects))
"""


@pytest.mark.parametrize("where", ["objects", "index"])
def test_killed_while_it_is_sent(bench: Bench, where: str) -> None:
    """The next try believes nothing of it, and leaves nothing of the sender."""
    job = bench.job()
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(job.workspace), bench.image, json.dumps(dict(job.objects)), where],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sender.stdin is not None
    assert sender.stdout is not None
    sender.stdin.write(bench.settings.model_dump_json() + "\n")
    sender.stdin.flush()
    assert sender.stdout.readline() == "stuck\n"
    sender.kill()
    sender.wait()
    assert len(bench.things()[0]) == 2, bench.things()  # the stage's container, and the one that takes the files
    bench.read(job)
    assert len(bench.sent) == 2
    assert bench.things() == ([], [bench.volume])


def test_two_stages_at_once_send_it_once(bench: Bench) -> None:
    other = Bench(bench.settings, bench.image)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(machine.read, machine.job()) for machine in (bench, other)]:
            done.result()
    assert sorted(len(machine.sent) for machine in (bench, other)) == [0, 2]


def test_two_machines_at_once_don_t_touch_each_other_s(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both send all of it, each to a place of its own."""
    both, send = threading.Barrier(2, timeout=300), CacheVolume._send

    def at_once(*arguments: Any) -> dict[str, str]:
        both.wait()
        return send(*arguments)

    monkeypatch.setattr(CacheVolume, "_send", at_once)
    name = f"test-{time.time_ns()}"
    machines = [
        Bench(make_settings(tmp_path / home, instance=name), bench.image) for home in ("one", "two")
    ]  # one installation
    try:
        with ThreadPoolExecutor(2) as threads:
            for done in [threads.submit(machine.read, machine.job()) for machine in machines]:
                done.result()
        assert [len(machine.sent) for machine in machines] == [2, 2]
        monkeypatch.undo()
        machines[0].read(machines[0].job())
        assert len(machines[0].sent) == 2
    finally:
        remove_from_engine(machines[0].settings)
    assert machines[0].things() == ([], [])


def test_removed_by_hand_between_tries(bench: Bench) -> None:
    """While a stage has it, nobody can; afterwards the next one sends it again."""
    job = bench.job("sleep")
    handle = bench.runner.start(job)
    with pytest.raises(APIError, match="volume is in use"):
        bench.api.remove_volume(bench.volume, force=True)
    bench.runner.stop(handle, 1)
    bench.runner.mark_collected(handle)
    bench.api.remove_volume(bench.volume)
    bench.sent.clear()
    bench.read(bench.job(workspace=job.workspace))
    assert len(bench.sent) == 2


def test_a_damaged_object_is_found_and_sent_again(bench: Bench) -> None:
    """No stage begins with other bytes than those of its data version, also of the same size."""
    job = bench.job()
    bench.read(job)
    md5 = md5_of(FILES["card.json"])
    handle = bench.runner.start(bench.job("sleep"))
    path = bench.runner._cache._known(handle.id)[md5]
    bench.runner.stop(handle, 1)
    bench.runner.mark_collected(handle)
    bench.spoil(str(Path(path).relative_to(CACHE)), b"{{")
    again = bench.job(workspace=job.workspace)
    found = bench.run(again)
    assert found.reason is ExitReason.LOST
    assert found.detail == (
        f"1 objects in the cache volume were damaged, such as {path}; the next try sends them again"
    )
    assert f"damaged in the cache volume: {path} (1 objects)" in bench.said(again)
    assert not (again.workspace / "result.json").exists()
    bench.sent.clear()
    bench.read(again)
    assert len(bench.sent) == 2
    assert max(bench.sent) < 10_000


def test_an_index_that_cannot_be_read_counts_as_none(bench: Bench) -> None:
    bench.read(bench.job())
    bench.spoil("batches/0123456789abcdef.json", b'["' + md5_of(b"{}").encode())
    bench.read(bench.job())
    assert bench.sent == []


def test_gc_removes_it_when_it_is_old_and_no_stage_has_it(bench: Bench) -> None:
    def gc(*, days: float = 0, dry_run: bool = False) -> bool:
        freed = free_room(bench.settings, is_live=lambda pipeline, run: True, keep_days=days, dry_run=dry_run)
        return freed.cache_volume

    handle = bench.runner.start(bench.job("sleep"))
    assert not gc()
    bench.runner.stop(handle, 1)
    bench.runner.mark_collected(handle)
    assert not gc(days=7)
    assert gc(dry_run=True)
    assert bench.things() == ([], [bench.volume])
    assert gc()
    assert bench.things() == ([], [])
    assert not gc()


def test_clean_leaves_nothing_on_the_engine(bench: Bench) -> None:
    """Neither the volume nor a stage that runs."""
    bench.runner.start(bench.job("sleep"))
    containers, volumes = bench.things()
    assert (len(containers), len(volumes)) == (1, 2)
    settings = bench.settings.model_copy(update={"stack": f"airloom-test-{time.time_ns()}"})  # another's is not removed
    start = "import sys; from airloom.cli.main import main; sys.argv[0] = 'airloom'; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, "clean", "--yes"],
        env=base_environment(settings), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert bench.things() == ([], [])
    assert not settings.home_dir.exists()


def test_gc_where_no_engine_answers(bench: Bench) -> None:
    """As where containers were given up: there is nothing to free, and no reason to fail."""
    bench.read(bench.job())
    settings = bench.settings.model_copy(update={"docker_host": "tcp://127.0.0.1:1"})
    for folder in settings.workspaces_dir.rglob("container.lock"):
        folder.unlink()
    assert not free_room(settings, is_live=lambda pipeline, run: False, keep_days=0).cache_volume
