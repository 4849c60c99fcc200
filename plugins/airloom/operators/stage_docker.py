"""A durable DockerOperator for any DAG: its container outlives worker and scheduler, and the next try adopts it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow.providers.docker.exceptions import DockerContainerFailedException, DockerContainerFailedSkipException
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airloom.contract.digest import sha256_bytes
from airloom.errors import AirloomError, ConfigError, ConflictError, UnavailableError
from airloom.hooks.runner import ExitReason, JobExit
from airloom.operators.docker_end import why_failed
from airloom.operators.registry_login import login_from
from airloom.operators.wanted import STOP_SECONDS, StageLeftRunningError, is_wanted, map_index_of
from airloom.settings import get_settings
from airloom.spec.units import parse_size

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

    from airloom.hooks.docker_task import TaskContainer

IMAGE_XCOM = "image_digest"
RESULT_MAX_BYTES = 256 * 1024
_LAST_LINES = 15


class StageDockerOperator(DockerOperator):
    """Run a container as `DockerOperator` does, but as a job of its own that tries find again.

    The container is labelled before it starts (`airloom.instance`, `.dag`, `.run`, `.task`, `.map_index`, `.try`,
    `.key`) and runs detached. A try that finds one with the same image, command and inputs adopts it, or takes its
    result if it ended well meanwhile; another is ended. The outcome is the exit code and what the engine says of
    memory, never the log. When the task is told to end, its container is stopped, unless Airflow still wants the task.

    What `DockerOperator` takes is taken here, with other defaults and meanings for some:

    Args:
        image: by tag, by digest (`name@sha256:…`) or by id; what really ran goes to the log and to the XCom
            `image_digest`.
        docker_url: empty: the engine of Airloom's settings, with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH.
        docker_conn_id: login of the image's registry, asked for only when the image has to be pulled.
        cpus, mem_limit, shm_size: hard limits, or none where not given. Sizes are bytes, or such as `512MiB`, `2g`.
        gpus: how many; an engine that cannot give them fails the task, with what it said and what to do.
        private_environment: secrets. Not templated; masked in the log.
        private_environment_in: `file`: a shell in the image (`/bin/sh`) reads it from a file and deletes that before
            it runs the command, so that nothing of it stands in the container's configuration. `config`: as
            `DockerOperator` does, for images without a shell; whoever may ask the engine can read it.
        result_path: absolute path of a JSON file in the container that becomes the task's result; `/airloom` is made
            for it, and any user of the container may write there. Without it the result is the log's last line.
            (templated)
        result_max_bytes: a larger result fails the task.
        auto_remove: `force` (default): the container is removed once its end has been taken; `success`: only one
            that ended well; `never`. What stays is removed by Airloom's reaper when its run is over.
        init: whether the container gets a first process that hands signals on.

    Raises:
        AirflowFailException: trying again would not help.
        DockerContainerFailedException, AirflowException: it might.
        DockerContainerFailedSkipException: the exit code is one of `skip_on_exit_code`.
    """

    template_fields: Sequence[str] = (*DockerOperator.template_fields, "result_path")

    def __init__(
        self,
        *,
        image: str,
        docker_url: str | list[str] | None = None,
        cpus: float | None = None,
        mem_limit: float | str | None = None,
        shm_size: int | str | None = None,
        gpus: int = 0,
        private_environment: dict[str, str] | None = None,
        private_environment_in: Literal["file", "config"] = "file",
        result_path: str | None = None,
        result_max_bytes: int = RESULT_MAX_BYTES,
        auto_remove: Literal["never", "success", "force"] = "force",
        mount_tmp_dir: bool = False,
        retrieve_output: bool = False,
        xcom_all: bool = False,
        init: bool = True,
        **kwargs: Any,
    ) -> None:
        _refuse(mount_tmp_dir=mount_tmp_dir, retrieve_output=retrieve_output, xcom_all=xcom_all)
        if private_environment_in not in {"file", "config"}:
            raise ValueError(f"private_environment_in is {private_environment_in!r}; it may be 'file' or 'config'")
        if gpus and kwargs.get("device_requests"):
            raise ValueError("gpus and device_requests are both set; use one of them")
        super().__init__(
            image=image,
            docker_url=docker_url,
            mem_limit=mem_limit,
            private_environment=private_environment,
            auto_remove=auto_remove,
            mount_tmp_dir=False,
            **kwargs,
        )
        self.engine_urls = (docker_url,) if isinstance(docker_url, str) else tuple(docker_url or ())
        self.cpus = cpus
        self.memory_bytes = _size_bytes("mem_limit", mem_limit)
        self.shm_size = _size_bytes("shm_size", shm_size)
        self.gpus = gpus
        self.private_environment_in = private_environment_in
        self.result_path = result_path
        self.result_max_bytes = result_max_bytes
        self.init = init
        self._told_to_end = False
        self._waits = False
        self._runs: tuple[TaskContainer, str] | None = None

    @cached_property
    def cli(self) -> Any:
        """A client that has logged in nowhere."""
        return self._connect()

    def execute(self, context: Context) -> Any:
        self._told_to_end, self._waits, self._runs = False, True, None
        try:
            return self._execute(context)
        except AirloomError as error:
            again = getattr(error, "retryable", False)
            raise (AirflowException if again else AirflowFailException)(str(error)) from error
        finally:
            self._waits = False

    def on_kill(self) -> None:
        """Called by Airflow in a signal handler while `execute` goes on, or after a timeout has ended it."""
        self._told_to_end = True
        if self._runs is not None and not self._waits:
            job, container = self._runs
            self.log.info("stopping container %s", container[:12])
            job.stop(container, STOP_SECONDS)
            job.release(container, keep=self.auto_remove == "never")

    def _execute(self, context: Context) -> Any:
        from airloom.hooks.docker_task import TaskContainer, TaskId

        ti, settings = context["ti"], get_settings()
        self._check_result_path()
        self._normalize_mounts()
        self._mask()
        job = TaskContainer(
            settings,
            TaskId(dag=ti.dag_id, run=ti.run_id, task=ti.task_id, map_index=map_index_of(ti)),
            client=self._connect,
            address=self._address,
            key=self._key(),
            name=self.container_name or "",
            on_note=lambda line: self.log.info("%s", line),
        )
        good_codes = {0, *(code for code in range(256) if code in self.skip_on_exit_code)}
        container = job.find(good_codes)
        if container is None:
            try:
                container = self._start(job, ti)
            except ConflictError:  # another try was faster, or the name is somebody else's
                container = job.find(good_codes)
                if container is None:
                    raise
        self.container = {"Id": container}
        self._runs = (job, container)
        image, digest = job.image_of(container, self.image)
        self.log.info("image %s is %s", self.image, f"{digest}, id {image}" if digest else f"{image}, in no registry")
        if self.do_xcom_push:
            ti.xcom_push(key=IMAGE_XCOM, value=digest or image)
        with tempfile.TemporaryDirectory(prefix="airloom-log-") as folder:
            log_file = Path(folder) / "log"
            ended = job.wait(container, log_file, self._show, self._should_stop(ti), STOP_SECONDS)
            try:
                value = self._outcome(job, container, ended, log_file)
            except UnavailableError:
                raise  # the next try takes what stands there
            except Exception:
                job.release(container, keep=self.auto_remove in {"never", "success"})
                raise
        job.release(container, keep=self.auto_remove == "never")
        return value

    def _start(self, job: TaskContainer, ti: Any) -> str:
        from airloom.hooks.docker_container import TRY_LABEL
        from airloom.hooks.docker_engine import ensure_image

        login = login_from(self.docker_conn_id, required=True) if self.docker_conn_id else None
        ensure_image(job.api, get_settings(), self.image, login=login, always=self.force_pull)
        in_file = self.private_environment_in == "file"
        labels = self.labels if isinstance(self.labels, dict) else dict.fromkeys(self.labels or (), "")
        return job.start(
            self._creation(job.api, {} if in_file else self._private_environment),
            labels={**labels, TRY_LABEL: str(ti.try_number)},
            private=self._private_environment if in_file else None,
            folder=self.result_path is not None,
        )

    def _creation(self, api: Any, private: dict[str, str]) -> dict[str, Any]:
        """What `DockerOperator` hands to the engine, but for its limits."""
        from docker.types import LogConfig

        from airloom.hooks.docker_container import limits

        log_options = {"max-size": self.log_opts_max_size, "max-file": self.log_opts_max_file}
        found = limits(
            api,
            memory_bytes=self.memory_bytes,
            cpus=self.cpus,
            shm_bytes=self.shm_size,
            gpus=self.gpus,
            gpu_key="gpus",
        )
        found["device_requests"] = found["device_requests"] or self.device_requests
        host = api.create_host_config(
            mounts=self.mounts,
            network_mode=self.network_mode,
            dns=self.dns,
            dns_search=self.dns_search,
            port_bindings=self.port_bindings,
            cap_add=self.cap_add,
            extra_hosts=self.extra_hosts,
            privileged=self.privileged,
            log_config=LogConfig(config={name: value for name, value in log_options.items() if value is not None}),
            ipc_mode=self.ipc_mode,
            ulimits=self.ulimits,
            init=self.init,
            restart_policy={"Name": "no"},
            **found,
        )
        return {
            "image": self.image,
            "command": self.format_command(self.command),
            "entrypoint": self.format_command(self.entrypoint),
            "environment": {**self._plain_environment(), **private},
            "ports": list(self.port_bindings),
            "host_config": host,
            "user": self.user,
            "working_dir": self.working_dir,
            "tty": self.tty,
            "hostname": self.hostname,
        }

    def _outcome(self, job: TaskContainer, container: str, ended: JobExit, log_file: Path) -> Any:
        from airloom.hooks.log_tail import last_lines

        lines = last_lines(log_file, _LAST_LINES)
        if ended.reason is ExitReason.EXITED:
            if ended.exit_code == 0:
                if self.result_path is not None:
                    return job.result(container, self.result_path, self.result_max_bytes)
                return lines[-1] if lines and self.do_xcom_push else None
            if ended.exit_code in self.skip_on_exit_code:
                raise DockerContainerFailedSkipException(f"exit code {ended.exit_code} means to skip", logs=lines)
        with_shell = bool(self._private_environment) and self.private_environment_in == "file"
        message = why_failed(ended, memory_bytes=self.memory_bytes, with_shell=with_shell)
        if ended.reason is ExitReason.MEMORY_LIMIT:
            raise AirflowFailException(message)
        raise DockerContainerFailedException(message, logs=lines)

    def _should_stop(self, ti: Any) -> Any:
        def should_stop() -> bool:
            if not self._told_to_end:
                return False
            if not is_wanted(ti):
                return True
            raise StageLeftRunningError("this try ends, but its container goes on", hint="the next try adopts it")

        return should_stop

    def _show(self, line: str) -> None:
        from airloom.hooks.log_tail import printable

        self.log.info("%s", printable(line))

    def _key(self) -> str:
        """Digest of what the container is to do.

        The names of the private environment count and not its values: a token that is new with every try
        makes no other work, and no digest of a secret is to stand in a label. Limits don't count either.
        """
        work = {
            "image": self.image,
            "command": self.format_command(self.command),
            "entrypoint": self.format_command(self.entrypoint),
            "environment": self._plain_environment(),
            "private": sorted(self._private_environment),
            "mounts": self.mounts,
            "user": self.user,
            "working_dir": self.working_dir,
            "result_path": self.result_path,
        }
        return sha256_bytes(json.dumps(work, sort_keys=True, default=str).encode())

    def _plain_environment(self) -> dict[str, Any]:
        file = self.unpack_environment_variables(self.env_file) if self.env_file is not None else {}
        return {**file, **self.environment}

    def _check_result_path(self) -> None:
        if self.result_path is not None and not self.result_path.startswith("/"):
            raise ConfigError(
                f"result_path is {self.result_path!r}", hint="an absolute path, such as /airloom/result.json"
            )

    def _mask(self) -> None:
        from airflow.sdk.log import mask_secret

        for value in self._private_environment.values():
            mask_secret(value)

    @property
    def _address(self) -> Any:
        from airloom.hooks.docker_engine import EngineAddress

        if not self.engine_urls:
            return None
        return EngineAddress(
            self.engine_urls,
            ca_cert=self.tls_ca_cert or "",
            client_cert=self.tls_client_cert or "",
            client_key=self.tls_client_key or "",
            verify=self.tls_verify,
            version="" if self.api_version in {None, "auto"} else self.api_version,
            timeout_seconds=self.timeout,
        )

    def _connect(self) -> Any:
        from airloom.hooks.docker_engine import connect, connect_to

        return connect_to(self._address) if self.engine_urls else connect(get_settings())


def _refuse(*, mount_tmp_dir: bool, retrieve_output: bool, xcom_all: bool) -> None:
    """What can't be had together with a container that outlives its task, or safely."""
    if mount_tmp_dir:
        raise ValueError(
            "mount_tmp_dir=True mounts a folder of the worker, which is deleted when the worker ends while the "
            "container goes on, and which a remote engine doesn't have; mount a named volume by mounts"
        )
    if retrieve_output:
        raise ValueError(
            "retrieve_output=True unpickles what the container wrote, which may run any code in the worker; write "
            "JSON, and name it: result_path='/airloom/result.json'"
        )
    if xcom_all:
        raise ValueError(
            "xcom_all=True puts the whole log into Airflow's database; write what is needed as JSON, and name it: "
            "result_path='/airloom/result.json'"
        )


def _size_bytes(name: str, value: float | str | None) -> int | None:
    """Bytes of `512MiB` as of Docker's own `512m`.

    Raises:
        ValueError: it is neither, or not above 0.
    """
    from docker.errors import DockerException
    from docker.utils import parse_bytes

    if value is None:
        return None
    try:
        found = (
            parse_size(value) if isinstance(value, str) and value.rstrip().endswith("iB") else int(parse_bytes(value))
        )
    except (DockerException, ValueError) as error:
        raise ValueError(f"{name} is {value!r}; expected bytes, or a size such as 512MiB or 2g") from error
    if found <= 0:
        raise ValueError(f"{name} is {value!r}; it has to be above 0")
    return found
