"""What one run of a pipeline is pinned to. `resolve` makes it once; every later task reads only it."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.digest import sha256_bytes
from airloom.contract.enums import Runner, Stage
from airloom.contract.image import ImageRef

_PLAIN_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,119}")


def safe_run_id(run_id: str) -> str:
    """A run's id as the name of a folder or an object: other ids get other names.

    Airflow's ids hold `:` and `+`, and may be given by people; what is replaced is made up for by a digest.
    """
    if _PLAIN_RUN_ID.fullmatch(run_id):
        return run_id
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_id).strip("-.")[:100]
    return f"{plain}-{sha256_bytes(run_id.encode())[:8]}".lstrip("-")


class CodePin(Frozen):
    """A commit of a stage repo."""

    repo: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    message: str
    author: str


class StagePin(Frozen):
    """What a stage runs from.

    Attributes:
        repo: the stage repo; its commit is in `RunPlan.code`.
        code_digest: digest of the files that the stage is made of: the same for commits that
            differ elsewhere.
        environment: digest of what the code runs in: the runtime image, or the installed packages.
        image: what holds code and runtime, where stages run in containers.
        params: the stage's parameters.
        seed: for every random number generator of the stage.
    """

    repo: str
    code_digest: str
    environment: str
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    image: ImageRef | None = None


class SourcePin(Frozen):
    """The raw data that a run reads.

    `manifest` is the URI of a JSON-lines file with one object a line: `key`, `etag`, `size_bytes` and,
    where the store keeps versions, `version_id`. `digest` is the SHA-256 of its (key, etag, size) part.
    """

    uri: str
    manifest: str
    digest: str
    objects: int
    size_bytes: int


class Trigger(Frozen):
    """Why the run was started."""

    kind: Literal["manual", "push", "schedule", "asset"]
    by: str = ""
    detail: str = ""


class DataVersion(Frozen):
    """A DVC-tracked state of a dataset, and the tag that names it.

    Attributes:
        tag: name of the version tag.
        commit: the commit that the tag points at: the code commit plus the data pointer.
        repo: the repo that holds them.
        path: of the dataset inside that commit.
        md5: DVC's hash of the folder, ending in `.dir`.
    """

    tag: str
    repo: str
    commit: str
    code_commit: str
    path: str
    md5: str
    files: int
    size_bytes: int
    digest: str
    created: bool = True


class RunPlan(Frozen):
    """Everything that one run means, pinned.

    Attributes:
        created_at: when that was decided: of what a push has started, by its event, else by the run's first task.
    """

    schema_version: Literal[1] = 1
    pipeline: str
    run_id: str
    created_at: datetime
    runner: Runner
    spec: dict[str, Any]
    spec_digest: str
    code: dict[str, CodePin]
    stages: dict[Stage, StagePin]
    source: SourcePin
    trigger: Trigger
    reproduces: str | None = None
    force: bool = False
    skip_approval: bool = False

    @property
    def prefix(self) -> str:
        """Where the run's own objects stand in the store's bucket for runs: `runs/<pipeline>/<run>`."""
        return f"runs/{self.pipeline}/{safe_run_id(self.run_id)}"

    def code_of(self, stage: Stage) -> CodePin:
        """The commit that a stage runs from."""
        return self.code[self.stages[stage].repo]
