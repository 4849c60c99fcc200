"""Runner `docker`: a stage as a container that outlives whoever started it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from airloom.errors import ConfigError, ConflictError, ContractError, ServiceError, UnavailableError
from airloom.hooks import docker_files
from airloom.hooks.docker_cache import CacheVolume, remove_sender
from airloom.hooks.docker_container import (
    INSTANCE_LABEL,
    KEY_LABEL,
    POLL_SECONDS,
    TRY_LABEL,
    closed,
    engine_exit,
    is_gone,
    limits,
    seconds_of,
    watch,
)
from airloom.hooks.docker_engine import FindLogin, connect, container_facts, engine_errors, ensure_image
from airloom.hooks.docker_gpu import gpu_refusal, gpus_needed
from airloom.hooks.process_environment import thread_environment
from airloom.hooks.runner import LOG_FILE, ExitReason, JobExit, JobHandle, OnLog, ShouldStop, StageJob
from airloom.settings import Settings

EXIT_FILE, STOP_FILE, COLLECTED_FILE = "container-exit.json", "container-stop", "collected"
LOCK_FILE = "container.lock"
WORKSPACE_LABEL = "airloom.workspace"
_IMAGE_LABEL = "airloom.image"  # of the volume, for who finds it without its container
_SIGNAL_BASE = 128
_LOST_CODE = 255  # what the engine says of containers that it lost sight of
_AT_THE_LIMIT = 0.9  # what is refused may be a large page
_REMOVAL_SECONDS = 20.0
_GPU_KEY = "resources.gpus"
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


class DockerRunner:
    """Runs stages as containers. See `airloom.hooks.runner.Runner` for what its methods promise.

    Args:
        login: who the registry is to know, asked only when an image has to be pulled; the settings' user where it
            gives none.
    """

    def __init__(
        self, settings: Settings, *, login: FindLogin | None = None, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._settings = settings
        self._login = login
        self._poll_seconds = poll_seconds
        self._api = connect(settings)
        self._cache = CacheVolume(self._api, settings)

    def start(self, job: StageJob) -> JobHandle:
        """See `Runner.start`."""
        if job.image is None:
            raise ConfigError(f"stage {job.stage.value} has no image", hint="build its commit: airloom build …")
        ensure_image(self._api, self._settings, job.image, login=self._login)
        job.workspace.mkdir(parents=True, exist_ok=True)
        with (job.workspace / LOCK_FILE).open("w") as lock, engine_errors():
            fcntl.flock(lock, fcntl.LOCK_EX)  # two tries that start at once: the second finds the first's container
            return self._start_locked(job)

    def find(self, workspace: Path) -> JobHandle | None:
        """See `Runner.find`."""
        facts = container_facts(self._api, self._name(workspace))
        if facts is None:
            known = _read(workspace / EXIT_FILE)
            if known is None:
                return None
            collected = (workspace / COLLECTED_FILE).exists()
            return JobHandle(known["id"], known["key"], workspace, known["label"], False, collected)
        if facts["State"]["Status"] == "created":
            return None  # whoever made it was killed before its start
        return self._handle(workspace, facts)

    def wait(self, handle: JobHandle, on_log: OnLog, should_stop: ShouldStop) -> JobExit:
        """See `Runner.wait`."""
        known = _read(handle.workspace / EXIT_FILE)
        if known is not None and known["id"] == handle.id:
            return JobExit(**{**known["exit"], "reason": ExitReason(known["exit"]["reason"])})
        facts = watch(
            self._api,
            lambda: connect(self._settings),
            handle.id,
            handle.workspace / LOG_FILE,
            on_log=on_log,
            should_stop=should_stop,
            stop=lambda: self.request_stop(handle),
            poll_seconds=self._poll_seconds,
        )
        return self._end(handle, facts)

    def stop(self, handle: JobHandle, grace_seconds: float) -> None:
        """See `Runner.stop`."""
        from docker.errors import NotFound

        facts = self._facts(handle)
        if facts is None or not facts["State"]["Running"]:
            return
        (handle.workspace / STOP_FILE).write_text("{}", encoding="ascii")
        with engine_errors(), suppress(NotFound):
            self._api.stop(handle.id, timeout=max(1, round(grace_seconds)))

    def request_stop(self, handle: JobHandle) -> None:
        """See `Runner.request_stop`."""
        threading.Thread(target=self.stop, args=(handle, 10.0), daemon=True).start()

    def mark_collected(self, handle: JobHandle) -> None:
        """See `Runner.mark_collected`. The container and its volume are of no more use."""
        with suppress(OSError):
            (handle.workspace / COLLECTED_FILE).write_text(handle.id, encoding="ascii")
        with engine_errors():
            self._remove(self._name(handle.workspace))

    def _start_locked(self, job: StageJob) -> JobHandle:
        from docker.errors import APIError

        workspace, name = job.workspace, self._name(job.workspace)
        found = self.find(workspace)
        if found is not None and found.running:
            raise ConflictError(f"{found.label} runs for {workspace} already", hint="stop it, or wait for its end")
        self._remove(name)
        for file in (EXIT_FILE, STOP_FILE, COLLECTED_FILE, LOG_FILE, "result.json"):
            (workspace / file).unlink(missing_ok=True)
        shutil.rmtree(workspace / docker_files.CARRIED, ignore_errors=True)
        labels = {
            INSTANCE_LABEL: self._settings.instance_id,
            "airloom.pipeline": job.pipeline,
            "airloom.run": job.run_id,
            "airloom.stage": job.stage.value,
            KEY_LABEL: job.key,
            TRY_LABEL: str(job.try_number),
            WORKSPACE_LABEL: str(workspace),
        }
        self._api.create_volume(name, labels={**labels, _IMAGE_LABEL: str(job.image)})
        self._create(job, name, labels)
        environment = dict(job.environment)
        if self._settings.ca_bundle:
            environment |= dict.fromkeys(CA_VARIABLES, str(docker_files.MOUNT / docker_files.CA_FILE))
        content = json.dumps(environment).encode()
        objects = docker_files.objects_of(job)
        cached = self._cache.ensure(name, job.image or "", objects) if objects else {}
        docker_files.send(self._api, name, job, content, cached, self._settings.ca_bundle)
        try:
            self._api.start(name)
        except APIError as error:  # its state says why, and so does the exit; but for what is not the stage's affair
            said = str(error.explanation or error) if job.gpus else ""
            refusal = gpu_refusal(said, self._api.info(), gpus_needed(job.gpus), _GPU_KEY) if said else None
            if refusal is not None:
                self._remove(name)
                raise refusal from error
        return self._handle(workspace, self._api.inspect_container(name))

    def _create(self, job: StageJob, name: str, labels: dict[str, str]) -> None:
        from docker.types import Mount

        mounts = [Mount(str(docker_files.VOLUME), name, type="volume")]
        if job.objects:
            mounts.append(self._cache.mount())
        host = self._api.create_host_config(
            mounts=mounts,
            network_mode=self._settings.docker_network,
            restart_policy={"Name": "no"},
            **closed(job.tmp_bytes),
            **limits(
                self._api,
                memory_bytes=job.memory_bytes,
                cpus=job.cpus,
                shm_bytes=job.shm_bytes,
                gpus=job.gpus,
                gpu_key=_GPU_KEY,
            ),
        )
        variables = thread_environment(job.cpus)
        variables |= {"HOME": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108
        work = str(docker_files.MOUNT)
        arguments = [job.stage.value, "--request", f"{work}/request.json", "--result", f"{work}/result.json"]
        boot = (Path(__file__).parent / "container_boot.py").read_text(encoding="utf-8")
        self._api.create_container(
            job.image,
            name=name,
            entrypoint=["python3", "-c", boot],
            command=[str(job.timeout_seconds), str(job.grace_seconds), "main.py", *arguments],
            working_dir="/app",
            user=f"{docker_files.USER}:{docker_files.USER}",
            environment=variables,
            labels=labels,
            host_config=host,
        )

    def _end(self, handle: JobHandle, facts: dict[str, Any] | None) -> JobExit:
        if is_gone(facts):
            return self._lost(handle)
        assert facts is not None  # noqa: S101
        try:
            with engine_errors():
                noted = docker_files.fetch(self._api, handle.id, handle.workspace)
                damaged = noted.get("damaged") if noted else None
                if damaged:
                    self._cache.forget(self._name(handle.workspace), facts["Image"], damaged)
        except UnavailableError:
            # What the engine says of a container whose removal has begun.
            if is_gone(self._facts(handle)):
                return self._lost(handle)
            raise
        if noted is None and is_gone(self._facts(handle)):
            return self._lost(handle)
        if damaged:
            detail = f"{len(damaged)} objects in the cache volume were damaged, such as {damaged[0]}"
            found = JobExit(ExitReason.LOST, detail=f"{detail}; the next try sends them again")
        else:
            found = _exit_of(facts, noted, _read(handle.workspace / STOP_FILE) is not None)
        note = {"id": handle.id, "key": handle.key, "label": handle.label, "exit": asdict(found)}
        new = handle.workspace / f"{EXIT_FILE}.new"
        new.write_text(json.dumps(note), encoding="utf-8")
        new.replace(handle.workspace / EXIT_FILE)
        return found

    def _lost(self, handle: JobHandle) -> JobExit:
        """Somebody removed the container: its outputs are saved, the rest goes when the engine has finished."""
        name = self._name(handle.workspace)
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while container_facts(self._api, name) is not None and time.monotonic() < deadline:
            time.sleep(self._poll_seconds)
        with suppress(ServiceError, ContractError):
            self._save_outputs(name, handle.workspace)
        while True:
            try:
                with engine_errors():
                    self._remove(name)
                break
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(self._poll_seconds)
        return JobExit(ExitReason.LOST, detail=f"{handle.label} was removed")

    def _save_outputs(self, name: str, workspace: Path) -> None:
        """Bring what the stage had written, such as checkpoints, from the volume that its container left."""
        from docker.errors import NotFound
        from docker.types import Mount

        with engine_errors(), suppress(NotFound):
            image = self._api.inspect_volume(name)["Labels"][_IMAGE_LABEL]
            mount = Mount(str(docker_files.VOLUME), name, type="volume")
            # Never started: the engine hands out files of a container's volumes as soon as it is made.
            host = self._api.create_host_config(mounts=[mount], network_mode="none")
            self._api.create_container(image, name=name, command=["-"], host_config=host)
            docker_files.fetch_outputs(self._api, name, workspace)

    def _facts(self, handle: JobHandle) -> dict[str, Any] | None:
        return container_facts(self._api, handle.id)

    def _remove(self, name: str) -> None:
        from docker.errors import NotFound

        remove_sender(self._api, name)
        with suppress(NotFound):
            self._api.remove_container(name, force=True)
        with suppress(NotFound):
            self._api.remove_volume(name)

    def _name(self, workspace: Path) -> str:
        digest = hashlib.sha256(os.fsencode(workspace.absolute())).hexdigest()[:16]
        return f"airloom-{self._settings.instance_id}-{digest}"

    def _handle(self, workspace: Path, facts: dict[str, Any]) -> JobHandle:
        return JobHandle(
            id=facts["Id"],
            key=facts["Config"]["Labels"][KEY_LABEL],
            workspace=workspace,
            label=f"container {facts['Id'][:12]}",
            running=bool(facts["State"]["Running"]),
            collected=(workspace / COLLECTED_FILE).exists(),
        )


def find_containers(settings: Settings) -> list[tuple[JobHandle, dict[str, str]]]:
    """Every stage's container of this installation, running or not, with its labels."""
    runner = DockerRunner(settings)
    label = f"{INSTANCE_LABEL}={settings.instance_id}"
    with engine_errors():
        found = runner._api.containers(all=True, filters={"label": [label, WORKSPACE_LABEL]})
        facts = [container_facts(runner._api, item["Id"]) for item in found]
    return [
        (runner._handle(Path(item["Config"]["Labels"][WORKSPACE_LABEL]), item), item["Config"]["Labels"])
        for item in facts
        if item is not None
    ]


