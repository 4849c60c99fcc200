"""Runner `docker`: a stage as a container that outlives whoever started it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from airloom.errors import ConfigError, ConflictError
from airloom.hooks import docker_files
from airloom.hooks.docker_engine import connect, engine_errors, ensure_image
from airloom.hooks.log_tail import LogTail
from airloom.hooks.process_environment import THREAD_VARIABLES
from airloom.hooks.runner import LOG_FILE, ExitReason, JobExit, JobHandle, OnLog, ShouldStop, StageJob
from airloom.settings import Settings

EXIT_FILE, STOP_FILE, COLLECTED_FILE = "container-exit.json", "container-stop", "collected"
POLL_SECONDS = 0.2
# `docker inspect` shows a container's environment: what may be secret comes in a file that is gone once it is read.
_BOOT = (
    "import json, os, sys; path = '/airloom/work/environment.json'; more = json.load(open(path)); os.unlink(path); "
    "os.execvpe(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **more})"
)


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
        workspace, name = job.workspace, self._name(job.workspace)
        ensure_image(self._api, self._settings, job.image)
        with engine_errors():
            found = self.find(workspace)
            if found is not None and found.running:
                raise ConflictError(f"{found.label} runs for {workspace} already", hint="stop it, or wait for its end")
            self._remove(name)
            for file in (EXIT_FILE, STOP_FILE, COLLECTED_FILE, LOG_FILE, "result.json"):
                (workspace / file).unlink(missing_ok=True)
            labels = {
                "airloom.instance": self._settings.instance_id,
                "airloom.pipeline": job.pipeline,
                "airloom.run": job.run_id,
                "airloom.stage": job.stage.value,
                "airloom.key": job.key,
                "airloom.job": name,
                "airloom.timeout": str(job.timeout_seconds),
                "airloom.grace": str(job.grace_seconds),
            }
            self._api.create_volume(name, labels=labels)
            self._create(job, name, labels)
            environment = json.dumps(dict(job.environment)).encode()
            docker_files.send(self._api, name, job, environment)
            self._api.start(name)
            return self._handle(workspace, self._api.inspect_container(name))

    def find(self, workspace: Path) -> JobHandle | None:
        """See `Runner.find`."""
        from docker.errors import NotFound

        with engine_errors():
            try:
                facts = self._api.inspect_container(self._name(workspace))
            except NotFound:
                known = _read(workspace / EXIT_FILE)
                if known is None:
                    return None
                collected = (workspace / COLLECTED_FILE).exists()
                return JobHandle(known["id"], known["key"], workspace, known["label"], False, collected)
        if facts["State"]["Status"] == "created":
            return None  # whoever made it was killed before its start
        return self._handle(workspace, facts)

    def wait(self, handle: JobHandle, on_log: OnLog, should_stop: ShouldStop) -> JobExit:
        """See `Runner.wait`. The log is written anew from the engine's, so that an adopted one has no holes."""
        known = _read(handle.workspace / EXIT_FILE)
        if known is not None and known["id"] == handle.id:
            return JobExit(**{**known["exit"], "reason": ExitReason(known["exit"]["reason"])})
        follower = threading.Thread(target=self._follow, args=(handle,), daemon=True)
        (handle.workspace / LOG_FILE).write_bytes(b"")
        follower.start()
        tail, asked = LogTail(handle.workspace / LOG_FILE), False
        while True:
            facts = self._facts(handle)
            for line in tail.read():
                on_log(line)
            if facts is None or not facts["State"]["Running"]:
                break
            labels = facts["Config"]["Labels"]
            if time.time() - _seconds(facts["State"]["StartedAt"]) > float(labels["airloom.timeout"]):
                self._stop(handle, float(labels["airloom.grace"]), ExitReason.TIMEOUT)
            elif not asked and should_stop():
                asked = True
                self.request_stop(handle)
            time.sleep(self._poll_seconds)
        follower.join(30)
        for line in tail.rest():
            on_log(line)
        return self._end(handle, facts)

    def stop(self, handle: JobHandle, grace_seconds: float) -> None:
        """See `Runner.stop`."""
        self._stop(handle, grace_seconds, ExitReason.STOPPED)

    def request_stop(self, handle: JobHandle) -> None:
        """See `Runner.request_stop`."""
        threading.Thread(target=self.stop, args=(handle, 10.0), daemon=True).start()

    def mark_collected(self, handle: JobHandle) -> None:
        """See `Runner.mark_collected`. The container and its volume are of no more use."""
        with suppress(OSError):
            (handle.workspace / COLLECTED_FILE).write_text(handle.id, encoding="ascii")
        with engine_errors():
            self._remove(self._name(handle.workspace))

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
            nano_cpus=int(min(job.cpus, os.cpu_count() or 1) * 1e9),
            shm_size=256 * 2**20,
            pids_limit=1024,
            restart_policy={"Name": "no"},
            device_requests=gpus,
        )
        variables = {name: str(max(1, int(job.cpus))) for name in THREAD_VARIABLES}
        variables |= {"HOME": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108
        arguments = [job.stage.value, "--request", "/airloom/work/request.json", "--result", "/airloom/work/result.json"]
        self._api.create_container(
            job.image,
            name=name,
            entrypoint=["python3", "-c", _BOOT],
            command=["main.py", *arguments],
            working_dir="/app",
            user=f"{docker_files.USER}:{docker_files.USER}",
            environment=variables,
            labels=labels,
            host_config=host,
        )

    def _end(self, handle: JobHandle, facts: dict[str, Any] | None) -> JobExit:
        if facts is None:
            return JobExit(ExitReason.LOST, detail=f"{handle.label} was removed")
        with engine_errors():
            docker_files.fetch(self._api, handle.id, handle.workspace)
        state, asked = facts["State"], _read(handle.workspace / STOP_FILE)
        code = int(state["ExitCode"])
        seconds = _seconds(state["FinishedAt"]) - _seconds(state["StartedAt"])
        if asked is not None:
            found = JobExit(ExitReason(asked["reason"]), seconds=seconds)
        elif state["OOMKilled"]:
            found = JobExit(ExitReason.MEMORY_LIMIT, seconds=seconds)
        elif state["Error"]:
            found = JobExit(ExitReason.NOT_STARTED, detail=state["Error"], seconds=seconds)
        elif code == 255:  # what the engine says of containers that it lost sight of
            found = JobExit(ExitReason.LOST, seconds=seconds)
        elif code > 128:
            found = JobExit(ExitReason.SIGNALLED, signal=code - 128, seconds=seconds)
        else:
            found = JobExit(ExitReason.EXITED, exit_code=code, seconds=seconds)
        note = {"id": handle.id, "key": handle.key, "label": handle.label, "exit": asdict(found)}
        (handle.workspace / EXIT_FILE).write_text(json.dumps(note), encoding="utf-8")
        return found

    def _stop(self, handle: JobHandle, grace_seconds: float, reason: ExitReason) -> None:
        from docker.errors import NotFound

        facts = self._facts(handle)
        if facts is None or not facts["State"]["Running"]:
            return
        (handle.workspace / STOP_FILE).write_text(json.dumps({"reason": reason.value}), encoding="ascii")
        with engine_errors(), suppress(NotFound):
            self._api.stop(handle.id, timeout=max(1, round(grace_seconds)))

    def _facts(self, handle: JobHandle) -> dict[str, Any] | None:
        from docker.errors import NotFound

        with engine_errors():
            try:
                facts: dict[str, Any] = self._api.inspect_container(handle.id)
            except NotFound:
                return None
        return facts

    def _follow(self, handle: JobHandle) -> None:
        with suppress(Exception), (handle.workspace / LOG_FILE).open("ab", buffering=0) as file:
            for piece in connect(self._settings).logs(handle.id, stream=True, follow=True):
                file.write(piece)

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


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.split(".", maxsplit=1)[0].rstrip("Z") + "+00:00").timestamp()
