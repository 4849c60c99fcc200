"""The entry point that every stage image shares.

    python main.py STAGE --request request.json --result result.json

A stage is a function from a request to a result. This module reads the one, writes the other whole or
not at all, and turns what went wrong into an exit code that says whether a retry can help.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from airloom.contract.enums import ExitCode, Stage
from airloom.contract.request import StageRequest
from airloom.contract.result import StageResult
from airloom.errors import AirloomError, ContractError

StageFunction = Callable[[StageRequest], StageResult]


class StageInputError(Exception):
    """The input cannot be used and trying again won't help: the message says what, found and needed."""


def run_stage_main(stages: Mapping[Stage, StageFunction], argv: list[str] | None = None) -> int:
    """Run one stage from the command line and return the process's exit code.

    Nothing but the result file tells the outcome: what is printed is for people.
    """
    parser = argparse.ArgumentParser(description="Run one stage of an Airloom pipeline.")
    parser.add_argument("stage", choices=[stage.value for stage in stages])
    parser.add_argument("--request", type=Path, required=True, help="JSON file to read")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    stage = Stage(arguments.stage)
    started_at = time.time()

    def failed(message: str) -> StageResult:
        print(f"{stage.value}: {message}", file=sys.stderr, flush=True)
        return StageResult(stage=stage, status="failed", error=message, started_at=started_at, finished_at=time.time())

    try:
        request = StageRequest.read(arguments.request)
        if request.stage != stage:
            raise ContractError(f"the request is for stage {request.stage.value!r}, not {stage.value!r}")
    except ContractError as error:
        failed(str(error)).write(arguments.result)
        return ExitCode.BAD_REQUEST
    random.seed(request.seed)
    try:
        result = stages[stage](request)
    except StageInputError as error:
        failed(str(error)).write(arguments.result)
        return ExitCode.BAD_DATA
    except AirloomError as error:
        failed(str(error)).write(arguments.result)
        return ExitCode.TEMPORARY if error.retryable else ExitCode.FAILED
    except (ConnectionError, TimeoutError) as error:
        failed(f"something outside did not answer: {error}").write(arguments.result)
        return ExitCode.TEMPORARY
    except Exception as error:
        traceback.print_exc()
        failed(f"{type(error).__name__}: {error}").write(arguments.result)
        return ExitCode.FAILED
    result.write(arguments.result)
    return ExitCode.OK
