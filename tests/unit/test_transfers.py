"""What an engine says of pushes and pulls that fail, and programs whose lines are followed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from airloom.errors import AirloomError, AuthError, NotFoundError, UnavailableError
from airloom.hooks.docker_engine import ensure_image
from airloom.hooks.follow import follow
from airloom.settings import Settings


class Registryless:
    """An engine that has no image, and whose pulls fail."""

    def __init__(self, said: str, *, at_once: bool) -> None:
        self.said, self.at_once = said, at_once

    def inspect_image(self, reference: str) -> None:
        from docker.errors import ImageNotFound

        raise ImageNotFound(reference)

    def pull(self, reference: str, **options: Any) -> Iterator[dict[str, str]]:
        from docker.errors import APIError

        if self.at_once:
            raise APIError("500 Server Error", explanation=self.said)
        return iter([{"status": "begun"}, {"error": self.said}])


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("said", "kind", "shown"),
    [
        ("toomanyrequests: You have reached your pull rate limit", UnavailableError, "limits the rate of nobody"),
        ("manifest for r.org/x:1 not found: manifest unknown", NotFoundError, "r.org/x:1 cannot be pulled"),
        ("unauthorized: authentication required", AuthError, "refuses the pull of r.org/x:1 to user nobody"),
        ("dial tcp 10.0.0.1:443: connect: connection refused", UnavailableError, "r.org/x:1 could not be pulled"),
    ],
)
def test_a_stage_whose_image_cannot_be_pulled_says_why(
    settings: Settings, said: str, kind: type[AirloomError], shown: str, at_once: bool
) -> None:
    engine = Registryless(said, at_once=at_once)
    with pytest.raises(kind, match=shown) as caught:
        ensure_image(engine, settings, "r.org/x:1")
    assert caught.value.retryable is (kind is UnavailableError)


def test_lines_are_handed_on_and_errors_are_kept_apart() -> None:
    lines: list[str] = []
    command = [sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); print('c'); sys.exit(3)"]
    done = follow(command, os.environ, lines.append, timeout_seconds=20)
    assert (done.returncode, done.stdout, done.stderr, lines) == (3, "a\nc\n", "b\n", ["a", "c"])
    lines.clear()
    done = follow(command, {**os.environ, "PYTHONUNBUFFERED": "1"}, lines.append, timeout_seconds=20, errors_too=True)
    assert (done.stdout, done.stderr, lines) == ("a\nb\nc\n", "", ["a", "b", "c"])


def test_a_program_that_does_not_end_is_ended_though_it_talks() -> None:
    command = [sys.executable, "-uc", "while True: print('more')"]
    with pytest.raises(subprocess.TimeoutExpired):
        follow(command, os.environ, lambda line: None, timeout_seconds=0.5)


def test_a_program_ends_with_whoever_follows_it() -> None:
    def refuse(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow([sys.executable, "-uc", "while True: print('more')"], os.environ, refuse, timeout_seconds=20)
