"""The base of every model that crosses a boundary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from airloom.errors import ContractError


class Frozen(BaseModel):
    """Immutable, and refuses keys it does not know, so that a typo is an error and not a default."""

    # JSON has no word for NaN; null would not be read back as a number.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all: a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=2))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def stored(cls, value: object, where: str) -> Self:
        """Read a document that a store has kept, written by this version of Airloom or another.

        Keys that this version does not know are passed over, so that one version's documents are of use to the next
        and to the one before.

        Args:
            where: what the document is, for people.

        Raises:
            ContractError: it does not follow the model.
        """
        try:
            return cls.model_validate(value, extra="ignore")
        except ValidationError as error:
            raise ContractError(
                f"{where} cannot be read by this version of Airloom: {_first(error)}",
                hint="run the pipeline once more; or use the version of Airloom that wrote it",
            ) from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            ContractError: the file is missing, is not JSON, or does not follow the model.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ContractError(f"{cls.__name__} expected at {path}, but there is no such file") from None
        except ValidationError as error:
            raise ContractError(
                f"{path} is not a valid {cls.__name__}: {_first(error)}",
                hint="the platform and the stage image may have different contract versions: rebuild the stage",
            ) from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or '(the whole file)'}: {first['msg']}"
