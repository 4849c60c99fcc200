"""One task's container on any engine, as a durable job: found by its labels, adopted, stopped, its result taken."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from airloom.errors import AirloomError, ConflictError, ContractError, ServiceError, StageFailedError
from airloom.hooks.docker_container import (
    INSTANCE_LABEL,
    KEY_LABEL,
    POLL_SECONDS,
    TRY_LABEL,
    engine_exit,
    is_gone,
    seconds_of,
    watch,
)
from airloom.hooks.docker_engine import EngineAddress, connect, connect_to, container_facts, engine_errors
from airloom.hooks.docker_gpu import gpu_refusal
from airloom.hooks.docker_private import folder_archive, with_boot
from airloom.hooks.runner import ExitReason, JobExit, OnLog, ShouldStop
from airloom.settings import Settings

DAG_LABEL, RUN_LABEL, TASK_LABEL, MAP_LABEL = "airloom.dag", "airloom.run", "airloom.task", "airloom.map_index"
_CONFLICT = 409

log = logging.getLogger(__name__)

MakeClient = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class TaskId:
    """A task of a run. `map_index` is -1 where it is not mapped."""

    dag: str
    run: str
    task: str
    map_index: int = -1

    def labels(self, instance: str) -> dict[str, str]:
        """What all containers of the task have, and no others."""
        return {
            INSTANCE_LABEL: instance,
            DAG_LABEL: self.dag,
            RUN_LABEL: self.run,
            TASK_LABEL: self.task,
            MAP_LABEL: str(self.map_index),
        }

    def container_name(self, instance: str) -> str:
        """The same for every try."""
        digest = hashlib.sha256(json.dumps(list(self.labels(instance).values())).encode()).hexdigest()[:16]
        return f"airloom-{instance}-task-{digest}"


class Found(StrEnum):
    """What a try does with the container of an earlier one."""

    ADOPT = "adopt"  # it runs, and is this very work
    TAKE = "take"  # it ended well, and nobody has taken its result
    REPLACE = "replace"


def decide(facts: dict[str, Any], key: str, good_codes: Collection[int]) -> Found:
    """From what the engine knows of a container to what is to become of it."""
    if is_gone(facts) or (facts["Config"]["Labels"] or {}).get(KEY_LABEL) != key:
        return Found.REPLACE
    if facts["State"]["Running"]:
        return Found.ADOPT
    if facts["State"]["Status"] != "exited":  # it was made, and whoever made it was killed before its start
        return Found.REPLACE
    ended = exit_of(facts, stopped=False)
    well = ended.reason is ExitReason.EXITED and ended.exit_code in good_codes
    return Found.TAKE if well else Found.REPLACE


def exit_of(facts: dict[str, Any] | None, *, stopped: bool) -> JobExit:
    """How a container ended, by its exit code and what the engine adds; never by its log."""
    if facts is None or is_gone(facts):
        return JobExit(ExitReason.STOPPED if stopped else ExitReason.LOST)
    code = int(facts["State"]["ExitCode"])
    return engine_exit(facts, stopped=stopped) or JobExit(ExitReason.EXITED, exit_code=code, seconds=seconds_of(facts))


class TaskContainer:
    """The container of one task.

    Args:
        client: makes a client of the engine; called again for the thread that reads the log.
        address: of the engine, where it is not the settings' own; lets the reaper find it.
        key: digest of what the container is to do: one with another key is other work.
        name: instead of the one made of the task.
        on_note: gets a line for each thing that was decided.
    """

    def __init__(
        self,
        settings: Settings,
        task: TaskId,
        *,
        client: MakeClient,
        key: str,
        address: EngineAddress | None = None,
        name: str = "",
        on_note: OnLog = log.info,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.name = name or task.container_name(settings.instance_id)
        self.api = client()
        self._settings = settings
        self._labels = task.labels(settings.instance_id)
        self._client = client
        self._address = address
        self._key = key
        self._note = on_note
        self._poll_seconds = poll_seconds
        self._stopped = False

    def find(self, good_codes: Collection[int]) -> str | None:
        """The container of an earlier try whose work, or result, is this try's; its id. Others that run are ended.

        Raises:
            ConflictError: somebody else's container has the name.
        """
        for facts in _containers(self.api, self._labels):
            if facts["Name"].lstrip("/") == self.name:
                continue
            if facts["State"]["Running"]:  # left by one that was killed while it stopped it
                self._note(f"{_label(facts['Id'])} of an earlier try still runs: ending it")
                _remove(self.api, facts["Id"])
        named = container_facts(self.api, self.name)
        if named is None:
            return None
        self._check_owner(named)
        found, container = decide(named, self._key, good_codes), str(named["Id"])
        started_by = f"which try {named['Config']['Labels'].get(TRY_LABEL)} started"
        if found is Found.ADOPT:
            self._note(f"adopting {_label(container)}, {started_by}; its log from the beginning:")
            return container
        if found is Found.TAKE:
            self._note(f"{_label(container)}, {started_by}, has ended meanwhile: taking its result; its log:")
            return container
        self._note(f"{_label(container)}, {started_by}, is {_state(named)} and no use to this try: removing it")
        _remove(self.api, container)
        return None

    def start(
        self, creation: Mapping[str, Any], *, labels: Mapping[str, str], private: Mapping[str, str] | None, folder: bool
    ) -> str:
        """Make a container with its labels, then start it; its id. It belongs to nobody, and outlives this process.

        Args:
            creation: what `create_container` takes, but for name and labels.
            labels: more of them.
            private: environment that stands in no configuration of the container; None: none.
            folder: whether the container gets `/airloom`, which all its users may write to.

        Raises:
            ConflictError: the name is taken, by another try that was faster or by somebody else.
            ConfigError: it is to have GPUs that the engine cannot give.
            ServiceError, UnavailableError: the engine.
        """
        from docker.errors import APIError

        creation = dict(creation)
        if private:
            creation |= with_boot(self.api, creation)
        archive = folder_archive(private) if private or folder else None
        _note_engine(self._settings, self._address)
        own = {**labels, **self._labels, KEY_LABEL: self._key}
        with engine_errors():
            try:
                container = str(self.api.create_container(**creation, name=self.name, labels=own)["Id"])
            except APIError as error:
                if error.status_code == _CONFLICT:
                    raise ConflictError(
                        f"a container {self.name} is there already", hint="does another try of this task run?"
                    ) from error
                raise
            try:
                if archive is not None:
                    self.api.put_archive(container, "/", archive)
            except BaseException:
                _remove(self.api, container)
                raise
            try:
                self.api.start(container)
            except APIError as error:
                if creation["host_config"].get("DeviceRequests"):
                    refusal = gpu_refusal(str(error.explanation), self.api.info(), "GPUs are needed", "gpus")
                    if refusal is not None:
                        _remove(self.api, container)
                        raise refusal from error
                facts = container_facts(self.api, container)
                if facts is not None and facts["State"]["Error"]:
                    return container  # its end tells what was wrong
                _remove(self.api, container)
                raise ServiceError(f"the engine did not start the container: {error.explanation}") from error
        self._note(f"started {_label(container)}, named {self.name}")
        return container

    def image_of(self, container: str, reference: str) -> tuple[str, str]:
        """What the container really runs: the image's id, and its digest in a registry, empty if it has none."""
        from docker.auth import resolve_repository_name
        from docker.utils import parse_repository_tag

        facts = container_facts(self.api, container)
        if facts is None:
            return "", ""
        image = str(facts["Image"])
        digests: list[str] = []
        with suppress(AirloomError), engine_errors():
            digests = self.api.inspect_image(image).get("RepoDigests") or []
        wanted = "" if reference.startswith("sha256:") else parse_repository_tag(reference)[0]
        same = [
            digest
            for digest in digests
            if wanted and resolve_repository_name(digest.split("@")[0]) == resolve_repository_name(wanted)
        ]
        return image, next(iter(same or digests), "")

    def wait(
        self, container: str, log_file: Path, on_log: OnLog, should_stop: ShouldStop, grace_seconds: float
    ) -> JobExit:
        """Hand on the log until the container has ended. What `should_stop` raises leaves it running."""
        facts = watch(
            self.api,
            self._client,
            container,
            log_file,
            on_log=on_log,
            should_stop=should_stop,
            stop=lambda: self.stop(container, grace_seconds),
            poll_seconds=self._poll_seconds,
        )
        return exit_of(facts, stopped=self._stopped)

    def stop(self, container: str, grace_seconds: float) -> None:
        """SIGTERM, and SIGKILL after the grace. No later try takes what it did for a result."""
        from docker.errors import NotFound

        self._stopped = True
        with engine_errors(), suppress(NotFound):
            self._forget(container)
            self.api.stop(container, timeout=max(1, int(grace_seconds)))

    def result(self, container: str, path: str, max_bytes: int) -> Any:
        """The JSON that the container wrote.

        Raises:
            ContractError: there is none, it is too large, or it is no JSON.
            StageFailedError: somebody has removed the container; another try may help.
        """
        content = self._file(container, path, max_bytes)
        try:
            return json.loads(content)
        except ValueError as error:
            raise ContractError(
                f"the result {path} is no JSON: {error}; it begins with {content[:60]!r}",
                hint="write JSON in UTF-8, to another name first, then rename it",
            ) from error

    def release(self, container: str, *, keep: bool) -> None:
        """Its end has been taken: remove it, or free its name so that no later try takes it again."""
        from docker.errors import NotFound

        with engine_errors(), suppress(NotFound):
            if keep:
                self._forget(container)
            else:
                _remove(self.api, container)

    def _forget(self, container: str) -> None:
        from docker.errors import APIError

        with suppress(APIError):
            self.api.rename(container, f"{self.name}-{container[:12]}")

    def _check_owner(self, facts: dict[str, Any]) -> None:
        labels = facts["Config"]["Labels"] or {}
        if any(labels.get(name) != value for name, value in self._labels.items()):
            raise ConflictError(
                f"the container {self.name} is not of this task: its labels are {labels}",
                hint="remove it, or leave container_name out: Airloom gives each task of each run a name",
            )

    def _file(self, container: str, path: str, max_bytes: int) -> bytes:
        from docker.errors import APIError, NotFound

        with engine_errors():
            try:
                chunks, about = self.api.get_archive(container, path)
            except APIError as error:
                # The engine says "not found" of a container that is gone, too: that tells nothing of its result.
                if is_gone(container_facts(self.api, container)):
                    raise StageFailedError(
                        "the container was removed before its result was taken, and not by this task",
                        hint="the next try starts it anew",
                        retryable=True,
                    ) from error
                if not isinstance(error, NotFound):
                    raise
                raise ContractError(
                    f"the container ended well, but left no {path}", hint="write it, or leave result_path out"
                ) from None
            if about["size"] > max_bytes:
                raise ContractError(
                    f"the result {path} holds {about['size']:,} bytes; at most {max_bytes:,} go to Airflow",
                    hint="put data into a store and its address into the result, or raise result_max_bytes",
                )
            content = b""
            for chunk in chunks:
                content += chunk
                if len(content) > max_bytes + 64 * 1024:
                    break
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member is not None and member.isfile() else None
            if file is None:
                raise ContractError(f"the result {path} is no plain file", hint="a link or a folder is not followed")
            return file.read(max_bytes)


