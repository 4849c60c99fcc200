"""What the stack's check of the machine says of GPUs, which only the engine itself knows of."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from airloom.errors import ConfigError
from airloom.hooks import docker_gpu
from airloom.hooks.docker_engine import connect
from airloom.hooks.docker_gpu import probe_gpus
from airloom.settings import Settings
from airloom.stack import doctor
from airloom.stack.compose import Compose, compose_command
from tests.conftest import ROOT


def test_an_engine_is_asked_for_gpus_only_where_they_are_wanted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        compose_command()
    except ConfigError as error:
        pytest.skip(str(error))
    tag = f"test-{os.getpid()}"
    monkeypatch.setattr(docker_gpu, "uuid4", lambda: SimpleNamespace(hex=tag))
    here = settings.model_copy(update={"project": ROOT})
    monkeypatch.setenv("COMPOSE_PROFILES", "seaweedfs,forge")
    assert list(doctor._gpu(here, Compose(here).config())) == []
    monkeypatch.setenv("COMPOSE_PROFILES", "seaweedfs,forge,gpu")
    (check,) = doctor._gpu(here, Compose(here).config())
    api = connect(settings)
    has_gpus = probe_gpus(api) is None
    assert check.ok is has_gpus
    if not has_gpus:
        assert 'could not select device driver "nvidia"' in check.found
        assert "install the NVIDIA container toolkit" in check.advice
        assert "take gpu out of COMPOSE_PROFILES" in check.advice
    probed = f"airloom-probe:{tag}"
    assert not api.images(probed)
    assert probed not in [container["Image"] for container in api.containers(all=True)]
