"""Whether what a task has started is to go on when the task itself is told to end."""

from __future__ import annotations

from typing import Any

from airloom.errors import AirloomError, NotFoundError
from airloom.settings import get_settings

# Airflow kills a task that has not gone 5 seconds after it was asked to; what it runs must be gone by then.
STOP_SECONDS = 3.5
_ASK_SECONDS = 1.0
# States in which Airflow still wants the task: it only lost its worker, and a later try will adopt what runs.
_WANTED = frozenset({"running", "queued", "scheduled", "up_for_retry"})


class StageLeftRunningError(AirloomError):
    """The task ends, but what it has started goes on for a later try."""

    retryable = True


def map_index_of(ti: Any) -> int:
    """-1 where the task is not mapped."""
    found = getattr(ti, "map_index", None)
    return -1 if found is None else int(found)


def is_wanted(ti: Any) -> bool:
    """Whether Airflow would still have this task go on; if it doesn't answer, nobody has said otherwise."""
    from airloom.hooks.airflow_api import AirflowApi

    try:
        api = AirflowApi.from_settings(get_settings(), patience_seconds=_ASK_SECONDS)
        found = api.task_instance(ti.dag_id, ti.run_id, ti.task_id, map_index_of(ti))
    except NotFoundError:
        return False
    except AirloomError:
        return True
    return found["state"] in _WANTED
