"""The private environment of a stage process: little is inherited, and all of it is named here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

JOB_VARIABLE = "AIRLOOM_STAGE_JOB"
WORKSPACE_VARIABLE = "AIRLOOM_STAGE_WORKSPACE"
INSTANCE_VARIABLE = "AIRLOOM_INSTANCE"

# Where programs look for the authorities that sign outside servers' certificates, and how to reach outside.
INHERITED = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    INSTANCE_VARIABLE,  # by which the platform finds whatever it must end when it goes down
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


def thread_environment(cpus: float) -> dict[str, str]:
    """As many threads for numeric libraries as there are processors: whole ones, and at least one.

    A thread that spins while it waits for another keeps that one from the processor: two stages at once on two cores
    take three times as long.
    """
    return {**{name: str(max(1, int(cpus))) for name in _THREAD_VARIABLES}, "OMP_WAIT_POLICY": "PASSIVE"}


def stage_environment(
    *, home: Path, cpus: float, gpus: int, extra: Mapping[str, str], source: Mapping[str, str] | None = None
) -> dict[str, str]:
    """All variables of a stage process.

    Args:
        home: a folder that is its HOME: what a person keeps in theirs is not the stage's business.
        cpus: see `thread_environment`.
        gpus: without any, none is visible.
        extra: goes before everything else.
        source: what is inherited from; this process's environment by default.
    """
    source = os.environ if source is None else source
    programs = str(Path(sys.executable).parent)
    path = [part for part in source.get("PATH", os.defpath).split(os.pathsep) if part and part != programs]
    environment = {
        "PATH": os.pathsep.join([programs, *path]),
        "HOME": str(home),
        "LANG": source.get("LANG") or "C.UTF-8",
        "TZ": "UTC",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout is read-only
        "PYTHONHASHSEED": "0",  # sets keep their order from one run to the next
        **thread_environment(cpus),
    }
    environment.update({name: source[name] for name in INHERITED if source.get(name)})
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif source.get("CUDA_VISIBLE_DEVICES"):
        environment["CUDA_VISIBLE_DEVICES"] = source["CUDA_VISIBLE_DEVICES"]
    return {**environment, **extra}