def _exit_of(facts: dict[str, Any], noted: dict[str, Any] | None, stopped: bool) -> JobExit:
    """From what the engine and the container's first program say; never from the log."""
    used = {name: noted[name] for name in ("cpu_seconds", "peak_memory_bytes")} if noted else {}
    found = engine_exit(facts, stopped=stopped)
    if found is None and noted is not None and _met_its_limit(facts, noted):
        found = JobExit(ExitReason.MEMORY_LIMIT, seconds=seconds_of(facts))
    if found is not None:
        peak_memory_bytes = found.peak_memory_bytes or used.get("peak_memory_bytes", 0)
        return replace(found, **{**used, "peak_memory_bytes": peak_memory_bytes})
    code, seconds = int(facts["State"]["ExitCode"]), seconds_of(facts)
    if noted is None:
        if code == _LOST_CODE or code <= _SIGNAL_BASE:
            return JobExit(ExitReason.LOST, detail=f"its container ended with {code}", seconds=seconds)
        return JobExit(ExitReason.SIGNALLED, signal=code - _SIGNAL_BASE, seconds=seconds)
    if noted["timed_out"]:
        return JobExit(ExitReason.TIMEOUT, seconds=seconds, **used)
    if noted["code"] < 0:
        return JobExit(ExitReason.SIGNALLED, signal=-noted["code"], seconds=seconds, **used)
    return JobExit(ExitReason.EXITED, exit_code=noted["code"], seconds=seconds, **used)


def _met_its_limit(facts: dict[str, Any], noted: dict[str, Any]) -> bool:
    """Whether the kernel ended a process for the container's limit, and not because the machine had no memory left."""
    limit_bytes = int(facts["HostConfig"]["Memory"])
    return bool(noted.get("oom_kills") and limit_bytes and noted["peak_memory_bytes"] >= _AT_THE_LIMIT * limit_bytes)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value
