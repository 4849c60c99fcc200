"""Deploy target `process`, with the supervisor replaced."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import pytest

from airloom.errors import ConflictError
from airloom.hooks.deploy_process import ProcessTarget, service_name
from airloom.hooks.supervisor import Phase, ServiceState, Supervisor
from airloom.settings import Settings
from airloom.spec.pipeline import PipelineSpec
from tests.fixtures.plans import make_plan, make_release


def test_a_pipelines_releases_are_not_those_of_one_whose_name_begins_alike(settings: Settings) -> None:
    names = [
        service_name("digits", "1.0.9"),
        service_name("digits", "1.0.10"),
        service_name("digits_docker", "1.0.0"),
        service_name("digits_1", "2.0.0"),
        "gateway",
    ]
    supervisor = create_autospec(Supervisor, instance=True)
    known = {"state": Phase.READY, "pid": 1, "port": 2, "restarts": 0, "ready": True, "url": None, "log": "log"}
    supervisor.services.return_value = [
        ServiceState.model_validate({**known, "name": name, "dynamic": name != "gateway"}) for name in names
    ]
    target = ProcessTarget(settings, supervisor)
    assert target.running("digits") == ["1.0.9", "1.0.10"]
    assert target.running("digits_docker") == ["1.0.0"]
    assert target.running("digits_1") == ["2.0.0"]
    assert target.running("dig") == []


def test_a_release_that_was_started_otherwise_is_started_anew(settings: Settings, tmp_path: Path) -> None:
    """From a folder that was moved since, or with another database."""
    supervisor = create_autospec(Supervisor, instance=True)
    supervisor.start.side_effect = [ConflictError("another definition runs"), None]
    supervisor.wait_ready.return_value.port = 8101
    plan = make_plan()
    release = make_release(plan.pipeline, "1.0.0")
    url = ProcessTarget(settings, supervisor).start(release, tmp_path, PipelineSpec.stored(plan.spec, "the plan"))
    assert url == f"http://{settings.bind_host}:8101"
    supervisor.stop.assert_called_once_with(service_name(release.pipeline, "1.0.0"))
    assert supervisor.start.call_count == 2
    supervisor.start.side_effect = ConflictError("the platform is being stopped")
    with pytest.raises(ConflictError, match="being stopped"):
        ProcessTarget(settings, supervisor).start(release, tmp_path, PipelineSpec.stored(plan.spec, "the plan"))
