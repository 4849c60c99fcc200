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
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from airloom.errors import ConfigError, ConflictError, ServiceError, UnavailableError
from airloom.hooks import docker_files
from airloom.hooks.docker_engine import connect, container_facts, engine_errors, ensure_image
from airloom.hooks.log_tail import LogTail
from airloom.hooks.process_environment import THREAD_VARIABLES
from airloom.hooks.runner import LOG_FILE, ExitReason, JobExit, JobHandle, OnLog, ShouldStop, StageJob
from airloom.settings import Settings

EXIT_FILE, STOP_FILE, COLLECTED_FILE = "container-exit.json", "container-stop", "collected"
LOCK_FILE = "container.lock"
INSTANCE_LABEL = "airloom.instance"
WORKSPACE_LABEL = "airloom.workspace"
_SIGNAL_BASE = 128
_LOST_CODE = 255  # what the engine says of containers that it lost sight of
POLL_SECONDS = 0.2
_REMOVAL_SECONDS = 20.0
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")


class DockerRunner:
    """Runs stages as containers. See `airloom.hooks.runner.Runner` for what its methods promise."""

    def __init__(self, settings: Settings, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._settings = settings
        self._poll_seconds = poll_seconds
        self._api = connect(settings)

    def start(self, job: StageJob) -> JobHandle:
        """See `Runner.start`."""
        if job.image is None:
            raise ConfigError(f"stage {job.stage.value} has no image", hint="build its commit: airloom build …")
        ensure_image(self._api, self._settings, job.image)
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
        log = handle.workspace / LOG_FILE
        log.touch()
        tail, asked = LogTail(log, offset=log.stat().st_size), False
        follower = threading.Thread(target=self._follow, args=(handle, tail.offset), daemon=True)
        follower.start()
        while True:
            facts = self._facts(handle)
            for line in tail.read():
                on_log(line)
            if facts is None or not facts["State"]["Running"]:
                break
            if not asked and should_stop():
                asked = True
                self.request_stop(handle)
            time.sleep(self._poll_seconds)
        follower.join(30)
        for line in tail.rest():
            on_log(line)
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
            "airloom.key": job.key,
            WORKSPACE_LABEL: str(workspace),
        }
        self._api.create_volume(name, labels=labels)
        self._create(job, name, labels)
        environment = dict(job.environment)
        if self._settings.ca_bundle:
            environment |= dict.fromkeys(CA_VARIABLES, str(docker_files.MOUNT / docker_files.CA_FILE))
        content = json.dumps(environment).encode()
        docker_files.send(self._api, name, job, content, self._settings.ca_bundle)
        with suppress(APIError):  # its state then says why, and so does the exit
            self._api.start(name)
        return self._handle(workspace, self._api.inspect_container(name))

    def _create(self, job: StageJob, name: str, labels: dict[str, str]) -> None:
        from docker.types import DeviceRequest, Mount

        gpus = [DeviceRequest(count=job.gpus, capabilities=[["gpu"]])] if job.gpus else None
        if gpus and "nvidia" not in self._api.info().get("Runtimes", {}):
            raise ConfigError(
                f"the stage needs {job.gpus} GPUs, but the engine has no runtime 'nvidia'",
                hint="install the NVIDIA container toolkit, or set resources.gpus: 0",
            )
        host = self._api.create_host_config(
            mounts=[Mount(str(docker_files.VOLUME), name, type="volume")],
            network_mode=self._settings.docker_network,
            read_only=True,
            tmpfs={"/tmp": "size=512m,mode=1777"},  # noqa: S108 - the container's own
            init=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            mem_limit=job.memory_bytes,
            memswap_limit=job.memory_bytes,
            nano_cpus=int(min(job.cpus, self._api.info()["NCPU"]) * 1e9),
            shm_size=256 * 2**20,
            pids_limit=1024,
            restart_policy={"Name": "no"},
            device_requests=gpus,
        )
        variables = {name: str(max(1, int(job.cpus))) for name in THREAD_VARIABLES}
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
        if _is_gone(facts):
            return self._lost(handle)
        assert facts is not None  # noqa: S101
        try:
            with engine_errors():
                noted = docker_files.fetch(self._api, handle.id, handle.workspace)
        except UnavailableError:
            # What the engine says of a container whose removal has begun.
            if _is_gone(self._facts(handle)):
                return self._lost(handle)
            raise
        if noted is None and _is_gone(self._facts(handle)):
            return self._lost(handle)
        found = _exit_of(facts, noted, _read(handle.workspace / STOP_FILE) is not None)
        note = {"id": handle.id, "key": handle.key, "label": handle.label, "exit": asdict(found)}
        new = handle.workspace / f"{EXIT_FILE}.new"
        new.write_text(json.dumps(note), encoding="utf-8")
        new.replace(handle.workspace / EXIT_FILE)
        return found

    def _lost(self, handle: JobHandle) -> JobExit:
        """Somebody removed the container; what is left of it goes too, as soon as the engine has finished."""
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                with engine_errors():
                    self._remove(self._name(handle.workspace))
                break
            except ServiceError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(self._poll_seconds)
        return JobExit(ExitReason.LOST, detail=f"{handle.label} was removed")

    def _facts(self, handle: JobHandle) -> dict[str, Any] | None:
        return container_facts(self._api, handle.id)

    def _follow(self, handle: JobHandle, known_bytes: int) -> None:
        """Append what the engine has and the file has not: an adopted log has no holes and no line twice."""
        with suppress(Exception), (handle.workspace / LOG_FILE).open("ab", buffering=0) as file:
            for piece in connect(self._settings).logs(handle.id, stream=True, follow=True):
                skipped = min(known_bytes, len(piece))
                known_bytes -= skipped
                file.write(piece[skipped:])

    def _remove(self, name: str) -> None:
        from docker.errors import NotFound

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
            key=facts["Config"]["Labels"]["airloom.key"],
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


