"""What the request and the environment say about how to serve."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError

from airloom.contract import Frozen, StageRequest
from airloom.contract.errors import ContractError

PORT_VARIABLE = "AIRLOOM_PORT"
DATABASE_VARIABLE = "AIRLOOM_PREDICTION_DB"
TOKEN_VARIABLE = "AIRLOOM_SERVING_ADMIN_TOKEN"  # noqa: S105 - the variable's name


class Options(Frozen):
    """The stage's parameters, each with its default.

    Attributes:
        port: the environment's AIRLOOM_PORT goes before it.
        max_upload_bytes: of one request's body.
        journal_dir: where answers are kept until the prediction log has them.
        releases_root: `PUT /model` takes releases from below this folder alone; without it, none.
        max_batch: requests that the model sees at once; it never waits to fill one.
        max_queue: requests that may wait for the model; more are told to come back.
        threads: that numeric libraries may use for one batch.
        read_timeout_seconds: within which a request's body must have arrived.
        max_journal_bytes: how far the journal may grow while the database is down.
        database_url: SQLAlchemy URL of the prediction log; from the environment.
        admin_token: that `PUT /model` asks for; from the environment. Without it, nobody may swap.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8100, ge=0, lt=65536)
    max_upload_bytes: int = Field(default=2 * 2**20, gt=0)
    journal_dir: Path
    releases_root: Path | None = None
    max_batch: int = Field(default=32, ge=1)
    max_queue: int = Field(default=256, ge=1)
    threads: int = Field(default=1, ge=1)
    read_timeout_seconds: float = Field(default=30.0, gt=0)
    max_journal_bytes: int = Field(default=512 * 2**20, gt=0)
    database_url: SecretStr | None = None
    admin_token: SecretStr | None = None

    @classmethod
    def of(cls, request: StageRequest) -> Options:
        """Read the options of a request and this process's environment.

        Raises:
            ContractError: a parameter is unknown, missing or wrong.
        """
        values = dict(request.params)
        if port := os.environ.get(PORT_VARIABLE):
            values["port"] = port
        for name, variable in (("database_url", DATABASE_VARIABLE), ("admin_token", TOKEN_VARIABLE)):
            if value := os.environ.get(variable):
                values[name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise ContractError(
                f"params.{'.'.join(map(str, first['loc']))} of the serve request: {first['msg']}",
                hint=f"serve takes: {', '.join(cls.model_fields)}",
            ) from None
