"""Repeat a prediction in what it was served from, and compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.digest import sha256_bytes, sha256_tree
from airloom.contract.enums import DeployTarget, Stage
from airloom.contract.release import Release
from airloom.errors import AirloomError, ContractError, NotFoundError, StageFailedError
from airloom.flows import replay_process
from airloom.flows.receipts import Recorded, bundle_of, find, release_of

if TYPE_CHECKING:
    from airloom.hooks.connect import Hooks

TIMEOUT_SECONDS = 300.0


class Replay(Frozen):
    """A prediction made again from the recorded input with the release's model.

    Attributes:
        same: whether the two outputs are equal, bit for bit.
        differences: one sentence for each value that differs.
        environment: digest of what the replay ran in; `None` where it could not be determined.
        environment_differs: whether the release was made in another: then unequal outputs may come from there.
    """

    prediction_id: str
    release: Release
    recorded: dict[str, Any]
    repeated: dict[str, Any]
    same: bool
    differences: list[str] = Field(default_factory=list)
    environment: str | None = None
    environment_differs: bool | None = None


def replay(hooks: Hooks, prediction_id: str) -> Replay:
    """Make a recorded prediction again: in a process of its own, or in a container where the release answers from one.

    Raises:
        NotFoundError: the id, its input, its release or the release's model is not to be found.
        ContractError: the recorded input or the model is not what its digest says.
        StageFailedError: the model did not answer.
        ServiceError: the release's image is gone, or a service or the engine does not answer.
    """
    recorded = find(hooks, prediction_id, with_content=True)
    if recorded.content is None:
        raise NotFoundError(
            f"the input of {recorded.id} is no longer in the prediction log", hint="inputs may have been removed by age"
        )
    if sha256_bytes(recorded.content) != recorded.input_sha256:
        raise ContractError(f"the recorded input of {recorded.id} is not the one that was answered: its digest differs")
    release = release_of(hooks, recorded.pipeline, recorded.release)
    model = _model_of(hooks, release)
    if release.target is DeployTarget.DOCKER:
        answer = _predict_in_container(hooks, release, model, recorded, recorded.content)
        environment = release.image.runtime if release.image else None
    else:
        answer = _predict_in_process(model, recorded, recorded.content)
        environment = _environment()
    repeated: dict[str, Any] = json.loads(answer)
    differences = list(_compare(recorded.output, repeated))
    return Replay(
        prediction_id=recorded.id,
        release=release,
        recorded=recorded.output,
        repeated=repeated,
        same=not differences,
        differences=differences,
        environment=environment,
        environment_differs=None if environment is None else environment != release.environment,
    )


def _model_of(hooks: Hooks, release: Release) -> Path:
    """The release's model folder: this machine's copy if it is whole, else the registry's."""
    local = bundle_of(hooks.settings, release.pipeline, release.version) / "model"
    if local.is_dir() and sha256_tree(local) == release.model_digest:
        return local
    return hooks.mlflow.download_model(release.model_uri, release.model_digest)


def _predict_in_process(model: Path, recorded: Recorded, content: bytes) -> bytes:
    """Predict in a process of its own: the model's code and libraries stay out of this one."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(prefix="airloom-replay-") as folder:
        item, answer = Path(folder) / "input", Path(folder) / "answer.json"
        item.write_bytes(content)
        command = [sys.executable, "-m", "airloom.flows.replay_process", str(model), *_place(recorded)]
        try:
            done = subprocess.run(
                [*command, str(item), str(answer)],
                capture_output=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
                env={**os.environ, **threads},
            )
        except subprocess.TimeoutExpired:
            raise StageFailedError(
                f"the model in {model} did not answer within {TIMEOUT_SECONDS:g} s", hint="is the machine overloaded?"
            ) from None
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise StageFailedError(
                f"the model in {model} did not answer: {reason[-1] if reason else f'exit code {done.returncode}'}",
                hint="its requirements must be installed here as they were where it was served",
            )
        return answer.read_bytes()


def _predict_in_container(hooks: Hooks, release: Release, model: Path, recorded: Recorded, content: bytes) -> bytes:
    from airloom.flows.resolve import load_plan, spec_of
    from airloom.hooks.docker_replay import predict_in_container
    from airloom.hooks.release_image import serving_image

    spec = spec_of(load_plan(hooks, release.plan))
    return predict_in_container(
        hooks.settings,
        serving_image(release),
        program=Path(replay_process.__file__).read_text(encoding="utf-8"),
        model=model,
        content=content,
        arguments=_place(recorded),
        resources=spec.stages[Stage.SERVE].resources,
        timeout_seconds=TIMEOUT_SECONDS,
    )


def _place(recorded: Recorded) -> list[str]:
    return [str(recorded.batch_size), str(recorded.batch_index)]


def _environment() -> str | None:
    with suppress(ImportError, AirloomError, OSError):
        from airloom.flows.environment import environment_digest

        return environment_digest()
    return None


def _compare(recorded: Any, repeated: Any, path: str = "") -> list[str]:
    """One sentence for each leaf that differs; numbers say by how much."""
    where = path or "the output"
    if isinstance(recorded, dict) and isinstance(repeated, dict):
        found = []
        for key in dict.fromkeys((*recorded, *repeated)):
            inner = f"{path}.{key}" if path else str(key)
            if key not in repeated:
                found.append(f"{inner}: only recorded")
            elif key not in recorded:
                found.append(f"{inner}: only repeated")
            else:
                found += _compare(recorded[key], repeated[key], inner)
        return found
    if isinstance(recorded, list) and isinstance(repeated, list) and len(recorded) == len(repeated):
        pairs = enumerate(zip(recorded, repeated, strict=True))
        return [line for i, (a, b) in pairs for line in _compare(a, b, f"{path}[{i}]")]
    if recorded == repeated:
        return []
    if isinstance(recorded, float | int) and isinstance(repeated, float | int):
        return [f"{where}: recorded {recorded!r}, repeated {repeated!r}, off by {abs(recorded - repeated):.3g}"]
    return [f"{where}: recorded {recorded!r}, repeated {repeated!r}"]