@dataclass(frozen=True)
class TaskLeftover:
    """A container of a task, as the reaper finds it."""

    api: Any
    id: str
    task: TaskId

    @property
    def label(self) -> str:
        return _label(self.id)

    def end(self, grace_seconds: float) -> None:
        """Stop and remove it."""
        from docker.errors import NotFound

        with engine_errors(), suppress(NotFound):
            self.api.stop(self.id, timeout=max(1, int(grace_seconds)))
            _remove(self.api, self.id)


def find_task_containers(settings: Settings) -> Iterator[TaskLeftover]:
    """Every task's container of this installation, running or not, on every engine that its tasks have used.

    An engine that does not answer is passed over: it may be gone for ever.
    """
    for file in sorted(_engines(settings).glob("*.json")):
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
            noted["urls"] = tuple(noted["urls"])
            api = connect_to(EngineAddress(**noted)) if noted["urls"] else connect(settings)
            found = _containers(api, {INSTANCE_LABEL: settings.instance_id}, TASK_LABEL)
        except (AirloomError, OSError, ValueError, TypeError, KeyError) as error:
            log.warning("containers of tasks on an engine (%s) were not looked for: %s", file, error)
            continue
        for facts in found:
            labels = facts["Config"]["Labels"]
            task = TaskId(dag=labels[DAG_LABEL], run=labels[RUN_LABEL], task=labels[TASK_LABEL])
            yield TaskLeftover(api, facts["Id"], task)


