"""What differs between a stack with Jenkins and one without."""

from __future__ import annotations

from typing import Any
from unittest.mock import create_autospec

import pytest

from airloom.stack import doctor, launch
from airloom.stack.compose import Compose


def with_services(*names: str) -> dict[str, Any]:
    return {"services": {name: {} for name in names}}


@pytest.mark.parametrize(
    ("services", "told"),
    [(("gitbucket", "jenkins"), ["--env", "AIRLOOM_JENKINS_URL=http://jenkins:8080"]), (("forge",), [])],
)
def test_provisioning_knows_of_jenkins(services: tuple[str, ...], told: list[str]) -> None:
    compose = create_autospec(Compose, instance=True)
    compose.config.return_value = with_services(*services)
    compose.run.return_value = "repositories: done: ds_mlmodeling\n"
    seen: list[tuple[str, str]] = []
    launch._provision(compose, lambda step, state: seen.append((step, state)))
    (call,) = compose.run.call_args_list
    assert list(call.args) == ["run", "--rm", "--no-deps", "--quiet-pull", *told, "provision", "provision"]
    assert ("repositories", "done: ds_mlmodeling") in seen


@pytest.mark.parametrize(
    ("services", "found"),
    [(("gitbucket", "minio"), False), (("gitbucket", "jenkins", "minio"), True), (("forge", "minio"), None)],
)
def test_gitbucket_without_jenkins_is_said(services: tuple[str, ...], found: bool | None) -> None:
    checks = {check.name: check for check in doctor._values(with_services(*services))}
    if found is None:
        assert "builds" not in checks
    else:
        assert checks["builds"].ok is found
        assert "COMPOSE_PROFILES" in checks["builds"].advice
