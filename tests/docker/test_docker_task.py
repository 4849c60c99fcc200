"""The container of one task, and what others do to it."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airloom.hooks.docker_task import TaskContainer
from tests.docker.task_bench import Bench, Ti, make_bench

bench = pytest.fixture(make_bench)

PROGRAM = ("import pathlib", "pathlib.Path('/airloom/result.json').write_text('7')")
RESULT_PATH = "/airloom/result.json"


def test_removed_between_its_end_and_its_result(bench: Bench) -> None:
    """What it left is gone with it, which is not to say that it left nothing: the next try may."""
    wait = TaskContainer.wait

    def then_removed(job: TaskContainer, container: str, *rest: Any) -> Any:
        ended = wait(job, container, *rest)
        bench.api.remove_container(container, force=True)
        return ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskContainer, "wait", then_removed)
        with pytest.raises(AirflowException, match="was removed before its result was taken") as caught:
            bench.run(*PROGRAM, result_path=RESULT_PATH)
    assert not isinstance(caught.value, AirflowFailException), "another try may help"
    assert bench.containers() == []
    value, lines = bench.run(*PROGRAM, ti=Ti(try_number=2), result_path=RESULT_PATH)
    assert value == 7
    assert any(line.startswith("started container") for line in lines)
