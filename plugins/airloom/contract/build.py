"""What is known of a commit that was built."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from airloom.contract.base import Frozen
from airloom.contract.enums import Stage
from airloom.contract.image import ImageRef

Telling = Literal["not asked", "due", "told", "no pipeline", "superseded"]


class BuildFailure(Frozen):
    """`builds/<repo>/<commit>.failure.json` in the store: the commit cannot be used, until a person has it built."""

    schema_version: Literal[1] = 1
    repo: str
    commit: str
    reason: str
    hint: str | None = None
    failed_at: datetime


class BuildRecord(Frozen):
    """`builds/<repo>/<commit>.json` in the store.

    Attributes:
        pusher: who pushed it, as far as that is known.
        environment: digest of what the code runs in.
        image: what was built, where the installation builds images.
        stages: stage -> digest of the files that it is made of.
        seconds: how long the build took.
        url: where its log is read, as far as that is known.
        announced: whether Airflow has been told of it.
        airflow: what came of that. `due`: it is to be told, and has not taken it yet. `no pipeline`: none used the
            repo. `superseded`: a later commit of the branch had been told of before.
        created: false in an answer that found an earlier build of the same commit and environment.
    """

    schema_version: Literal[1] = 1
    repo: str
    commit: str
    message: str
    author: str
    pusher: str = ""
    environment: str
    stages: dict[Stage, str]
    image: ImageRef | None = None
    built_at: datetime
    seconds: float
    url: str = ""
    announced: bool = False
    airflow: Telling = "not asked"
    created: bool = True
