"""One prediction from a container that nobody else can reach: its files are handed in, its answer is taken out."""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airloom.contract import ImageRef
from airloom.errors import AirloomError, StageFailedError
from airloom.hooks.docker_container import INSTANCE_LABEL, POLL_SECONDS, closed, is_gone, limits
from airloom.hooks.docker_engine import connect, container_facts, engine_errors, ensure_image
from airloom.hooks.docker_files import MOUNT, USER, VOLUME, owned
from airloom.hooks.process_environment import thread_environment
from airloom.spec.pipeline import Resources

if TYPE_CHECKING:
    from airloom.settings import Settings

REPLAY_LABEL = "airloom.replay"
_MODEL, _INPUT, _ANSWER = (MOUNT / name for name in ("model", "input", "answer.json"))


def predict_in_container(
    settings: Settings,
    image: ImageRef,
    *,
    program: str,
    model: Path,
    content: bytes,
    arguments: list[str],
    resources: Resources,
    timeout_seconds: float,
) -> bytes:
    """What the program wrote, called with the model's folder, the arguments, the input's file and the answer's.

    The container has no network, writes to memory and its own volume alone, and is removed with it.

    Raises:
        StageFailedError: it wrote none, in this time or in the memory that resources give it.
        NotFoundError, ServiceError: the image is neither in the engine nor in the registry.
        UnavailableError: the engine, or a registry that has to be asked, does not answer.
    """
    api = connect(settings)
    try:
        try:
            ensure_image(api, settings, image.pull_ref)
        except AirloomError as error:
            raise type(error)(
                f"the image that the release answers from cannot be had: {error.message}", hint=error.hint
            ) from error
        with engine_errors():
            _remove_left(api, settings, timeout_seconds)
            container = _create(api, settings, image, program, arguments, resources)
            try:
                _send(api, container, model, content)
                api.start(container)
                _wait(api, container, image, resources, timeout_seconds)
                return _answer(api, container)
            finally:
                _remove(api, container)
    finally:
        api.close()


def _create(  # noqa: PLR0917 - private, and only called above
    api: Any, settings: Settings, image: ImageRef, program: str, arguments: list[str], resources: Resources
) -> str:
    from docker.types import Mount

    host = api.create_host_config(
        mounts=[Mount(str(VOLUME), None, type="volume")],
        network_mode="none",
        **closed(resources.tmp),
        **limits(
            api,
            memory_bytes=resources.memory,
            cpus=resources.cpus,
            shm_bytes=resources.shm,
            gpu_key="resources.gpus",
        ),
    )
    made = api.create_container(
        image.pull_ref,
        entrypoint=["python3", "-c", program],
        command=[str(_MODEL), *arguments, str(_INPUT), str(_ANSWER)],
        user=f"{USER}:{USER}",
        environment={**thread_environment(resources.cpus), "HOME": "/tmp"},  # noqa: S108 - the container's own
        healthcheck={"test": ["NONE"]},  # the image's own asks a server
        labels={INSTANCE_LABEL: settings.instance_id, REPLAY_LABEL: "1"},
        host_config=host,
    )
    return str(made["Id"])


def _send(api: Any, container: str, model: Path, content: bytes) -> None:
    """Fill the volume, by an archive on disk: a model may be larger than memory."""
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as archive:
            folder = tarfile.TarInfo(MOUNT.name)
            folder.type = tarfile.DIRTYPE
            archive.addfile(owned(folder))
            archive.add(model, str(_MODEL.relative_to(VOLUME)), filter=owned)
            item = owned(tarfile.TarInfo(str(_INPUT.relative_to(VOLUME))))
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
        file.seek(0)
        api.put_archive(container, str(VOLUME), file)


def _wait(api: Any, container: str, image: ImageRef, resources: Resources, timeout_seconds: float) -> None:
    """Until the program has ended well."""
    from docker.errors import APIError

    deadline = time.monotonic() + timeout_seconds
    where = f"the model in a container of {image.name}:{image.tag}"
    while (facts := container_facts(api, container)) is not None and facts["State"]["Running"]:
        if time.monotonic() > deadline:
            raise StageFailedError(
                f"{where} did not answer within {timeout_seconds:g} s", hint="is the engine's machine overloaded?"
            )
        time.sleep(POLL_SECONDS)
    if facts is None or is_gone(facts):
        raise StageFailedError(f"{where} was removed before it answered", retryable=True)
    if facts["State"]["OOMKilled"]:
        raise StageFailedError(
            f"{where} needs more memory than its {resources.memory / 2**20:.0f} MiB",
            hint="it answers with as much in the release's own container: is the input larger than what was served?",
        )
    code, said = facts["State"]["ExitCode"], [f"exit code {facts['State']['ExitCode']}"]
    if code != 0:
        with suppress(APIError):  # somebody is removing it
            said += api.logs(container, tail=20).decode(errors="replace").strip().splitlines()
        raise StageFailedError(f"{where} did not answer: {said[-1]}")


def _answer(api: Any, container: str) -> bytes:
    stream, _ = api.get_archive(container, str(_ANSWER))
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        file = archive.extractfile(_ANSWER.name)
        return file.read() if file else b""


def _remove_left(api: Any, settings: Settings, timeout_seconds: float) -> None:
    """Containers whose caller was killed: older than any that is still waited for."""
    labels = [f"{INSTANCE_LABEL}={settings.instance_id}", REPLAY_LABEL]
    for item in api.containers(all=True, filters={"label": labels}):
        if item["Created"] < time.time() - 2 * timeout_seconds:
            _remove(api, item["Id"])


def _remove(api: Any, container: str) -> None:
    from docker.errors import APIError

    with suppress(APIError):  # somebody else removes it
        api.remove_container(container, force=True, v=True)
