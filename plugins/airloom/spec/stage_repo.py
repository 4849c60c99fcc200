"""`stages.yaml` of a stage repo: which stages it holds and which files each is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from airloom.contract.base import Frozen
from airloom.contract.digest import sha256_bytes, sha256_file
from airloom.contract.enums import Stage
from airloom.errors import ConfigError

STAGES_FILE = "stages.yaml"

Runtime = Literal["preprocessing", "training", "serving"]


class StageSource(Frozen):
    """The files and folders that a stage is made of, relative to the repo: a change elsewhere doesn't run it again."""

    paths: list[str] = Field(min_length=1)


class StageRepo(Frozen):
    """`stages.yaml`.

    Attributes:
        runtime: what the repo's Dockerfile builds from; needed only where images are built.
        tests: what a build runs with pytest before it takes a commit: files or folders, quick ones.
    """

    runtime: Runtime | None = None
    tests: list[str] = Field(default_factory=list)
    stages: dict[Stage, StageSource]

    @classmethod
    def load(cls, checkout: Path) -> StageRepo:
        """Read a checkout's `stages.yaml`.

        Raises:
            ConfigError: it is missing, wrong, or names a path that is not in the checkout.
        """
        path = checkout / STAGES_FILE
        try:
            repo = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(
                f"{path.parent.name}: no {STAGES_FILE} in the repo", hint="list its stages and their paths there"
            ) from None
        except (yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
        for stage, source in repo.stages.items():
            for name in source.paths:
                if not (checkout / name).exists():
                    raise ConfigError(f"{path}: stages.{stage.value}.paths: {name!r} is not in the repo")
        for name in repo.tests:
            if not (checkout / name).exists():
                raise ConfigError(f"{path}: tests: {name!r} is not in the repo")
        return repo

    def code_digest(self, checkout: Path, stage: Stage) -> str:
        """Digest of the names and bytes of the files that a stage is made of.

        Raises:
            ConfigError: the repo holds no such stage.
        """
        if stage not in self.stages:
            raise ConfigError(f"{STAGES_FILE} has no stage {stage.value!r}", hint=f"it has: {', '.join(self.stages)}")
        files: set[Path] = set()
        for name in self.stages[stage].paths:
            path = checkout / name
            files.update(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else files.add(path)
        kept = sorted(p for p in files if "__pycache__" not in p.parts)
        lines = [f"{sha256_file(p)}  {p.relative_to(checkout).as_posix()}\n" for p in kept]
        return sha256_bytes("".join(lines).encode())
