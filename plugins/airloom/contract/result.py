"""The file in which a stage says what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from airloom.contract.base import Frozen
from airloom.contract.digest import sha256_tree
from airloom.contract.enums import Stage


class Output(Frozen):
    """A folder that a stage filled.

    `digest` is `sha256_tree` of the folder.
    """

    path: Path
    digest: str
    files: int
    size_bytes: int

    @classmethod
    def of(cls, folder: Path) -> Output:
        """Measure a folder."""
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return cls(path=folder, digest=sha256_tree(folder), files=len(sizes), size_bytes=sum(sizes))


class StageResult(Frozen):
    """What a stage writes: the whole of what the platform learns from it.

    Attributes:
        status: `ok`, or `failed` with `error` saying why.
        outputs: name -> what was written, measured by the stage.
        metrics: name -> value, as decided on by the gate and shown in Prometheus.
        facts: name -> short text for later tasks, such as `model_uri`.
        error: what was wrong, the value found and what to do; `None` when ok.
    """

    schema_version: Literal[1] = 1
    stage: Stage
    status: Literal["ok", "failed"]
    outputs: dict[str, Output] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    facts: dict[str, str] = Field(default_factory=dict)
    error: str | None = None
    started_at: float
    finished_at: float