def _is_gone(facts: dict[str, Any] | None) -> bool:
    return facts is None or facts["State"]["Status"] in {"removing", "dead"}


def _exit_of(facts: dict[str, Any], noted: dict[str, Any] | None, stopped: bool) -> JobExit:  # noqa: PLR0911 - one each
    """From what the engine and the container's first program say; never from the log."""
    state = facts["State"]
    code = int(state["ExitCode"])
    seconds = 0.0 if state["Error"] else _seconds(state["FinishedAt"]) - _seconds(state["StartedAt"])
    used = {name: noted[name] for name in ("cpu_seconds", "peak_memory_bytes")} if noted else {}
    if stopped:
        return JobExit(ExitReason.STOPPED, seconds=seconds, **used)
    if state["OOMKilled"]:
        used["peak_memory_bytes"] = int(facts["HostConfig"]["Memory"])
        return JobExit(ExitReason.MEMORY_LIMIT, seconds=seconds, **used)
    if state["Error"]:
        return JobExit(ExitReason.NOT_STARTED, detail=state["Error"])
    if noted is None:
        if code == _LOST_CODE or code <= _SIGNAL_BASE:
            return JobExit(ExitReason.LOST, detail=f"its container ended with {code}", seconds=seconds)
        return JobExit(ExitReason.SIGNALLED, signal=code - _SIGNAL_BASE, seconds=seconds)
    if noted["timed_out"]:
        return JobExit(ExitReason.TIMEOUT, seconds=seconds, **used)
    if noted["code"] < 0:
        return JobExit(ExitReason.SIGNALLED, signal=-noted["code"], seconds=seconds, **used)
    return JobExit(ExitReason.EXITED, exit_code=noted["code"], seconds=seconds, **used)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.split(".", maxsplit=1)[0].rstrip("Z") + "+00:00").timestamp()
