"""Closed sets that more than one part of the platform speaks of."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Stage(StrEnum):
    """A step that runs in a stage image."""

    PREPROCESS = "preprocess"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SERVE = "serve"
    DRIFT = "drift"


class Runner(StrEnum):
    """How a stage is run."""

    PROCESS = "process"
    DOCKER = "docker"


class DeployTarget(StrEnum):
    """Where a release answers requests."""

    PROCESS = "process"
    DOCKER = "docker"


class Verdict(StrEnum):
    """What the gate decided on a candidate."""

    PROMOTED = "promoted"
    REJECTED = "rejected"


class ExitCode(IntEnum):
    """Exit codes of a stage, after BSD sysexits.h, so that each says whether a retry can help."""

    OK = 0
    FAILED = 1  # a fault in the stage's code: not retried
    BAD_REQUEST = 64  # EX_USAGE: the request file is unusable
    BAD_DATA = 65  # EX_DATAERR: the input cannot be used
    TEMPORARY = 75  # EX_TEMPFAIL: something outside did not answer: retried
