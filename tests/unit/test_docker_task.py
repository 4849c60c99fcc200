"""What is made of a result that the engine does not find."""

from __future__ import annotations

from typing import Any

import pytest
from docker.errors import APIError, NotFound

from airloom.errors import ContractError, ServiceError, StageFailedError
from airloom.hooks.docker_task import TaskContainer, TaskId
from airloom.settings import Settings


class Engine:
    """It has a container in a state, or none, and no file of it."""

    def __init__(self, status: str | None, refusal: APIError) -> None:
        self.status, self.refusal = status, refusal

    def get_archive(self, container: str, path: str) -> Any:
        raise self.refusal

    def inspect_container(self, container: str) -> dict[str, Any]:
        if self.status is None:
            raise NotFound("No such container")
        return {"State": {"Status": self.status}}


class Answer:
    """As much of an HTTP answer as the SDK's errors look at."""

    status_code, reason = 409, "Conflict"


def result(settings: Settings, engine: Engine) -> Any:
    job = TaskContainer(settings, TaskId(dag="d", run="r", task="t"), client=lambda: engine, key="key")
    return job.result("c", "/airloom/result.json", 1000)


CONFLICT = APIError("refused", response=Answer(), explanation="it is being removed")


@pytest.mark.parametrize(
    ("status", "refusal"), [(None, NotFound("gone")), ("removing", NotFound("gone")), ("dead", CONFLICT)]
)
def test_of_a_container_that_is_gone_another_try_may_help(
    settings: Settings, status: str | None, refusal: APIError
) -> None:
    with pytest.raises(StageFailedError, match="container was removed before its result was taken") as caught:
        result(settings, Engine(status, refusal))
    assert caught.value.retryable
    assert "the next try starts it anew" in str(caught.value)


def test_one_that_left_no_file_would_leave_none_again(settings: Settings) -> None:
    with pytest.raises(ContractError, match=r"left no /airloom/result\.json") as caught:
        result(settings, Engine("exited", NotFound("no such file")))
    assert not caught.value.retryable


def test_what_the_engine_refuses_otherwise_is_said_as_it_is(settings: Settings) -> None:
    with pytest.raises(ServiceError, match="refused: it is being removed"):
        result(settings, Engine("exited", CONFLICT))
