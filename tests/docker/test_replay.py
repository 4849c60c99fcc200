"""Replays of predictions that a container answered, in its image: this Python lacks what the model needs."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from airloom.contract import DeployTarget, ImageRef, Release, sha256_bytes
from airloom.contract.journal import encode_entry
from airloom.contract.prediction_id import new_unique
from airloom.errors import ConfigError, NotFoundError, ServiceError, StageFailedError, UnavailableError
from airloom.flows.receipts import journal_root
from airloom.flows.replay import Replay, replay
from airloom.hooks import docker_replay
from airloom.hooks.connect import Hooks
from airloom.hooks.docker_engine import connect
from airloom.hooks.docker_replay import REPLAY_LABEL
from airloom.hooks.object_store import ObjectStore
from airloom.settings import Settings
from tests.conftest import make_settings
from tests.fixtures.image_registry import USER, ImageRegistry
from tests.fixtures.plans import make_plan, make_spec
from tests.fixtures.services import free_port
from tests.fixtures.serving import tiny

NAME = "airloom-test-replay"
MEMORY = 192 * 2**20
_numbers = itertools.count()  # of pipelines: the store is shared
ITEM = tiny.picture(1, 2, 3, 4)
OUTPUT = {"label": "c", "scores": tiny.scores(1, 2, 3, 4)}
# What no Python but the image's has.
IMPORT = "import only_in_the_image\n"
# Has the answer say what the model finds around it.
TELL = """
import pathlib


def tell(self, output):
    limits = [pathlib.Path("/sys/fs/cgroup", name) for name in ("memory/memory.limit_in_bytes", "memory.max")]
    writable = []
    for folder in (pathlib.Path("/"), pathlib.Path("/tmp"), pathlib.Path("only_in_the_image.py").absolute().parent):
        try:
            (folder / "new").write_text("")
            writable.append(str(folder))
        except OSError:
            pass
    return {
        "interfaces": [path.name for path in pathlib.Path("/sys/class/net").iterdir()],
        "writable": writable,
        "memory": next(int(path.read_text()) for path in limits if path.exists()),
    }


Tiny.encode = tell
"""


@pytest.fixture(scope="session")
def image(stage_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRef]:
    """The tiny stage image, and what the tiny model needs."""
    folder = tmp_path_factory.mktemp("replay-image")
    for name in ("numpy", "numpy.libs"):
        shutil.copytree(Path(sysconfig.get_path("purelib")) / name, folder / "app" / name)
    (folder / "app" / "only_in_the_image.py").write_text("")
    (folder / "Dockerfile").write_text(f"FROM {stage_image}\nCOPY app /app\n")
    command = ["docker", "build", "-q", "-t", f"{NAME}:one", str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "DOCKER_BUILDKIT": "0"}
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    digest = built.stdout.strip().splitlines()[-1]
    yield ImageRef(name=NAME, tag="one", digest=digest, pushed=False, runtime="e" * 64)
    subprocess.run(["docker", "rmi", "-f", f"{NAME}:one"], capture_output=True, check=False)


@dataclass(frozen=True)
class Bench:
    settings: Settings
    image: ImageRef

    def answered(self, output: dict[str, Any], *, code: str = IMPORT + tiny.CODE, **changes: Any) -> str:
        """The id of an answer that a release is said to have given."""
        hooks, pipeline = Hooks(self.settings), f"tiny{next(_numbers)}"
        bundle = tiny.make_release(self.settings.releases_dir, pipeline=pipeline, code=code)
        stages = {stage: {"repo": f"de_{stage}"} for stage in ("preprocess", "train", "evaluate")}
        serve = {"repo": "de_serve", "resources": {"memory": MEMORY, "cpus": 1}}
        plan = make_plan(spec=make_spec(name=pipeline, stages={**stages, "serve": serve}))
        key = f"runs/{pipeline}/run-1/plan.json"
        hooks.store.put_json(self.settings.bucket_airloom, key, plan.model_dump(mode="json"))
        values = {
            "target": DeployTarget.DOCKER,
            "image": self.image,
            "environment": self.image.runtime,
            "plan": f"s3://{self.settings.bucket_airloom}/{key}",
            **changes,
        }
        Release.read(bundle / "release.json").model_copy(update=values).write(bundle / "release.json")
        prediction = f"{pipeline}-1.0.0-{new_unique()}"
        journal = journal_root(self.settings) / pipeline
        journal.mkdir(parents=True)
        entry = encode_entry(
            prediction_id=prediction, pipeline=pipeline, release="1.0.0", answered_at=1e9, latency_ms=1.0,
            input_sha256=sha256_bytes(ITEM), output_json=json.dumps(output), media_type="image/png",
            batch_size=3, batch_index=1, content=ITEM,
        )  # fmt: skip
        (journal / "0.journal").write_bytes(b"".join(entry))
        return prediction

    def replay(self, prediction: str) -> Replay:
        return replay(Hooks(self.settings), prediction)

    def left(self) -> list[Any]:
        api = connect(self.settings)
        label = [f"airloom.instance={self.settings.instance_id}", REPLAY_LABEL]
        try:
            return list(api.containers(all=True, filters={"label": label}))
        finally:
            api.close()


@pytest.fixture
def bench(s3_store: ObjectStore, session_settings: Settings, tmp_path: Path, image: ImageRef) -> Iterator[Bench]:
    found = Bench(make_settings(tmp_path / "home", s3_port=session_settings.s3_port), image)
    yield found
    assert found.left() == []


def test_replay_runs_where_the_release_answers(bench: Bench) -> None:
    done = bench.replay(bench.answered(OUTPUT))
    assert (done.same, done.differences, done.repeated) == (True, [], OUTPUT)
    assert (done.environment, done.environment_differs) == (bench.image.runtime, False)
    done = bench.replay(bench.answered({**OUTPUT, "label": "a"}))
    assert done.differences == ["label: recorded 'a', repeated 'c'"]


def test_container_reaches_nobody_and_writes_nowhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the model itself says; and nothing of it is left, its volume neither."""
    remove, volumes = docker_replay._remove, set()

    def noted(api: Any, container: str) -> None:
        volumes.update(mount["Name"] for mount in api.inspect_container(container)["Mounts"])
        remove(api, container)

    monkeypatch.setattr(docker_replay, "_remove", noted)
    done = bench.replay(bench.answered({}, code=IMPORT + tiny.CODE + TELL))
    assert done.repeated == {"interfaces": ["lo"], "writable": ["/tmp"], "memory": MEMORY}
    assert len(volumes) == 1
    assert not volumes & volume_names()