def _note_engine(settings: Settings, address: EngineAddress | None) -> None:
    """Before a container is made: the reaper asks no engine that no task has used."""
    content = json.dumps(asdict(address or EngineAddress(urls=())), sort_keys=True)
    file = _engines(settings) / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{time.time_ns()}.new")
        new.write_text(content, encoding="utf-8")
        new.replace(file)


def _engines(settings: Settings) -> Path:
    return settings.home_dir / "task-engines"


def _containers(api: Any, labels: Mapping[str, str], *names: str) -> list[dict[str, Any]]:
    wanted = [*(f"{name}={value}" for name, value in labels.items()), *names]
    with engine_errors():
        listed = api.containers(all=True, filters={"label": wanted})
    found = [container_facts(api, item["Id"]) for item in listed]
    return [facts for facts in found if facts is not None and not is_gone(facts)]


def _remove(api: Any, container: str) -> None:
    """With its anonymous volumes. What is being removed already is as good as gone."""
    from docker.errors import APIError, NotFound

    with suppress(NotFound):
        try:
            api.remove_container(container, force=True, v=True)
        except APIError as error:
            if error.status_code != _CONFLICT:
                raise


def _label(container: str) -> str:
    return f"container {container[:12]}"


def _state(facts: dict[str, Any]) -> str:
    state = facts["State"]
    return f"exited with {state['ExitCode']}" if state["Status"] == "exited" else str(state["Status"])
