"""All hooks of a process, each made when it is first used."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from airloom.settings import Settings, get_settings

if TYPE_CHECKING:
    from airloom.hooks.airflow_api import AirflowApi
    from airloom.hooks.gateway import Gateway
    from airloom.hooks.git import GitRemote
    from airloom.hooks.gitbucket import GitBucket
    from airloom.hooks.ledger import Ledger
    from airloom.hooks.mlflow import ModelRegistry
    from airloom.hooks.object_store import ObjectStore
    from airloom.hooks.prediction_log import PredictionLog
    from airloom.hooks.supervisor import Supervisor


class Hooks:
    """One of each hook, built from the settings. Heavy packages are imported by the first use of theirs."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or get_settings()

    @cached_property
    def airflow(self) -> AirflowApi:
        from airloom.hooks.airflow_api import AirflowApi

        return AirflowApi.from_settings(self.settings)

    @cached_property
    def gateway(self) -> Gateway:
        from airloom.hooks.gateway import Gateway

        return Gateway.from_settings(self.settings)

    @cached_property
    def git(self) -> GitRemote:
        from airloom.hooks.git import GitRemote

        return GitRemote.from_settings(self.settings)

    @cached_property
    def gitbucket(self) -> GitBucket:
        from airloom.hooks.gitbucket import GitBucket

        return GitBucket.from_settings(self.settings)

    @cached_property
    def ledger(self) -> Ledger:
        from airloom.hooks.ledger import Ledger

        return Ledger.from_settings(self.settings)

    @cached_property
    def mlflow(self) -> ModelRegistry:
        from airloom.hooks.mlflow import ModelRegistry

        return ModelRegistry.from_settings(self.settings)

    @cached_property
    def store(self) -> ObjectStore:
        from airloom.hooks.object_store import ObjectStore

        return ObjectStore.from_settings(self.settings)

    @cached_property
    def predictions(self) -> PredictionLog:
        from airloom.hooks.prediction_log import PredictionLog

        return PredictionLog.from_settings(self.settings)

    @cached_property
    def supervisor(self) -> Supervisor:
        from airloom.hooks.supervisor import Supervisor

        return Supervisor.from_settings(self.settings)