def volume_names() -> set[str]:
    shown = subprocess.run(["docker", "volume", "ls", "-q"], capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


def test_image_that_is_gone_is_said(bench: Bench, login_registry: ImageRegistry) -> None:
    nowhere = {"name": f"127.0.0.1:{free_port()}/airloom/serve", "tag": "one", "pushed": True}
    unknown = {"digest": f"sha256:{'0' * 64}"}
    gone = bench.answered(OUTPUT, image=bench.image.model_copy(update=unknown))
    with pytest.raises(ServiceError, match=r"cannot be had: the image sha256:0000.* is not in this engine"):
        bench.replay(gone)
    down = bench.answered(OUTPUT, image=bench.image.model_copy(update={**nowhere, **unknown}))
    with pytest.raises(UnavailableError, match=r"cannot be had: .*connection refused") as caught:
        bench.replay(down)
    assert caught.value.retryable
    lost = {"name": f"{login_registry.host}/airloom/serve", "pushed": True, **unknown}
    known = Bench(
        bench.settings.model_copy(update={"registry": login_registry.host, "registry_user": USER}), bench.image
    )
    with pytest.raises((NotFoundError, ServiceError), match=r"cannot be had: .*(manifest unknown|not found)"):
        known.replay(bench.answered(OUTPUT, image=bench.image.model_copy(update=lost)))


def test_release_without_an_image_is_said(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="was made without an image"):
        bench.replay(bench.answered(OUTPUT, image=None))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no such weights')\n", "did not answer: .*no such weights"),
        # A process beside it is what the kernel ends: where the container ends as well, the engine may not hear of it.
        (
            "import os, time\nif os.fork() == 0:\n"
            f"    x = b'1' * {2 * MEMORY}\n    os._exit(0)\n"
            "os.wait()\ntime.sleep(15)\nraise RuntimeError('one of its processes is gone')\n",
            "needs more memory than its 192 MiB",
        ),
    ],
)
def test_model_that_fails_says_why(bench: Bench, code: str, message: str) -> None:
    with pytest.raises(StageFailedError, match=message):
        bench.replay(bench.answered(OUTPUT, code=code + tiny.CODE))


def test_model_that_hangs_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airloom.flows.replay.TIMEOUT_SECONDS", 2.0)
    with pytest.raises(StageFailedError, match="did not answer within 2 s"):
        bench.replay(bench.answered(OUTPUT, code="import time\ntime.sleep(600)\n" + tiny.CODE))


def test_what_a_killed_caller_left_is_removed_by_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Callable[..., None] = docker_replay._remove
    monkeypatch.setattr(docker_replay, "_remove", lambda api, container: None)
    bench.replay(bench.answered(OUTPUT))
    assert len(bench.left()) == 1
    monkeypatch.setattr(docker_replay, "_remove", kept)
    bench.replay(bench.answered(OUTPUT))
    assert len(bench.left()) == 1, "it might still be waited for"
    monkeypatch.setattr(docker_replay.time, "time", lambda: 1e10)
    bench.replay(bench.answered(OUTPUT))
